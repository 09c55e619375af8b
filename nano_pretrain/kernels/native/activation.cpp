// Squared ReLU and the SiLU gate, each one pass over memory.
#include "common.h"

namespace {

// body(begin, end) over pieces of `count` elements.
template <class Body>
void pieces(i64 count, i64 threads, Body body) {
  constexpr i64 PIECE = 16384;
  parallel((count + PIECE - 1) / PIECE, threads,
           [=](i64 piece) { body(piece * PIECE, std::min(count, (piece + 1) * PIECE)); });
}

template <class T>
void squared_relu(const void* x_, void* out_, i64 count, i64 threads) {
  auto x = static_cast<const T*>(x_);
  auto out = static_cast<T*>(out_);
  pieces(count, threads, [=](i64 begin, i64 end) {
#pragma omp simd
    for (i64 i = begin; i < end; i++) {
      auto v = widen(x[i]);
      v = v < 0 ? 0 : v;  // NaN stays NaN
      narrow(v * v, out[i]);
    }
  });
}

template <class T>
void squared_relu_grad(const void* x_, const void* grad_, void* dx_, i64 count, i64 threads) {
  auto x = static_cast<const T*>(x_);
  auto grad = static_cast<const T*>(grad_);
  auto dx = static_cast<T*>(dx_);
  pieces(count, threads, [=](i64 begin, i64 end) {
#pragma omp simd
    for (i64 i = begin; i < end; i++) {
      auto v = widen(x[i]);
      v = v < 0 ? 0 : v;
      narrow(2 * v * widen(grad[i]), dx[i]);
    }
  });
}

// body(b, t) for every token.
template <class Body>
void tokens(i64 batch, i64 length, i64 threads, Body body) {
  i64 rows = batch * length, blocks = blocks_of(rows, 16);
  parallel(blocks, threads, [=](i64 block) {
    auto [begin, end] = block_of(rows, block, blocks);
    for (i64 row = begin; row < end; row++) body(row / length, row % length);
  });
}

template <class T>
void gate(Tokens<const T> y_, Tokens<const T> z_, Tokens<T> out_, i64 batch, i64 length, i64 channels, i64 threads) {
  tokens(batch, length, threads, [=](i64 b, i64 t) {
    const T *y = y_(b, t), *z = z_(b, t);
    T* out = out_(b, t);
#pragma omp simd
    for (i64 i = 0; i < channels; i++) {
      auto v = widen(z[i]);
      narrow(widen(y[i]) * (v * sigmoid(v)), out[i]);
    }
  });
}

template <class T>
void gate_grad(Tokens<const T> y_, Tokens<const T> z_, Tokens<const T> grad_, Tokens<T> dy_, Tokens<T> dz_, i64 batch,
               i64 length, i64 channels, i64 threads) {
  tokens(batch, length, threads, [=](i64 b, i64 t) {
    const T *y = y_(b, t), *z = z_(b, t), *grad = grad_(b, t);
    T *dy = dy_(b, t), *dz = dz_(b, t);
#pragma omp simd
    for (i64 i = 0; i < channels; i++) {
      auto v = widen(z[i]);
      auto g = widen(grad[i]);
      auto s = sigmoid(v);
      narrow(g * widen(y[i]) * silu_slope(v, s), dz[i]);
      narrow(g * (v * s), dy[i]);
    }
  });
}

}  // namespace

extern "C" {

// out = max(x, 0)^2 over `count` contiguous elements.
void squared_relu_forward(i64 dtype, const void* x, void* out, i64 count, i64 threads) {
  DISPATCH(dtype, squared_relu, x, out, count, threads);
}

// dx = 2 max(x, 0) grad.
void squared_relu_backward(i64 dtype, const void* x, const void* grad, void* dx, i64 count, i64 threads) {
  DISPATCH(dtype, squared_relu_grad, x, grad, dx, count, threads);
}

// out = y silu(z); tensors [batch, length, channels], each with its batch and token stride in elements and contiguous
// channels.
void gate_forward(i64 dtype, const void* y, i64 y_batch, i64 y_token, const void* z, i64 z_batch, i64 z_token,
                  void* out, i64 out_batch, i64 out_token, i64 batch, i64 length, i64 channels, i64 threads) {
  DISPATCH(dtype, gate, {y, y_batch, y_token}, {z, z_batch, z_token}, {out, out_batch, out_token}, batch, length,
           channels, threads);
}

// dy = grad silu(z), dz = grad y silu'(z).
void gate_backward(i64 dtype, const void* y, i64 y_batch, i64 y_token, const void* z, i64 z_batch, i64 z_token,
                   const void* grad, i64 grad_batch, i64 grad_token, void* dy, i64 dy_batch, i64 dy_token, void* dz,
                   i64 dz_batch, i64 dz_token, i64 batch, i64 length, i64 channels, i64 threads) {
  DISPATCH(dtype, gate_grad, {y, y_batch, y_token}, {z, z_batch, z_token}, {grad, grad_batch, grad_token},
           {dy, dy_batch, dy_token}, {dz, dz_batch, dz_token}, batch, length, channels, threads);
}
}
