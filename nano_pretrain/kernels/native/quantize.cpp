// Quantisation to an 8-bit float: values are multiplied by the scale of their tile and rounded to E4M3 or E5M2; and what
// is lost by it. Written are the rounded values, divided by the scale again where the product wants them so.
//
// Scales, and what becomes of infinities and NaN, are those of Transformer Engine's CUDA kernels.
#include <cfenv>
#include <limits>

#include "common.h"

namespace {

// Codes of precision/quantize.py.
enum Tile { ROW, COLUMN, BLOCK, TENSOR };
enum { E4M3, E5M2 };

constexpr i64 SIDE = 128;
constexpr i64 TASK_COLUMNS = 8 * SIDE;

inline std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float float_of(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// A format of MANTISSA explicit bits whose smallest normal number is 2^LOWEST. From BEYOND on, values are nearer to the
// number after LARGEST, which it does not have.
template <int MANTISSA, int LOWEST, int LARGEST, int BEYOND>
struct Format {
  static constexpr float largest = LARGEST, beyond = BEYOND;

  // The nearest number of the format, ties to even, at most the largest; NaN stays NaN.
  static float round(float value) {
    float magnitude = std::fabs(value);
    magnitude = largest < magnitude ? largest : magnitude;
    std::uint32_t exponent = std::max(bits_of(magnitude) & 0x7f800000u, std::uint32_t(LOWEST + 127) << 23);
    // Added to 2^(23 - MANTISSA) times the value's power of two, FP32 has room for MANTISSA bits and rounds the others.
    float shift = float_of(exponent + (std::uint32_t(23 - MANTISSA) << 23));
    return float_of(bits_of((magnitude + shift) - shift) | (bits_of(value) & 0x80000000u));
  }
};

// Largest finite number of a storage type.
inline float largest_of(float) { return std::numeric_limits<float>::max(); }
inline float largest_of(bf16) { return float_of(0x7f7f0000u); }

// From the largest magnitude of a tile to its scale (recipe_common.cuh).
struct Scaling {
  float largest, in_place_of_infinity;
  std::uint32_t kept_bits;

  float operator()(float magnitude) const {
    float scale = largest / magnitude;
    scale = scale > std::numeric_limits<float>::max() ? in_place_of_infinity : scale;
    scale = float_of(bits_of(scale) & kept_bits);
    return magnitude == 0.f || magnitude > std::numeric_limits<float>::max() ? 1.f : scale;
  }
};

// Scales of the columns of a tile, or of its part of SIDE columns, and their inverses.
struct Scales {
  float scale[SIDE], inverse[SIDE];

  void set(float value) {
    std::fill(scale, scale + SIDE, value);
    std::fill(inverse, inverse + SIDE, 1.f / value);
  }
};

template <class T>
struct Matrix {
  T* data;
  i64 stride, rows, columns;

  T* at(i64 row, i64 column) const { return data + row * stride + column; }
};

// A part of at most SIDE x SIDE.
struct Part {
  i64 row, column, height, width;
};

// found[column] = largest magnitude; NaN counts as none, as for CUDA's fmaxf.
template <class T>
void magnitudes(Matrix<const T> x, Part part, float* found) {
  std::fill(found, found + SIDE, 0.f);
  for (i64 r = 0; r < part.height; r++) {
    const T* row = x.at(part.row + r, part.column);
#pragma omp simd
    for (i64 c = 0; c < part.width; c++) {
      float magnitude = std::fabs(widen(row[c]));
      found[c] = found[c] < magnitude ? magnitude : found[c];
    }
  }
}

template <class T>
float largest_magnitude(Matrix<const T> x, Part part) {
  float found[SIDE], largest = 0;
  magnitudes(x, part, found);
#pragma omp simd reduction(max : largest)
  for (i64 c = 0; c < SIDE; c++) largest = largest < found[c] ? found[c] : largest;
  return largest;
}

template <class T>
void set_scales(Matrix<const T> x, Part part, Tile tile, Scaling scaling, Scales& scales) {
  if (tile != COLUMN) return scales.set(scaling(largest_magnitude(x, part)));
  float found[SIDE];
  magnitudes(x, part, found);
#pragma omp simd
  for (i64 c = 0; c < SIDE; c++) {
    scales.scale[c] = scaling(found[c]);
    scales.inverse[c] = 1.f / scales.scale[c];
  }
}

// body(task, part) for each part of `height` rows and SIDE columns. Denormals are treated as the calling thread treats
// them, which those of the pool may have been told otherwise.
template <class Body>
void for_each_part(i64 rows, i64 columns, i64 height, i64 threads, Body body) {
  std::fenv_t callers;
  std::fegetenv(&callers);
  i64 across = (columns + TASK_COLUMNS - 1) / TASK_COLUMNS, down = (rows + SIDE - 1) / SIDE;
  parallel(across * down, threads, [&](i64 task) {
    std::fesetenv(&callers);
    i64 top = task / across * SIDE, left = task % across * TASK_COLUMNS;
    i64 bottom = std::min(rows, top + SIDE), right = std::min(columns, left + TASK_COLUMNS);
    for (i64 row = top; row < bottom; row += height)
      for (i64 column = left; column < right; column += SIDE)
        body(task, Part{row, column, std::min(height, bottom - row), std::min(SIDE, right - column)});
  });
}

i64 tasks_of(i64 rows, i64 columns) {
  return (rows + SIDE - 1) / SIDE * ((columns + TASK_COLUMNS - 1) / TASK_COLUMNS);
}

// body(task, part, scales) for each part with the scales of its tile.
template <class T, class Body>
void for_each_tile(Matrix<const T> x, Tile tile, Scaling scaling, i64 threads, Body body) {
  Scales of_tensor;
  if (tile == TENSOR) {
    std::vector<float> found(tasks_of(x.rows, x.columns), 0.f);
    for_each_part(x.rows, x.columns, SIDE, threads,
                  [&](i64 task, Part part) { found[task] = std::max(found[task], largest_magnitude(x, part)); });
    of_tensor.set(scaling(*std::max_element(found.begin(), found.end())));
  }
  for_each_part(x.rows, x.columns, tile == ROW ? 1 : SIDE, threads, [&](i64 task, Part part) {
    if (tile == TENSOR) return body(task, part, of_tensor);
    Scales scales;
    set_scales(x, part, tile, scaling, scales);
    body(task, part, scales);
  });
}

// The inverses of a part's scales into the matrix of those of all tiles.
void write_inverses(const Scales& scales, Part part, Tile tile, float* inverses, i64 columns) {
  i64 across = (columns + SIDE - 1) / SIDE;
  if (tile == TENSOR)
    inverses[0] = scales.inverse[0];
  else if (tile == COLUMN)
    std::copy(scales.inverse, scales.inverse + part.width, inverses + part.row / SIDE * columns + part.column);
  else
    inverses[(tile == ROW ? part.row : part.row / SIDE) * across + part.column / SIDE] = scales.inverse[0];
}

template <class F, class T, class Out>
void quantize(Matrix<const T> x, Matrix<Out> out, float* inverses, Tile tile, Scaling scaling, bool scale_back,
              i64 threads) {
  for_each_tile(x, tile, scaling, threads, [=](i64, Part part, const Scales& scales) {
    write_inverses(scales, part, tile, inverses, x.columns);
    for (i64 r = 0; r < part.height; r++) {
      const T* from = x.at(part.row + r, part.column);
      Out* to = out.at(part.row + r, part.column);
#pragma omp simd
      for (i64 c = 0; c < part.width; c++) {
        float rounded = F::round(widen(from[c]) * scales.scale[c]);
        narrow(scale_back ? rounded * scales.inverse[c] : rounded, to[c]);
      }
    }
  });
}

struct Sums {
  double nonzero = 0, flushed = 0, saturated = 0, not_finite = 0, error = 0, squares = 0;

  void operator+=(const Sums& other) {
    nonzero += other.nonzero, flushed += other.flushed, saturated += other.saturated;
    not_finite += other.not_finite, error += other.error, squares += other.squares;
  }
};

template <class F, class T>
Sums sums_of_row(i64 n, const T* x, const Scales& scales) {
  float nonzero = 0, flushed = 0, saturated = 0, not_finite = 0;
  double error = 0, squares = 0;
#pragma omp simd reduction(+ : nonzero, flushed, saturated, not_finite, error, squares)
  for (i64 c = 0; c < n; c++) {
    float value = widen(x[c]), scaled = value * scales.scale[c], rounded = F::round(scaled);
    double lost = double(value) - double(rounded) * scales.inverse[c];
    nonzero += value != 0.f;
    flushed += (value != 0.f) & (rounded == 0.f);
    saturated += std::fabs(scaled) > F::beyond;
    not_finite += !(std::fabs(value) <= std::numeric_limits<float>::max());
    error += lost * lost;
    squares += double(value) * value;
  }
  return {nonzero, flushed, saturated, not_finite, error, squares};
}

template <class F, class T>
Sums statistics(Matrix<const T> x, Tile tile, Scaling scaling, i64 threads) {
  std::vector<Sums> found(tasks_of(x.rows, x.columns));
  for_each_tile(x, tile, scaling, threads, [&](i64 task, Part part, const Scales& scales) {
    for (i64 r = 0; r < part.height; r++)
      found[task] += sums_of_row<F>(part.width, x.at(part.row + r, part.column), scales);
  });
  Sums all;
  for (const Sums& of_task : found) all += of_task;
  return all;
}

// body(element) with an element of the dtype.
template <class Body>
void with_dtype(i64 dtype, Body body) {
  if (dtype == FLOAT)
    body(float{});
  else
    body(bf16{});
}

template <class Body>
void with_format(i64 format, Body body) {
  if (format == E4M3)
    body(Format<3, -6, 448, 464>{});
  else
    body(Format<2, -14, 57344, 61440>{});
}

template <class F, class T>
Scaling scaling_of(Tile tile, i64 power_of_two) {
  // A tensor's scale is made of an FP32 maximum whatever its type (current_scaling.cu).
  float in_place_of_infinity = tile == TENSOR ? largest_of(float{}) : largest_of(T{});
  return {F::largest, in_place_of_infinity, power_of_two ? 0xff800000u : 0xffffffffu};
}

}  // namespace

extern "C" {

// x [rows, columns] of FP32 or BF16 with contiguous columns; out, dense, of either type: x times its scale, rounded, and
// with `scale_back` times the inverse scale; inverses, dense, has one for each tile.
void fp8_quantize(i64 dtype, i64 out_dtype, i64 format, const void* x, i64 x_row, void* out, float* inverses, i64 rows,
                  i64 columns, i64 tile, i64 power_of_two, i64 scale_back, i64 threads) {
  with_dtype(dtype, [=](auto element) {
    with_dtype(out_dtype, [=](auto result) {
      with_format(format, [=](auto f) {
        using T = decltype(element);
        using Out = decltype(result);
        using F = decltype(f);
        quantize<F, T, Out>({static_cast<const T*>(x), x_row, rows, columns},
                            {static_cast<Out*>(out), columns, rows, columns}, inverses, Tile(tile),
                            scaling_of<F, T>(Tile(tile), power_of_two), scale_back, threads);
      });
    });
  });
}

// out[6]: values that are not zero; of these, those that become zero; values that saturate; those that are infinite or
// NaN; sum of the squares of the errors, and of the values.
void fp8_statistics(i64 dtype, i64 format, const void* x, i64 x_row, double* out, i64 rows, i64 columns, i64 tile,
                    i64 power_of_two, i64 threads) {
  with_dtype(dtype, [=](auto element) {
    with_format(format, [=](auto f) {
      using T = decltype(element);
      using F = decltype(f);
      Sums all = statistics<F, T>({static_cast<const T*>(x), x_row, rows, columns}, Tile(tile),
                                  scaling_of<F, T>(Tile(tile), power_of_two), threads);
      std::copy_n(&all.nonzero, 6, out);
    });
  });
}
}
