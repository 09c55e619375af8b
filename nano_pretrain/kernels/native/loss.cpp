// Cross-entropy over one rank's columns of the vocabulary: the sum of the softmax, and the gradient over the logits.
#include <limits>

#include "common.h"

namespace {

// Columns that are summed by themselves, so that rounding does not grow with the vocabulary.
constexpr i64 PIECE = 1024;

// body(row) for each row.
template <class Body>
void each_row(i64 rows, i64 threads, Body body) {
  i64 blocks = blocks_of(rows, 1);
  parallel(blocks, threads, [&](i64 block) {
    Range range = block_of(rows, block, blocks);
    for (i64 row = range.begin; row < range.end; row++) body(row);
  });
}

// NaN is passed over here, and makes the sum of exponentials NaN.
template <class T, class W = wide<T>>
W largest(const T* x, i64 count) {
  W peak = -std::numeric_limits<W>::infinity();
#pragma omp simd reduction(max : peak)
  for (i64 i = 0; i < count; i++) {
    W value = widen(x[i]);
    peak = value > peak ? value : peak;
  }
  return peak;
}

template <class T, class W = wide<T>>
W sum_of_exponentials(const T* x, i64 count, W peak) {
  W total = 0;
  for (i64 begin = 0; begin < count; begin += PIECE) {
    i64 end = std::min(count, begin + PIECE);
    W sum = 0;
#pragma omp simd reduction(+ : sum)
    for (i64 i = begin; i < end; i++) sum += exponential(widen(x[i]) - peak);
    total += sum;
  }
  return total;
}

template <class T>
void sums(const void* logits_, void* peaks_, void* totals_, i64 rows, i64 columns, i64 valid, i64 threads) {
  using W = wide<T>;
  auto logits = static_cast<const T*>(logits_);
  auto peaks = static_cast<W*>(peaks_);
  auto totals = static_cast<W*>(totals_);
  each_row(rows, threads, [=](i64 row) {
    peaks[row] = largest(logits + row * columns, valid);
    totals[row] = sum_of_exponentials(logits + row * columns, valid, peaks[row]);
  });
}

// x becomes `gradient` times its softmax, less `gradient` at the label.
template <class T, class W = wide<T>>
void row_gradient(T* x, i64 label, W peak, W total, W gradient, i64 columns, i64 valid) {
  bool here = label >= 0 && label < valid;
  W factor = gradient / total;
  W at_label = here ? exponential(widen(x[label]) - peak) * factor - gradient : W(0);
#pragma omp simd
  for (i64 i = 0; i < valid; i++) narrow(exponential(widen(x[i]) - peak) * factor, x[i]);
  if (here) narrow(at_label, x[label]);
  std::fill(x + valid, x + columns, T{});
}

template <class T>
void gradients(void* logits_, const i64* labels, const void* peaks_, const void* totals_, const void* gradients_,
               i64 rows, i64 columns, i64 valid, i64 threads) {
  using W = wide<T>;
  auto logits = static_cast<T*>(logits_);
  auto peaks = static_cast<const W*>(peaks_);
  auto totals = static_cast<const W*>(totals_);
  auto gradients = static_cast<const W*>(gradients_);
  each_row(rows, threads, [=](i64 row) {
    row_gradient(logits + row * columns, labels[row], peaks[row], totals[row], gradients[row], columns, valid);
  });
}

}  // namespace

extern "C" {

// The largest of the first `valid` logits of each row, and their sum of exp(logit - largest).
void cross_entropy_sums(i64 dtype, const void* logits, void* peaks, void* totals, i64 rows, i64 columns, i64 valid,
                        i64 threads) {
  DISPATCH(dtype, sums, logits, peaks, totals, rows, columns, valid, threads);
}

// Over the logits: (softmax - 1 at the label) times the row's gradient, and 0 from column `valid` on. A label outside
// [0, valid) is another rank's.
void cross_entropy_backward(i64 dtype, void* logits, const i64* labels, const void* peaks, const void* totals,
                            const void* grad, i64 rows, i64 columns, i64 valid, i64 threads) {
  DISPATCH(dtype, gradients, logits, labels, peaks, totals, grad, rows, columns, valid, threads);
}
}
