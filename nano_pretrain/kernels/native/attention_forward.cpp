// Forward pass of attention: a task is one block of queries of one head, with a running softmax over the keys.
#include "attention.h"

namespace {

using namespace attention;

// Keys transposed [dim, KEYS] and values [KEYS, width] of each block of each group.
template <class W>
struct Packed {
  W* data;
  i64 dim, width;

  static i64 block_size(i64 dim) { return KEYS * (dim + padded<W>(dim)); }
  W* keys(i64 block) const { return data + block * block_size(dim); }
  W* values(i64 block) const { return keys(block) + KEYS * dim; }
};

// The softmax of one query over the keys so far: weights are exp(score - peak), `out` the sum of weighted values.
template <class W>
struct Running {
  W peak = -std::numeric_limits<W>::infinity();
  vector<W> totals = {};  // of the weights in each lane

  // Scores become weights. NaN never is the peak; it makes weights NaN.
  void take(W* scores, Range seen, i64 columns, W* out, i64 width) {
    if (seen.begin >= seen.end) {
      std::fill(scores, scores + columns, W(0));
      return;
    }
    hide(scores, seen, columns);
    W now = peak;
#pragma omp simd reduction(max : now)
    for (i64 i = 0; i < columns; i++) now = scores[i] > now ? scores[i] : now;
    if (now > peak) rescale(now, out, width);
    for (i64 i = 0; i < columns; i++) scores[i] = exponential(scores[i] - now);
    for (i64 i = 0; i < columns; i += LANES<W>) totals += *reinterpret_cast<const vector<W>*>(scores + i);
  }

  void rescale(W now, W* out, i64 width) {
    W factor = exponential(peak - now);
    totals *= factor;
    for (i64 i = 0; i < width; i++) out[i] *= factor;
    peak = now;
  }

  W total() const {
    W sum = 0;
    for (i64 lane = 0; lane < LANES<W>; lane++) sum += totals[lane];
    return sum;
  }
};

template <class T>
struct Forward {
  using W = wide<T>;
  const Shape& s;
  Visible visible;
  const T *query, *key, *value;
  W scale;
  T* out;
  W* lse;
  Packed<W> packed;

  void pack(i64 task) const {
    i64 group = task / s.key_blocks() % s.groups, sample = task / s.key_blocks() / s.groups;
    Range keys = s.keys(task % s.key_blocks());
    i64 count = keys.end - keys.begin, width = packed.width;
    W* rows = tile_memory<W>(KEYS * width);
    load(key + s.key.at(keys.begin, sample, group), s.key.token, count, s.dim, W(1), rows, KEYS, width);
    // Whole vectors of channels: the last ones may lie where the values come to lie, which are written afterwards.
    transpose<W>(KEYS, s.dim, rows, width, packed.keys(task), KEYS);
    load(value + s.value.at(keys.begin, sample, group), s.value.token, count, s.dim, W(1), packed.values(task), KEYS,
         width);
  }

  void attend(i64 task) const {
    i64 head = task / s.query_blocks() % s.heads, sample = task / s.query_blocks() / s.heads;
    Range queries = s.queries(task % s.query_blocks()), seen = visible.of(sample, queries);
    i64 width = packed.width, count = queries.end - queries.begin, rows = round_up(count, ROWS);
    W* tile = tile_memory<W>(2 * QUERIES * width + QUERIES * KEYS);
    W *sums = tile + QUERIES * width, *scores = sums + QUERIES * width;
    Running<W> running[QUERIES];
    load(query + s.query.at(queries.begin, sample, head), s.query.token, count, s.dim, scale, tile, rows, width);
    std::fill(sums, sums + rows * width, W(0));
    i64 first_block = (sample * s.groups + head / s.heads_per_group()) * s.key_blocks();
    for (i64 block = seen.begin / KEYS; block * KEYS < seen.end; block++) {
      Range keys = s.keys(block);
      i64 columns = padded<W>(keys.end - keys.begin);
      gemm<W>(rows, columns, s.dim, tile, width, 1, packed.keys(first_block + block), KEYS, scores, KEYS, false);
      for (i64 i = 0; i < count; i++)
        running[i].take(scores + i * KEYS, visible.columns(sample, queries.begin + i, keys.begin, columns), columns,
                        sums + i * width, width);
      gemm<W>(rows, width, keys.end - keys.begin, scores, KEYS, 1, packed.values(first_block + block), width, sums,
              width, true);
    }
    for (i64 i = 0; i < count; i++) finish(running[i], sums + i * width, sample, head, queries.begin + i);
  }

  // A query that sees no key has the output 0, and the logarithm of 0.
  void finish(const Running<W>& running, const W* sums, i64 sample, i64 head, i64 token) const {
    W total = running.total(), factor = total == 0 ? W(0) : W(1) / total;
    T* row = out + s.dense(s.heads).at(token, sample, head);
    for (i64 j = 0; j < s.dim; j++) narrow(factor * sums[j], row[j]);
    lse[(sample * s.heads + head) * s.length + token] = running.peak + std::log(total);
  }
};

template <class T>
void run(const Shape& s, const void* query, const void* key, const void* value, const std::int32_t* starts,
         double scale, void* out, void* lse, void* scratch, i64 threads) {
  using W = wide<T>;
  auto input = [](const void* tensor) { return static_cast<const T*>(tensor); };
  Packed<W> packed{static_cast<W*>(scratch), s.dim, padded<W>(s.dim)};
  Forward<T> forward{s,        {s, starts},          input(query),        input(key), input(value),
                     W(scale), static_cast<T*>(out), static_cast<W*>(lse), packed};
  parallel(s.batch * s.groups * s.key_blocks(), threads, [&](i64 task) { forward.pack(task); });
  parallel(s.batch * s.heads * s.query_blocks(), threads, [&](i64 task) { forward.attend(task); });
}

template <class T>
void scratch_size(const Shape& s, i64& count) {
  count = s.batch * s.groups * s.key_blocks() * Packed<wide<T>>::block_size(s.dim);
}

}  // namespace

extern "C" {

// Elements of the wide type that attention_forward needs as scratch.
i64 attention_forward_scratch(i64 dtype, i64 batch, i64 groups, i64 key_length, i64 dim) {
  i64 count = 0;
  DISPATCH(dtype, scratch_size, Shape{batch, groups, groups, 0, key_length, dim, 0, {}, {}, {}}, count);
  return count;
}

// out[length, batch, heads, dim], and lse[batch, heads, length]: the logarithm of each query's sum of exp(score).
void attention_forward(i64 dtype, const Shape* shape, const void* query, const void* key, const void* value,
                       const std::int32_t* starts, double scale, void* out, void* lse, void* scratch, i64 threads) {
  DISPATCH(dtype, run, *shape, query, key, value, starts, scale, out, lse, scratch, threads);
}
}
