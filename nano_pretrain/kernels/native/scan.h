// One chunk of the Mamba-2 scan (Dao and Gu 2024, section 6): tiles, decays, and the step of the recurrent state.
//
// Dimensions: q, k tokens of a chunk, n state, p channels of a head. Tiles hold the wide type, padded with zeros.
// Tokens past the end of the sequence have dt = 0: they neither decay nor add.
#pragma once

#include "gemm.h"

namespace scan {

constexpr i64 CHUNK = 64;    // tokens of a chunk
constexpr i64 STRIP = 16;    // rows of a triangular tile that are computed at a time
constexpr i64 SEGMENT = 16;  // chunks between two kept states
constexpr i64 TILE = CHUNK * CHUNK;

// Sizes, and strides of batch and token in elements; everything else is contiguous. The order is that of scan.py.
struct Shape {
  i64 batch, length, heads, groups, channels, state, heads_per_block;
  i64 x_batch, x_token, b_batch, b_token, c_batch, c_token, y_batch, y_token, dx_batch, dx_token;

  i64 heads_per_group() const { return heads / groups; }
  i64 blocks() const { return (heads_per_group() + heads_per_block - 1) / heads_per_block; }
  i64 chunks() const { return (length + CHUNK - 1) / CHUNK; }
  i64 segments() const { return (chunks() + SEGMENT - 1) / SEGMENT; }
};

// A task: some heads of one group in one sample.
struct Task {
  i64 sample, group, block, first_head, heads;

  Task(const Shape& s, i64 number) {
    block = number % s.blocks();
    group = number / s.blocks() % s.groups;
    sample = number / s.blocks() / s.groups;
    i64 in_group = block * s.heads_per_block;
    first_head = group * s.heads_per_group() + in_group;
    heads = std::min(s.heads_per_block, s.heads_per_group() - in_group);
  }
};

// What both passes read; d and documents may be null.
template <class T>
struct Inputs {
  const Shape& shape;
  const T *x, *b, *c;
  const wide<T>*dt, *a, *d;
  const std::int32_t* documents;

  Inputs(const void* shape, const void* x, const void* dt, const void* a, const void* b, const void* c, const void* d,
         const void* documents)
      : shape(*static_cast<const Shape*>(shape)), x(static_cast<const T*>(x)), b(static_cast<const T*>(b)),
        c(static_cast<const T*>(c)), dt(static_cast<const wide<T>*>(dt)), a(static_cast<const wide<T>*>(a)),
        d(static_cast<const wide<T>*>(d)), documents(static_cast<const std::int32_t*>(documents)) {}
};

// Hands out the tiles of a task. Their sizes are multiples of a cache line, since their rows are.
template <class W>
class Arena {
 public:
  explicit Arena(i64 count) : next_(tile_memory<W>(count)) {}
  W* take(i64 count) {
    W* tile = next_;
    next_ += count;
    return tile;
  }

 private:
  W* next_;
};

// tile[CHUNK, width] from rows of a tensor; what lies outside is zero.
template <class T, class W>
inline void load(const T* __restrict source, i64 token_stride, i64 tokens, i64 columns, W* __restrict tile, i64 width) {
  for (i64 q = 0; q < CHUNK; q++) {
    W* row = tile + q * width;
    i64 filled = q < tokens ? columns : 0;
    const T* from = source + q * token_stride;
    for (i64 j = 0; j < filled; j++) row[j] = widen(from[j]);
    for (i64 j = filled; j < width; j++) row[j] = 0;
  }
}

template <class T, class W>
inline void store(const W* tile, i64 width, i64 tokens, i64 columns, T* target, i64 token_stride) {
  for (i64 q = 0; q < tokens; q++)
    for (i64 j = 0; j < columns; j++) narrow(tile[q * width + j], target[q * token_stride + j]);
}

// Which tokens of a chunk see each other, and the state before the chunk.
struct Documents {
  i64 first[CHUNK];  // first token of the chunk that is in the document of token q
  bool continues;    // whether the document of the first token began in an earlier chunk, or may have an initial state

  Documents(const std::int32_t* index, i64 begin, i64 tokens) {
    continues = !index || begin == 0 || index[begin] == index[begin - 1];
    for (i64 q = 0; q < CHUNK; q++)
      first[q] = !index || q == 0 ? 0 : (q >= tokens || index[begin + q] == index[begin + q - 1] ? first[q - 1] : q);
  }
  bool sees_state(i64 q) const { return continues && first[q] == 0; }
  i64 last() const { return first[CHUNK - 1]; }
};

// The decays of one head in a chunk.
template <class W>
struct Decay {
  W dt[CHUNK];
  double sum[CHUNK];    // of dt a up to and with token q; decays are of its differences, which are rounded once
  W from_start[CHUNK];  // of the state before the chunk, at token q
  W to_end[CHUNK];      // of token k's contribution, at the end of the chunk
  W keep;               // of the state over the whole chunk

  void prepare(const W* steps, i64 stride, i64 tokens, W rate, const Documents& documents) {
    double total = 0;
    for (i64 q = 0; q < CHUNK; q++) {
      dt[q] = q < tokens ? steps[q * stride] : W(0);
      total += double(dt[q]) * rate;
      sum[q] = total;
    }
    for (i64 q = 0; q < CHUNK; q++) from_start[q] = exponential(W(sum[q]));
    for (i64 q = 0; q < CHUNK; q++) to_end[q] = exponential(W(sum[CHUNK - 1] - sum[q]));
    keep = documents.sees_state(CHUNK - 1) ? from_start[CHUNK - 1] : W(0);
    for (i64 q = 0; q < CHUNK; q++) from_start[q] = documents.sees_state(q) ? from_start[q] : W(0);
    for (i64 k = 0; k < documents.last(); k++) to_end[k] = 0;
  }

  // tile[q, k] = exp(sum of dt a over (k, q]) for k <= q in one document, else 0; columns to the end of q's strip.
  // Left of the diagonal strip the exponential is a product of two, each at most 1, through the strip's first row.
  void fill(W* tile, const Documents& documents) const {
    W column[CHUNK];
    for (i64 strip = 0; strip < CHUNK; strip += STRIP) {
      for (i64 k = 0; k < strip; k++) column[k] = exponential(W(sum[strip] - sum[k]));
      for (i64 q = strip; q < strip + STRIP; q++) {
        W* row = tile + q * CHUNK;
        W factor = exponential(W(sum[q] - sum[strip]));
        for (i64 k = 0; k < strip; k++) row[k] = factor * column[k];
        for (i64 k = strip; k < strip + STRIP; k++) {
          W value = exponential(W(sum[q] - sum[k]));
          row[k] = k <= q ? value : W(0);
        }
        for (i64 k = 0; k < documents.first[q]; k++) row[k] = 0;
      }
    }
  }
};

// scores[q, k] = <left_q, right_k> up to the end of q's strip, from right transposed [width, CHUNK].
template <class W>
inline void lower_product(i64 width, const W* left, const W* right_transposed, W* scores) {
  for (i64 strip = 0; strip < CHUNK; strip += STRIP)
    gemm<W>(STRIP, strip + STRIP, width, left + strip * width, width, 1, right_transposed, CHUNK,
            scores + strip * CHUNK, CHUNK, false);
}

// out[q, :] += sum over k of weights[q, k] rows[k, :], weights lower triangular.
template <class W>
inline void lower_times(i64 width, const W* weights, const W* rows, W* out) {
  for (i64 strip = 0; strip < CHUNK; strip += STRIP)
    gemm<W>(STRIP, width, strip + STRIP, weights + strip * CHUNK, CHUNK, 1, rows, width, out + strip * width, width,
            true);
}

// out[k, :] (+)= sum over q of weights[q, k] rows[q, :], weights lower triangular.
template <class W>
inline void lower_transposed_times(i64 width, const W* weights, const W* rows, W* out, bool add) {
  for (i64 strip = 0; strip < CHUNK; strip += STRIP)
    gemm<W>(STRIP, width, CHUNK - strip, weights + strip * CHUNK + strip, 1, CHUNK, rows + strip * width, width,
            out + strip * width, width, add);
}

template <class W>
inline void scale(W* tile, i64 count, W factor) {
  for (i64 i = 0; i < count; i++) tile[i] *= factor;
}

// out[q, :] = factors[q] tile[q, :]; out may be the tile.
template <class W>
inline void scale_rows(const W* tile, i64 width, const W* factors, W* out) {
  for (i64 q = 0; q < CHUNK; q++)
#pragma omp simd
    for (i64 j = 0; j < width; j++) out[q * width + j] = factors[q] * tile[q * width + j];
}

// state[n, p] = keep state + sum over k of b[k, n] to_end[k] dt[k] x[k, p]; weighted[CHUNK, p] is scratch.
template <class W>
inline void advance(const Decay<W>& decay, const W* b, const W* x, i64 n, i64 p, W* weighted, W* state) {
  W factors[CHUNK];
  for (i64 k = 0; k < CHUNK; k++) factors[k] = decay.dt[k] * decay.to_end[k];
  scale_rows(x, p, factors, weighted);
  scale(state, n * p, decay.keep);
  gemm<W>(n, p, CHUNK, b, 1, n, weighted, p, state, p, true);
}

// Between [p, n] of a tensor and the tile [n, p]; a null tensor is zero.
template <class W>
inline void load_state(const W* tensor, i64 channels, i64 state, W* tile, i64 n, i64 p) {
  std::fill(tile, tile + n * p, W(0));
  if (!tensor) return;
  for (i64 i = 0; i < channels; i++)
    for (i64 j = 0; j < state; j++) tile[j * p + i] = tensor[i * state + j];
}

template <class W>
inline void store_state(const W* tile, i64 p, i64 channels, i64 state, W* tensor) {
  if (!tensor) return;
  for (i64 i = 0; i < channels; i++)
    for (i64 j = 0; j < state; j++) tensor[i * state + j] = tile[j * p + i];
}

}  // namespace scan
