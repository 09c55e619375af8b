// Causal depthwise convolution over the sequence followed by SiLU: one pass over memory forward, one backward.
#include "common.h"

namespace {

// Channels worked on at a time: their filter, sums and nearby tokens stay in the first-level cache.
constexpr i64 PIECE = 512;

// Smallest block of tokens. The backward pass computes width - 1 tokens after each block once more.
constexpr i64 BLOCK = 32;

// Taps of a filter that one pass over the channels takes: the usual filter whole. A narrower one is padded with zeros.
constexpr i64 TAPS = 4;

template <class T>
struct Convolution {
  using W = wide<T>;
  Tokens<const T> x;
  const std::int32_t* seq_idx;  // [batch, length] or null
  i64 batch, length, channels, width;
  i64 taps = std::max(width, TAPS);
  std::vector<W> filter;  // [taps, channels], by distance: the first row belongs to the token itself
  std::vector<W> bias;    // [channels]
  std::vector<T> no_token = std::vector<T>(PIECE);
  std::vector<W> no_gradient = std::vector<W>(PIECE);

  Convolution(Tokens<const T> x, const void* weight_, const void* bias_, const std::int32_t* seq_idx, i64 batch,
              i64 length, i64 channels, i64 width)
      : x(x), seq_idx(seq_idx), batch(batch), length(length), channels(channels), width(width),
        filter(taps * channels), bias(channels) {
    auto weight = static_cast<const W*>(weight_);
    for (i64 c = 0; c < channels; c++)
      for (i64 s = 0; s < width; s++) filter[s * channels + c] = weight[c * width + width - 1 - s];
    if (bias_) std::copy_n(static_cast<const W*>(bias_), channels, bias.begin());
  }

  i64 blocks() const { return blocks_of(batch * length, BLOCK); }
  i64 pieces() const { return (channels + PIECE - 1) / PIECE; }
  Range piece(i64 number) const { return {number * PIECE, std::min(channels, (number + 1) * PIECE)}; }

  // body(block, channels) for each block of tokens and piece of channels. Blocks come first: the pieces of a block share
  // cache lines, which threads would take from each other at every token.
  template <class Body>
  void tasks(i64 threads, Body body) const {
    parallel(blocks() * pieces(), threads, [=](i64 task) { body(task % blocks(), piece(task / blocks())); });
  }

  // Whether a filter reaches from token `late` to the earlier token `early`.
  bool reaches(i64 b, i64 early, i64 late) const {
    if (late - early >= width || early < 0 || late >= length) return false;
    return !seq_idx || seq_idx[b * length + early] == seq_idx[b * length + late];
  }

  const W* tap(i64 s, i64 channel) const { return &filter[s * channels + channel]; }

  // What tap s of token t takes: zeros where it does not reach.
  const T* token(i64 b, i64 t, i64 s, i64 channel) const {
    return reaches(b, t - s, t) ? x(b, t - s) + channel : no_token.data();
  }

  // body(i, sum, x0, x1, x2, x3) for each channel of `range`: the convolution at one token, and what its first taps took.
  template <class Body>
  void at(i64 b, i64 t, Range range, Body body) const {
    i64 c = range.begin, n = range.end - c;
    W scratch[PIECE];
    const W* start = &bias[c];
    if (width > TAPS) {
      std::copy_n(start, n, scratch);
      for (i64 s = TAPS; s < width; s++) add_product(n, tap(s, c), token(b, t, s, c), scratch);
      start = scratch;
    }
    const W *f0 = tap(0, c), *f1 = tap(1, c), *f2 = tap(2, c), *f3 = tap(3, c);
    const T *t0 = token(b, t, 0, c), *t1 = token(b, t, 1, c), *t2 = token(b, t, 2, c), *t3 = token(b, t, 3, c);
#pragma omp simd
    for (i64 i = 0; i < n; i++) {
      W x0 = widen(t0[i]), x1 = widen(t1[i]), x2 = widen(t2[i]), x3 = widen(t3[i]);
      body(i, start[i] + f0[i] * x0 + f1[i] * x1 + f2[i] * x2 + f3[i] * x3, x0, x1, x2, x3);
    }
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
  using W = wide<T>;
  conv.tasks(threads, [&](i64 block, Range channels) {
    Range rows = block_of(conv.batch * conv.length, block, conv.blocks());
    sequences(rows, conv.length, [&](i64 b, i64 begin, i64 end) {
      for (i64 t = begin; t < end; t++) {
        T* out = out_tokens(b, t) + channels.begin;
        conv.at(b, t, channels, [=](i64 i, W sum, W, W, W, W) { narrow(sum * sigmoid(sum), out[i]); });
      }
    });
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
  i64 c = channels.begin, n = channels.end - c;
  // Of filter and bias [taps + 1, PIECE], of this thread: those of two tasks would share cache lines.
  std::vector<W> sums = std::vector<W>((conv.taps + 1) * PIECE);
  std::vector<W> ring = std::vector<W>(conv.taps * PIECE);  // gradients before the SiLU of the last tokens
  std::vector<W> unused = std::vector<W>((TAPS + 1) * PIECE);

  W* slot(i64 t) { return &ring[t % conv.taps * PIECE]; }
  W* sum(i64 s) { return &sums[s * PIECE]; }

  // The gradient before the SiLU; those of the first taps and of the bias are added to `d`.
  void before_silu(i64 b, i64 t, W* const (&d)[TAPS + 1]) {
    W *g = slot(t), *d0 = d[0], *d1 = d[1], *d2 = d[2], *d3 = d[3], *dbias = d[TAPS];
    const T* in = grad(b, t) + c;
    conv.at(b, t, channels, [=](i64 i, W sum, W x0, W x1, W x2, W x3) {
      W slope = widen(in[i]) * silu_slope(sum, sigmoid(sum));
      g[i] = slope;
      d0[i] += slope * x0;
      d1[i] += slope * x1;
      d2[i] += slope * x2;
      d3[i] += slope * x3;
      dbias[i] += slope;
    });
  }

  void own(i64 b, i64 t) {
    before_silu(b, t, {sum(0), sum(1), sum(2), sum(3), sum(conv.taps)});
    for (i64 s = TAPS; s < conv.width; s++) conv.add_product(n, slot(t), conv.token(b, t, s, c), sum(s));
  }

  // A token of the next block, whose part of the sums is counted there.
  void next(i64 b, i64 t) {
    W* u = unused.data();
    before_silu(b, t, {u, u + PIECE, u + 2 * PIECE, u + 3 * PIECE, u + 4 * PIECE});
  }

  // The gradient that token t gets through tap s.
  const W* later(i64 b, i64 t, i64 s) { return conv.reaches(b, t, t + s) ? slot(t + s) : conv.no_gradient.data(); }

  // Needs the gradients of the width - 1 tokens after t.
  void write_dx(i64 b, i64 t) {
    W start[PIECE] = {};
    for (i64 s = TAPS; s < conv.width; s++) conv.add_product(n, later(b, t, s), conv.tap(s, c), start);
    const W *f0 = conv.tap(0, c), *f1 = conv.tap(1, c), *f2 = conv.tap(2, c), *f3 = conv.tap(3, c);
    const W *g0 = later(b, t, 0), *g1 = later(b, t, 1), *g2 = later(b, t, 2), *g3 = later(b, t, 3);
    T* out = dx(b, t) + c;
#pragma omp simd
    for (i64 i = 0; i < n; i++)
      narrow(start[i] + g0[i] * f0[i] + g1[i] * f1[i] + g2[i] * f2[i] + g3[i] * f3[i], out[i]);
  }

  void operator()(i64 b, i64 begin, i64 end) {
    i64 behind = conv.width - 1;
    for (i64 t = begin; t < end + behind; t++) {
      if (t < end) own(b, t);
      if (t >= end && t < conv.length) next(b, t);
      if (t - behind >= begin) write_dx(b, t - behind);
    }
  }

  // The sums, into those of all channels [taps + 1, channels].
  void write_sums(W* out) {
    for (i64 s = 0; s <= conv.taps; s++) std::copy_n(sum(s), n, out + s * conv.channels + c);
  }
};

template <class T>
void backward(const Convolution<T>& conv, Tokens<const T> grad, Tokens<T> dx, void* dweight_, void* dbias_,
              i64 threads) {
  using W = wide<T>;
  i64 blocks = conv.blocks(), channels = conv.channels, width = conv.width, count = (conv.taps + 1) * channels;
  std::vector<W> partial(blocks * count), total(count);
  conv.tasks(threads, [&](i64 block, Range piece) {
    Backward<T> work{conv, grad, dx, piece};
    sequences(block_of(conv.batch * conv.length, block, blocks), conv.length, [&](auto... part) { work(part...); });
    work.write_sums(&partial[block * count]);
  });
  sum_blocks(partial, blocks, count, total.data(), threads);
  auto dweight = static_cast<W*>(dweight_);
  for (i64 c = 0; c < channels; c++)
    for (i64 s = 0; s < width; s++) dweight[c * width + width - 1 - s] = total[s * channels + c];
  std::copy_n(&total[conv.taps * channels], channels, static_cast<W*>(dbias_));
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
