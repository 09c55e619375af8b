// Shared by the native CPU kernels: element types, rounding, vectors, vectorisable exponentials, fixed blocks of rows.
//
// Storage is float, bf16 or double; arithmetic is float (double for double). Results do not depend on the number of
// threads: work is divided into blocks whose borders and order of summation are fixed by the shapes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

using i64 = std::int64_t;

struct bf16 {
  std::uint16_t bits;
};

// The type that sums and products of a storage type are computed in.
template <class T>
struct wide_of {
  using type = T;
};
template <>
struct wide_of<bf16> {
  using type = float;
};
template <class T>
using wide = typename wide_of<T>::type;

inline float widen(bf16 value) {
  std::uint32_t bits = std::uint32_t(value.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
inline float widen(float value) { return value; }
inline double widen(double value) { return value; }

// Round to nearest, ties to even; NaN stays NaN (the carry of the rounding could make it infinite).
inline void narrow(float value, bf16& out) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out.bits = std::uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
inline void narrow(float value, float& out) { out = value; }
inline void narrow(double value, double& out) { out = value; }

// Whether exp(x) would be denormal, or 0.
inline bool vanishes(float x) { return x < -87.3f; }
inline bool vanishes(double x) { return x < -708.3; }

// exp(x) to about 1 ulp, in a form that compilers vectorise: 2^n times a polynomial on [-ln2/2, ln2/2] (Cephes' expf).
// Below -87.3, where the result would be denormal, 0; above 88.3, infinity; NaN stays NaN.
inline float exponential(float x) {
  float clamped = std::min(std::max(x, -87.3f), 88.7f);
  float n = (clamped * 1.44269504088896341f + 12582912.f) - 12582912.f;
  float r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  std::int32_t scale = (std::int32_t(n) + 127) << 23;
  float power;
  std::memcpy(&power, &scale, 4);
  return vanishes(x) ? 0.f : p * power;
}
inline double exponential(double x) { return std::exp(x); }

template <class W>
inline W sigmoid(W x) {
  return W(1) / (W(1) + exponential(-x));
}

// Derivative of x sigmoid(x), given sigmoid(x).
template <class W>
inline W silu_slope(W x, W sigmoid_x) {
  return sigmoid_x * (W(1) + x * (W(1) - sigmoid_x));
}

// Rows are divided into at most this many blocks for sums over rows: enough for any CPU, and independent of it.
constexpr i64 ROW_BLOCKS = 64;

struct Range {
  i64 begin, end;
};
inline Range block_of(i64 rows, i64 block, i64 blocks) { return {rows * block / blocks, rows * (block + 1) / blocks}; }

// Blocks that rows are divided into, of at least `smallest` rows where there are as many.
inline i64 blocks_of(i64 rows, i64 smallest) { return std::clamp<i64>(rows / smallest, 1, ROW_BLOCKS); }

// body(task) for each task.
template <class Body>
inline void parallel(i64 tasks, i64 threads, Body body) {
#pragma omp parallel for num_threads(std::max<i64>(1, std::min(tasks, threads))) schedule(dynamic)
  for (i64 task = 0; task < tasks; task++) body(task);
}

// out[count] = sum over blocks of partial[blocks, count].
template <class W>
inline void sum_blocks(const std::vector<W>& partial, i64 blocks, i64 count, W* out, i64 threads) {
  constexpr i64 PIECE = 1024;
  parallel((count + PIECE - 1) / PIECE, threads, [&](i64 piece) {
    i64 begin = piece * PIECE, end = std::min(count, begin + PIECE);
    std::fill(out + begin, out + end, W(0));
    for (i64 block = 0; block < blocks; block++)
      for (i64 i = begin; i < end; i++) out[i] += partial[block * count + i];
  });
}

// A tensor [batch, length, channels] of which only the last dimension is contiguous.
template <class T>
struct Tokens {
  T* data;
  i64 batch_stride, token_stride;

  template <class Void>
  Tokens(Void* data, i64 batch_stride, i64 token_stride)
      : data(static_cast<T*>(data)), batch_stride(batch_stride), token_stride(token_stride) {}
  T* operator()(i64 batch, i64 token) const { return data + batch * batch_stride + token * token_stride; }
};

// dtype codes of library.py.
enum { FLOAT = 0, BFLOAT = 1, DOUBLE = 2 };

// Calls `function<T>(...)` for the storage type of a dtype code.
#define DISPATCH(dtype, function, ...)       \
  do {                                       \
    if ((dtype) == FLOAT)                    \
      function<float>(__VA_ARGS__);          \
    else if ((dtype) == BFLOAT)              \
      function<bf16>(__VA_ARGS__);           \
    else                                     \
      function<double>(__VA_ARGS__);         \
  } while (0)
