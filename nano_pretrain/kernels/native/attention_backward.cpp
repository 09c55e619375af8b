// Backward pass of attention: a task is some blocks of keys of one head, against all queries that see them.
#include "attention.h"

namespace {

using namespace attention;

// What the tasks leave to be summed, [rows, width] each: gradients of the queries by segment, of keys and values by
// head. And delta = <out, its gradient>, the mean gradient of a query's scores under its weights.
template <class W>
struct Partial {
  W *query, *key, *value, *delta;

  Partial(const Shape& s, W* memory) : query(memory) {
    i64 heads = s.batch * s.heads, keys = heads * s.key_length * padded<W>(s.dim);
    key = query + heads * s.segments() * query_rows(s) * padded<W>(s.dim);
    value = key + keys;
    delta = value + keys;
  }
  // The last tile of queries is written whole.
  static i64 query_rows(const Shape& s) { return round_up(s.length, ROWS); }
  static i64 size(const Shape& s) {
    i64 rows = s.segments() * query_rows(s) + 2 * s.key_length;
    return s.batch * s.heads * (rows * padded<W>(s.dim) + s.length);
  }
};

template <class W>
struct Tiles {
  W *query, *dout, *key, *key_transposed, *value_transposed, *dkey, *dvalue, *scores, *dweights;

  explicit Tiles(i64 width) {
    static_assert(QUERIES == KEYS);
    W* memory = tile_memory<W>(7 * KEYS * width + 2 * KEYS * KEYS);
    for (W** tile : {&query, &dout, &key, &key_transposed, &value_transposed, &dkey, &dvalue, &scores, &dweights}) {
      *tile = memory;
      memory += KEYS * (tile == &scores ? KEYS : width);
    }
  }
};

template <class T>
struct Backward {
  using W = wide<T>;
  const Shape& s;
  Visible visible;
  const T *query, *key, *value, *out, *dout;
  const W* lse;
  W scale;
  Partial<W> partial;
  i64 width = padded<W>(s.dim);

  void delta(i64 task) const {
    i64 head = task / s.query_blocks();
    Range queries = s.queries(task % s.query_blocks());
    for (i64 i = queries.begin; i < queries.end; i++) {
      i64 at = s.dense(s.heads).at(i, head / s.heads, head % s.heads);
      W sum = 0;
#pragma omp simd reduction(+ : sum)
      for (i64 j = 0; j < s.dim; j++) sum += widen(out[at + j]) * widen(dout[at + j]);
      partial.delta[head * s.length + i] = sum;
    }
  }

  void segment(i64 task) const {
    i64 head = task / s.segments();
    Tiles<W> tiles(width);
    W* dquery = partial.query + task * partial.query_rows(s) * width;
    std::fill(dquery, dquery + partial.query_rows(s) * width, W(0));
    for (i64 block = task % s.segments(); block < s.key_blocks(); block += s.segments()) {
      Range keys = s.keys(block);
      load_keys(head, keys, tiles);
      for (i64 i = 0; i < s.query_blocks(); i++) {
        Range queries = s.queries(i), seen = visible.of(head / s.heads, queries);
        if (seen.begin < keys.end && keys.begin < seen.end)
          tile(head, queries, keys, tiles, dquery + queries.begin * width);
      }
      i64 at = (head * s.key_length + keys.begin) * width, count = (keys.end - keys.begin) * width;
      std::copy(tiles.dkey, tiles.dkey + count, partial.key + at);
      std::copy(tiles.dvalue, tiles.dvalue + count, partial.value + at);
    }
  }

  void load_keys(i64 head, Range keys, const Tiles<W>& t) const {
    i64 sample = head / s.heads, group = head % s.heads / s.heads_per_group(), count = keys.end - keys.begin;
    W* rows = t.key;  // of the values first, of which only the transposed tile is needed
    load(value + s.value.at(keys.begin, sample, group), s.value.token, count, s.dim, W(1), rows, KEYS, width);
    transpose<W>(KEYS, s.dim, rows, width, t.value_transposed, KEYS);
    load(key + s.key.at(keys.begin, sample, group), s.key.token, count, s.dim, W(1), rows, KEYS, width);
    transpose<W>(KEYS, s.dim, rows, width, t.key_transposed, KEYS);
    std::fill(t.dkey, t.dkey + KEYS * width, W(0));
    std::fill(t.dvalue, t.dvalue + KEYS * width, W(0));
  }

  void tile(i64 head, Range queries, Range keys, const Tiles<W>& t, W* dquery) const {
    i64 sample = head / s.heads, count = queries.end - queries.begin, rows = round_up(count, ROWS);
    i64 key_count = keys.end - keys.begin, columns = padded<W>(key_count);
    Strides dense = s.dense(s.heads);
    load(query + s.query.at(queries.begin, sample, head % s.heads), s.query.token, count, s.dim, scale, t.query, rows,
         width);
    load(dout + dense.at(queries.begin, sample, head % s.heads), dense.token, count, s.dim, W(1), t.dout, rows, width);
    gemm<W>(rows, columns, s.dim, t.query, width, 1, t.key_transposed, KEYS, t.scores, KEYS, false);
    gemm<W>(rows, columns, s.dim, t.dout, width, 1, t.value_transposed, KEYS, t.dweights, KEYS, false);
    for (i64 i = 0; i < count; i++) {
      i64 of_query = head * s.length + queries.begin + i;
      softmax_gradient(t.scores + i * KEYS, t.dweights + i * KEYS,
                       visible.columns(sample, queries.begin + i, keys.begin, columns), columns, lse[of_query],
                       partial.delta[of_query]);
    }
    gemm<W>(columns, width, count, t.scores, 1, KEYS, t.dout, width, t.dvalue, width, true);
    gemm<W>(columns, width, count, t.dweights, 1, KEYS, t.query, width, t.dkey, width, true);
    gemm<W>(rows, width, key_count, t.dweights, KEYS, 1, t.key, width, dquery, width, true);
  }

  // Scores become weights, and gradients of weights become gradients of scores.
  static void softmax_gradient(W* scores, W* gradients, Range seen, i64 columns, W lse, W delta) {
    if (seen.begin >= seen.end) {
      std::fill(scores, scores + columns, W(0));
      std::fill(gradients, gradients + columns, W(0));
      return;
    }
    hide(scores, seen, columns);
#pragma omp simd
    for (i64 i = 0; i < columns; i++) {
      scores[i] = exponential(scores[i] - lse);
      gradients[i] = scores[i] * (gradients[i] - delta);
    }
  }
};

// out[tokens, batch, heads, dim] = factor times the sum of the `count` parts [rows, width] of each head.
template <class T, class W = wide<T>>
void sum_parts(const Shape& s, const W* parts, i64 count, i64 rows, W factor, T* out, i64 tokens, i64 heads,
               i64 threads) {
  i64 width = padded<W>(s.dim), blocks = blocks_of(tokens, 1);
  parallel(s.batch * heads * blocks, threads, [&](i64 task) {
    i64 head = task / blocks;
    Range range = block_of(tokens, task % blocks, blocks);
    W* sum = tile_memory<W>(width);
    for (i64 token = range.begin; token < range.end; token++) {
      std::fill(sum, sum + width, W(0));
      for (i64 part = head * count; part < (head + 1) * count; part++)
        for (i64 j = 0; j < width; j++) sum[j] += parts[(part * rows + token) * width + j];
      T* row = out + s.dense(heads).at(token, head / heads, head % heads);
      for (i64 j = 0; j < s.dim; j++) narrow(factor * sum[j], row[j]);
    }
  });
}

template <class T>
void run(const Shape& s, const void* query, const void* key, const void* value, const std::int32_t* starts,
         double scale, const void* out, const void* lse, const void* dout, void* dquery, void* dkey, void* dvalue,
         void* scratch, i64 threads) {
  using W = wide<T>;
  auto input = [](const void* tensor) { return static_cast<const T*>(tensor); };
  auto output = [](void* tensor) { return static_cast<T*>(tensor); };
  Partial<W> partial(s, static_cast<W*>(scratch));
  Backward<T> backward{s,          {s, starts}, input(query),                input(key), input(value),
                       input(out), input(dout), static_cast<const W*>(lse), W(scale),   partial};
  parallel(s.batch * s.heads * s.query_blocks(), threads, [&](i64 task) { backward.delta(task); });
  parallel(s.batch * s.heads * s.segments(), threads, [&](i64 task) { backward.segment(task); });
  sum_parts(s, partial.query, s.segments(), partial.query_rows(s), W(scale), output(dquery), s.length, s.heads,
            threads);
  i64 keys = s.key_length;
  sum_parts(s, partial.key, s.heads_per_group(), keys, W(1), output(dkey), keys, s.groups, threads);
  sum_parts(s, partial.value, s.heads_per_group(), keys, W(1), output(dvalue), keys, s.groups, threads);
}

template <class T>
void scratch_size(const Shape& s, i64& count) {
  count = Partial<wide<T>>::size(s);
}

}  // namespace

extern "C" {

// Elements of the wide type that attention_backward needs as scratch.
i64 attention_backward_scratch(i64 dtype, i64 batch, i64 heads, i64 length, i64 key_length, i64 dim) {
  i64 count = 0;
  DISPATCH(dtype, scratch_size, Shape{batch, heads, heads, length, key_length, dim, 0, {}, {}, {}}, count);
  return count;
}

// Contiguous gradients of the queries [length, batch, heads, dim], and of keys and values [key length, batch, groups,
// dim].
void attention_backward(i64 dtype, const Shape* shape, const void* query, const void* key, const void* value,
                        const std::int32_t* starts, double scale, const void* out, const void* lse, const void* dout,
                        void* dquery, void* dkey, void* dvalue, void* scratch, i64 threads) {
  DISPATCH(dtype, run, *shape, query, key, value, starts, scale, out, lse, dout, dquery, dkey, dvalue, scratch,
           threads);
}
}
