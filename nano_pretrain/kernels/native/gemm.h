// Products of small tiles that lie in a core's cache: the building block of the scan and of attention.
//
// Tiles are dense and row-major in the wide type, padded with zeros so that rows are a multiple of ROWS and columns of
// a vector; there are no tails.
#pragma once

#include <type_traits>
#include <utility>

#include "common.h"

#if defined(__AVX512F__)
constexpr i64 VECTOR_BYTES = 64;
#elif defined(__AVX__)
constexpr i64 VECTOR_BYTES = 32;
#else
constexpr i64 VECTOR_BYTES = 16;
#endif

template <class W>
constexpr i64 LANES = VECTOR_BYTES / i64(sizeof(W));

// Rows of C that are computed at a time; with two vectors a row, 16 accumulators hide the latency of the multiply-add.
constexpr i64 ROWS = 8;

template <class W>
struct vector_of {
  typedef W type __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(W)), may_alias));
};
template <class W>
using vector = typename vector_of<W>::type;

inline i64 round_up(i64 value, i64 multiple) { return (value + multiple - 1) / multiple * multiple; }

// Columns that a tile of `count` logical columns occupies.
template <class W>
inline i64 padded(i64 count) {
  return round_up(count, std::max<i64>(LANES<W>, ROWS));
}

// Memory of this thread for the tiles of one task, kept from task to task; it begins at a cache line.
template <class W>
inline W* tile_memory(i64 count) {
  constexpr std::uintptr_t LINE = 64;
  static thread_local std::vector<W> memory;
  if (memory.size() < count + LINE / sizeof(W)) memory.resize(count + LINE / sizeof(W));
  return reinterpret_cast<W*>((reinterpret_cast<std::uintptr_t>(memory.data()) + LINE - 1) / LINE * LINE);
}

template <class W, int VECTORS>
inline void gemm_block(i64 k, const W* a, i64 a_row, i64 a_column, const W* b, i64 b_row, W* c, i64 c_row, bool add) {
  using V = vector<W>;
  V sum[ROWS][VECTORS] = {};
  for (i64 l = 0; l < k; l++) {
    V row[VECTORS];
    for (int j = 0; j < VECTORS; j++) row[j] = *reinterpret_cast<const V*>(b + l * b_row + j * LANES<W>);
    for (i64 i = 0; i < ROWS; i++) {
      W factor = a[i * a_row + l * a_column];
      for (int j = 0; j < VECTORS; j++) sum[i][j] += factor * row[j];
    }
  }
  for (i64 i = 0; i < ROWS; i++)
    for (int j = 0; j < VECTORS; j++) {
      V& out = *reinterpret_cast<V*>(c + i * c_row + j * LANES<W>);
      out = add ? out + sum[i][j] : sum[i][j];
    }
}

// C[m, n] = A[m, k] B[k, n]; with `add` that sum is added to C, rounded once. Element (i, l) of A is
// a[i a_row + l a_column], so that A may be a transposed tile; B and C have rows of b_row and c_row elements. m is a
// multiple of ROWS, n of LANES.
template <class W>
inline void gemm(i64 m, i64 n, i64 k, const W* a, i64 a_row, i64 a_column, const W* b, i64 b_row, W* c, i64 c_row,
                 bool add) {
  for (i64 i = 0; i < m; i += ROWS) {
    i64 j = 0;
    for (; j + 2 * LANES<W> <= n; j += 2 * LANES<W>)
      gemm_block<W, 2>(k, a + i * a_row, a_row, a_column, b + j, b_row, c + i * c_row + j, c_row, add);
    if (j < n) gemm_block<W, 1>(k, a + i * a_row, a_row, a_column, b + j, b_row, c + i * c_row + j, c_row, add);
  }
}

namespace transposing {

// Numbers of lanes, as `__builtin_shuffle` takes them.
template <class W>
struct lanes_of {
  using number = std::conditional_t<sizeof(W) == 4, std::int32_t, std::int64_t>;
  typedef number type __attribute__((vector_size(VECTOR_BYTES)));
};

// Exchanges the off-diagonal blocks of size STEP of two rows.
template <class W, int STEP, std::size_t... LANE>
inline void exchange(vector<W>& upper, vector<W>& lower, std::index_sequence<LANE...>) {
  constexpr int L = int(LANES<W>);
  using Lanes = typename lanes_of<W>::type;
  const Lanes from_upper = {((LANE & STEP) ? int(LANE) - STEP + L : int(LANE))...};
  const Lanes from_lower = {((LANE & STEP) ? int(LANE) + L : int(LANE) + STEP)...};
  vector<W> first = __builtin_shuffle(upper, lower, from_upper);
  lower = __builtin_shuffle(upper, lower, from_lower);
  upper = first;
}

template <class W, int STEP>
inline void stages(vector<W>* rows) {
  if constexpr (STEP > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES<W>; i++)
      if (!(i & STEP)) exchange<W, STEP>(rows[i], rows[i + STEP], std::make_index_sequence<LANES<W>>{});
    stages<W, STEP / 2>(rows);
  }
}

}  // namespace transposing

// out[columns, rows] = in[rows, columns] transposed, a square of LANES x LANES at a time (Eklundh 1972). Rows are
// a multiple of LANES, columns go on to the next one.
template <class W>
inline void transpose(i64 rows, i64 columns, const W* in, i64 in_row, W* out, i64 out_row) {
  using V = vector<W>;
  for (i64 i = 0; i < rows; i += LANES<W>)
    for (i64 j = 0; j < columns; j += LANES<W>) {
      V square[LANES<W>];
      for (i64 k = 0; k < LANES<W>; k++) square[k] = *reinterpret_cast<const V*>(in + (i + k) * in_row + j);
      transposing::stages<W, LANES<W> / 2>(square);
      for (i64 k = 0; k < LANES<W>; k++) *reinterpret_cast<V*>(out + (j + k) * out_row + i) = square[k];
    }
}
