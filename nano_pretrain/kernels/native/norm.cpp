// Gated group RMSNorm, out = v / sqrt(mean(v^2) + eps) weight with v = x silu(z), the mean over a group of channels.
// One pass over memory forward, one backward: a group stays in the first-level cache between its sum and its use.
#include "common.h"

namespace {

// Smallest block of rows.
constexpr i64 BLOCK = 16;

template <class T>
struct Rows {
  T* data;
  i64 stride;

  template <class Void>
  Rows(Void* data, i64 stride) : data(static_cast<T*>(data)), stride(stride) {}
  // Null if the tensor is absent.
  T* at(i64 row, i64 column) const { return data ? data + row * stride + column : nullptr; }
};

struct Shape {
  i64 rows, channels, group;
  double eps;

  template <class W>
  W scale(W squares) const {
    return W(1) / std::sqrt(squares / W(group) + W(eps));
  }
};

// v = x silu(z), or x without z; the sum of its squares.
template <class T, class W>
W gated(i64 n, const T* x, const T* z, W* v) {
  W squares = 0;
  if (z) {
#pragma omp simd reduction(+ : squares)
    for (i64 i = 0; i < n; i++) {
      W gate = widen(z[i]);
      v[i] = widen(x[i]) * (gate * sigmoid(gate));
      squares += v[i] * v[i];
    }
  } else {
#pragma omp simd reduction(+ : squares)
    for (i64 i = 0; i < n; i++) {
      v[i] = widen(x[i]);
      squares += v[i] * v[i];
    }
  }
  return squares;
}

template <class T>
void norm(Rows<const T> x, Rows<const T> z, const void* weight_, Rows<T> out, Shape shape, i64 threads) {
  using W = wide<T>;
  auto weight = static_cast<const W*>(weight_);
  i64 blocks = blocks_of(shape.rows, BLOCK), n = shape.group;
  parallel(blocks, threads, [=](i64 block) {
    std::vector<W> v(n);
    auto [begin, end] = block_of(shape.rows, block, blocks);
    for (i64 row = begin; row < end; row++)
      for (i64 c = 0; c < shape.channels; c += n) {
        W scale = shape.scale(gated(n, x.at(row, c), z.at(row, c), v.data()));
        T* y = out.at(row, c);
#pragma omp simd
        for (i64 i = 0; i < n; i++) narrow(v[i] * scale * weight[c + i], y[i]);
      }
  });
}

// dv = scale (weight grad - v scale^2 mean(v weight grad)), and with it the weight's gradient; dv replaces v.
template <class T, class W>
void norm_group_grad(const Shape& shape, W squares, const W* weight, const T* grad, W* v, W* dweight) {
  i64 n = shape.group;
  W dot = 0;
#pragma omp simd reduction(+ : dot)
  for (i64 i = 0; i < n; i++) dot += v[i] * (weight[i] * widen(grad[i]));
  W scale = shape.scale(squares), factor = dot / W(n) * scale * scale;
#pragma omp simd
  for (i64 i = 0; i < n; i++) {
    W g = widen(grad[i]);
    dweight[i] += g * (v[i] * scale);
    v[i] = scale * (weight[i] * g - v[i] * factor);
  }
}

// Through v = x silu(z) to dx and dz.
template <class T, class W>
void gate_grad(i64 n, const W* dv, const T* x, const T* z, T* dx, T* dz) {
  if (z) {
#pragma omp simd
    for (i64 i = 0; i < n; i++) {
      W gate = widen(z[i]), s = sigmoid(gate);
      narrow(dv[i] * widen(x[i]) * silu_slope(gate, s), dz[i]);
      narrow(dv[i] * (gate * s), dx[i]);
    }
  } else {
#pragma omp simd
    for (i64 i = 0; i < n; i++) narrow(dv[i], dx[i]);
  }
}

template <class T>
void norm_grad(Rows<const T> x, Rows<const T> z, const void* weight_, Rows<const T> grad, Rows<T> dx, Rows<T> dz,
               void* dweight, Shape shape, i64 threads) {
  using W = wide<T>;
  auto weight = static_cast<const W*>(weight_);
  i64 blocks = blocks_of(shape.rows, BLOCK), n = shape.group;
  std::vector<W> partial(blocks * shape.channels);
  parallel(blocks, threads, [&](i64 block) {
    std::vector<W> v(n), sums(shape.channels);  // of this thread: those of two blocks would share cache lines
    auto [begin, end] = block_of(shape.rows, block, blocks);
    for (i64 row = begin; row < end; row++)
      for (i64 c = 0; c < shape.channels; c += n) {
        W squares = gated(n, x.at(row, c), z.at(row, c), v.data());
        norm_group_grad(shape, squares, weight + c, grad.at(row, c), v.data(), &sums[c]);
        gate_grad(n, v.data(), x.at(row, c), z.at(row, c), dx.at(row, c), dz.at(row, c));
      }
    std::copy(sums.begin(), sums.end(), &partial[block * shape.channels]);
  });
  sum_blocks(partial, blocks, shape.channels, static_cast<W*>(dweight), threads);
}

}  // namespace

extern "C" {

// x, z (or null) and out [rows, channels] with row strides in elements and contiguous channels; weight [channels] in
// the wide type; group, the channels that share one scale, divides channels.
void norm_forward(i64 dtype, const void* x, i64 x_row, const void* z, i64 z_row, const void* weight, void* out,
                  i64 out_row, i64 rows, i64 channels, i64 group, double eps, i64 threads) {
  DISPATCH(dtype, norm, {x, x_row}, {z, z_row}, weight, {out, out_row}, {rows, channels, group, eps}, threads);
}

// The gradients, of the shapes and types of their tensors; the scale is computed again. dz is null where z is.
void norm_backward(i64 dtype, const void* x, i64 x_row, const void* z, i64 z_row, const void* weight, const void* grad,
                   i64 grad_row, void* dx, i64 dx_row, void* dz, i64 dz_row, void* dweight, i64 rows, i64 channels,
                   i64 group, double eps, i64 threads) {
  DISPATCH(dtype, norm_grad, {x, x_row}, {z, z_row}, weight, {grad, grad_row}, {dx, dx_row}, {dz, dz_row}, dweight,
           {rows, channels, group, eps}, threads);
}
}
