// Causal depthwise convolution over the sequence followed by SiLU: one pass over memory forward, one backward.
#include "common.h"

namespace {

// Channels worked on at a time: their filter, sums and nearby tokens stay in the first-level cache.
constexpr i64 PIECE = 512;

// Smallest block of tokens. The backward pass computes width - 1 tokens after each block once more.
constexpr i64 BLOCK = 32;

template <class T>
struct Convolution {
  using W = wide<T>;
  Tokens<const T> x;
  const W* bias;                // [channels] or null
  const std::int32_t* seq_idx;  // [batch, length] or null
  i64 batch, length, channels, width;
  std::vector<W> filter;  // [width, channels], by distance: the first row belongs to the token itself

  Convolution(Tokens<const T> x, const void* weight_, const void* bias, const std::int32_t* seq_idx, i64 batch,
              i64 length, i64 channels, i64 width)
      : x(x), bias(static_cast<const W*>(bias)), seq_idx(seq_idx), batch(batch), length(length), channels(channels),
        width(width), filter(width * channels) {
    auto weight = static_cast<const W*>(weight_);
    for (i64 c = 0; c < channels; c++)
      for (i64 s = 0; s < width; s++) filter[s * channels + c] = weight[c * width + width - 1 - s];
  }

  i64 blocks() const { return blocks_of(batch * length, BLOCK); }
  i64 pieces() const { return (channels + PIECE - 1) / PIECE; }
  Range piece(i64 number) const { return {number * PIECE, std::min(channels, (number + 1) * PIECE)}; }

  // Whether a filter reaches from token `late` to the earlier token `early`.
  bool reaches(i64 b, i64 early, i64 late) const {
    if (early < 0 || late >= length) return false;
    return !seq_idx || seq_idx[b * length + early] == seq_idx[b * length + late];
  }

  // sum[...] = the convolution at one token, for channels of `range`.
  void at(i64 b, i64 t, Range range, W* sum) const {
    auto [begin, end] = range;
    for (i64 i = begin; i < end; i++) sum[i - begin] = bias ? bias[i] : W(0);
    for (i64 s = 0; s < width && reaches(b, t - s, t); s++)
      add_product(end - begin, &filter[s * channels + begin], x(b, t - s) + begin, sum);
  }

  template <class U>
  static void add_product(i64 n, const W* a, const U* b, W* sum) {
#pragma omp simd
    for (i64 i = 0; i < n; i++) sum[i] += a[i] * widen(b[i]);
  }
};

// body(b, begin, end) for the parts of a block of tokens that lie in one sequence.
template <class Body>
void sequences(Range rows, i64 length, Body body) {
  for (i64 row = rows.begin; row < rows.end;) {
    i64 t = row % length, count = std::min(length - t, rows.end - row);
    body(row / length, t, t + count);
    row += count;
  }
}

template <class T>
void forward(const Convolution<T>& conv, Tokens<T> out_tokens, i64 threads) {
  i64 pieces = conv.pieces(), blocks = conv.blocks();
  parallel(blocks * pieces, threads, [&](i64 task) {
    Range channels = conv.piece(task % pieces);
    wide<T> sum[PIECE];
    Range rows = block_of(conv.batch * conv.length, task / pieces, blocks);
    for (i64 row = rows.begin; row < rows.end; row++) {
      i64 b = row / conv.length, t = row % conv.length;
      conv.at(b, t, channels, sum);
      T* out = out_tokens(b, t) + channels.begin;
#pragma omp simd
      for (i64 i = 0; i < channels.end - channels.begin; i++) narrow(sum[i] * sigmoid(sum[i]), out[i]);
    }
  });
}

// The backward pass of one piece of channels.
template <class T>
struct Backward {
  using W = wide<T>;
  const Convolution<T>& conv;
  Tokens<const T> grad;
  Tokens<T> dx;
  Range channels;
  W* sums;  // of filter and bias [width + 1, channels]
  i64 n = channels.end - channels.begin;
  std::vector<W> ring = std::vector<W>(conv.width * PIECE);  // gradients before the SiLU of the last `width` tokens

  W* slot(i64 t) { return &ring[t % conv.width * PIECE]; }

  void before_silu(i64 b, i64 t) {
    W* g = slot(t);
    conv.at(b, t, channels, g);
    const T* in = grad(b, t) + channels.begin;
#pragma omp simd
    for (i64 i = 0; i < n; i++) g[i] = widen(in[i]) * silu_slope(g[i], sigmoid(g[i]));
  }

  void add_to_sums(i64 b, i64 t) {
    const W* g = slot(t);
    for (i64 s = 0; s < conv.width && conv.reaches(b, t - s, t); s++)
      conv.add_product(n, g, conv.x(b, t - s) + channels.begin, sums + s * conv.channels + channels.begin);
    W* dbias = sums + conv.width * conv.channels + channels.begin;
    for (i64 i = 0; i < n; i++) dbias[i] += g[i];
  }

  // Needs the gradients of the width - 1 tokens after t.
  void write_dx(i64 b, i64 t) {
    W sum[PIECE] = {};
    for (i64 s = 0; s < conv.width && conv.reaches(b, t, t + s); s++)
      conv.add_product(n, slot(t + s), &conv.filter[s * conv.channels + channels.begin], sum);
    T* out = dx(b, t) + channels.begin;
#pragma omp simd
    for (i64 i = 0; i < n; i++) narrow(sum[i], out[i]);
  }

  void operator()(i64 b, i64 begin, i64 end) {
    i64 later = conv.width - 1;
    for (i64 t = begin; t < end + later; t++) {
      if (t < conv.length) before_silu(b, t);
      if (t < end) add_to_sums(b, t);
      if (t - later >= begin) write_dx(b, t - later);
    }
  }
};

template <class T>
void backward(const Convolution<T>& conv, Tokens<const T> grad, Tokens<T> dx, void* dweight_, void* dbias_,
              i64 threads) {
  using W = wide<T>;
  i64 pieces = conv.pieces(), blocks = conv.blocks(), channels = conv.channels, width = conv.width;
  i64 count = (width + 1) * channels;
  std::vector<W> partial(blocks * count), total(count);
  parallel(blocks * pieces, threads, [&](i64 task) {
    i64 block = task / pieces;
    Backward<T> work{conv, grad, dx, conv.piece(task % pieces), &partial[block * count]};
    sequences(block_of(conv.batch * conv.length, block, blocks), conv.length, [&](auto... part) { work(part...); });
  });
  sum_blocks(partial, blocks, count, total.data(), threads);
  auto dweight = static_cast<W*>(dweight_);
  for (i64 c = 0; c < channels; c++)
    for (i64 s = 0; s < width; s++) dweight[c * width + width - 1 - s] = total[s * channels + c];
  std::copy_n(&total[width * channels], channels, static_cast<W*>(dbias_));
}

template <class T>
void conv(Tokens<const T> x, const void* weight, const void* bias, const std::int32_t* seq_idx, Tokens<T> out,
          i64 batch, i64 length, i64 channels, i64 width, i64 threads) {
  forward(Convolution<T>(x, weight, bias, seq_idx, batch, length, channels, width), out, threads);
}

template <class T>
void conv_grad(Tokens<const T> x, const void* weight, const void* bias, const std::int32_t* seq_idx,
               Tokens<const T> grad, Tokens<T> dx, void* dweight, void* dbias, i64 batch, i64 length, i64 channels,
               i64 width, i64 threads) {
  Convolution<T> conv(x, weight, bias, seq_idx, batch, length, channels, width);
  backward(conv, grad, dx, dweight, dbias, threads);
}

}  // namespace

extern "C" {

// out = silu(bias + sum over k of weight[:, k] x[t - width + 1 + k]).
// x and out [batch, length, channels] with batch and token strides in elements and contiguous channels; weight
// [channels, width] and bias [channels] (or null) dense, in the wide type; seq_idx, the document of each token, dense
// int32 [batch, length], non-decreasing, or null: the filter does not reach into an earlier document.
void conv_forward(i64 dtype, const void* x, i64 x_batch, i64 x_token, const void* weight, const void* bias,
                  const std::int32_t* seq_idx, void* out, i64 out_batch, i64 out_token, i64 batch, i64 length,
                  i64 channels, i64 width, i64 threads) {
  DISPATCH(dtype, conv, {x, x_batch, x_token}, weight, bias, seq_idx, {out, out_batch, out_token}, batch, length,
           channels, width, threads);
}

// The gradients, of the shapes and types of their tensors (dbias also where bias is null); what preceded the SiLU is
// computed again.
void conv_backward(i64 dtype, const void* x, i64 x_batch, i64 x_token, const void* weight, const void* bias,
                   const std::int32_t* seq_idx, const void* grad, i64 grad_batch, i64 grad_token, void* dx,
                   i64 dx_batch, i64 dx_token, void* dweight, void* dbias, i64 batch, i64 length, i64 channels,
                   i64 width, i64 threads) {
  DISPATCH(dtype, conv_grad, {x, x_batch, x_token}, weight, bias, seq_idx, {grad, grad_batch, grad_token},
           {dx, dx_batch, dx_token}, dweight, dbias, batch, length, channels, width, threads);
}
}
