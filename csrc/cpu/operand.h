// The operands of products: maps, or sums or differences of two maps, and how their rows are read.
#pragma once

#include "vectors.h"

namespace fsp::cpu::FSP_VARIANT {

// A matrix in memory. Strides count elements.
struct View {
  const char* data;
  int64_t row, column;
  Scalar scalar;

  View transposed() const { return {data, column, row, scalar}; }
  View from(int64_t i, int64_t j) const {
    return {data + (i * row + j * column) * size_of(scalar), row, column, scalar};
  }
  template <class T>
  const T* at(int64_t i, int64_t j) const {
    return reinterpret_cast<const T*>(data) + i * row + j * column;
  }
  bool is_fp32_row() const { return scalar == Scalar::fp32 && column == 1; }
  bool columns_adjoin() const { return column == 1 || (row != 1 && column <= row); }
};

// Whether the positions of a map adjoin in memory, not its channels.
inline bool positions_adjoin(const Tensor& x) {
  return View{x.address, x.row, x.column, x.scalar}.columns_adjoin();
}

// view + sign * other; the sign is -1, 0 or 1.
struct Operand {
  View view, other;
  float sign;

  Operand transposed() const { return {view.transposed(), other.transposed(), sign}; }
  Operand from(int64_t i, int64_t j) const { return {view.from(i, j), other.from(i, j), sign}; }
};

inline Operand only(View view) { return {view, view, 0}; }
inline Operand difference(View view, View other) { return {view, other, -1}; }
inline Operand sum(View view, View other) { return {view, other, 1}; }

constexpr int64_t kSpan = 512;  // elements of a row that are read at a time, to stay in cache
constexpr int64_t kAhead = 4;   // rows that are fetched from memory ahead of their use

inline void combine(const float* x, const float* y, float sign, float* to, int64_t count) {
  int64_t k = 0;
  for (; k + kLanes<float> <= count; k += kLanes<float>) {
    store(to + k, load(x + k) + sign * load(y + k));
  }
  for (; k < count; ++k) to[k] = x[k] + sign * y[k];
}

__attribute__((noinline)) inline const float* read_any_row(const Operand& x, int64_t i, int64_t j,
                                                           int64_t count, float* buffer) {
  const View here = x.view.from(i, j);
  const float* row = read(here.data, here.scalar, here.column, count, buffer);
  if (x.sign == 0) return row;
  const View there = x.other.from(i, j);
  float other[kSpan];
  combine(row, read(there.data, there.scalar, there.column, count, other), x.sign, buffer, count);
  return buffer;
}

// Row `i` of an operand from column `j` on, in place if it is there as fp32, else in `buffer`. Rows
// of channels-last maps can be as short as 16, so the usual case is inline.
inline const float* read_row(const Operand& x, int64_t i, int64_t j, int64_t count, float* buffer) {
  if (!x.view.is_fp32_row() || !x.other.is_fp32_row()) {
    return read_any_row(x, i, j, count, buffer);
  }
  const float* row = x.view.at<float>(i, j);
  if (x.sign == 0) return row;
  combine(row, x.other.at<float>(i, j), x.sign, buffer, count);
  return buffer;
}

// Fetch a row that will be read soon. Where rows are short, the next one is near in memory, and the
// processor fetches it by itself.
inline void prefetch(const View& x, int64_t i, int64_t j, int64_t count) {
  const int64_t bytes = count * size_of(x.scalar);
  if (x.column != 1 || bytes < 256) return;
  const char* row = x.from(i, j).data;
  for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(row + byte, 0, 2);
}
inline void prefetch(const Operand& x, int64_t i, int64_t j, int64_t count) {
  prefetch(x.view, i, j, count);
  if (x.sign != 0) prefetch(x.other, i, j, count);
}

inline void convert(const float* from, double* to, int64_t count) {
  for (int64_t k = 0; k < count; ++k) to[k] = from[k];
}
inline void convert(const float* from, float* to, int64_t count) {
  if (from == to) return;
  int64_t k = 0;
  for (; k + kLanes<float> <= count; k += kLanes<float>) store(to + k, load(from + k));
  for (; k < count; ++k) to[k] = from[k];
}

// An operand as lines, which are copied one after the other. A line is a row. Twos of bf16 adjoin
// along the sum of a product; if that goes across the rows, a line is two rows.
template <class T>
struct Lines {
  Operand x;
  bool across;
  int64_t length;  // of the sum, in elements

  // `count` Ts of line `i` from the T `j` on, in place if they are there as such, else in `buffer`.
  const Source<T>* read(int64_t i, int64_t j, int64_t count, Source<T>* buffer) const {
    return read_row(x, i, j, count, buffer);
  }
  void prefetch(int64_t i, int64_t j, int64_t count) const {
    FSP_VARIANT::prefetch(x, i, j, count);
  }
};

}  // namespace fsp::cpu::FSP_VARIANT
