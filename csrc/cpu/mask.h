// Masks: the positions of a sample that count become all positions of its matrices. So the formulas
// in loss.h need no masks, and positions that do not count cost no products.
//
// If the positions that count adjoin, as in a padded sequence, the maps are read in place. Else
// these positions are copied, one beside the other. Gradients are written one beside the other into
// their own memory, and are then moved to their places.
#pragma once

#include "product.h"

namespace fsp::cpu::FSP_VARIANT {

// The positions of a sample that count: `count` of those in [first, end).
struct Counted {
  int64_t first, end, count;
  // Where they do not adjoin: their distances from `first` in order, then those of the others.
  const int64_t* places;

  bool adjoin() const { return count == end - first; }
  // A sample without any takes one position, where its maps are zero.
  int64_t positions() const { return larger(count, 1); }
};

// Those where the mask (K,) is not 0; all of them without a mask.
inline Counted counted(const uint8_t* mask, int64_t positions, Scratch& scratch) {
  if (!mask) return {0, positions, positions, nullptr};
  int64_t first = 0, end = positions, count = 0;
  while (end > 0 && !mask[end - 1]) --end;
  while (first < end && !mask[first]) ++first;
  for (int64_t k = first; k < end; ++k) count += mask[k] != 0;
  if (count == end - first) return {first, end, count, nullptr};
  int64_t* places = take<int64_t>(scratch, end - first);
  int64_t *next = places, *other = places + count;
  for (int64_t k = first; k < end; ++k) *(mask[k] ? next : other)++ = k - first;
  return {first, end, count, places};
}

// A sample of a map or gradient from a position on.
inline Tensor from_position(const Tensor& x, int64_t sample, int64_t position) {
  const int64_t offset = sample * x.sample + position * x.column;
  return {x.address + offset * size_of(x.scalar), 0, x.row, x.column, x.scalar};
}

// Copy `count` elements that lie apart by a stride.
template <class T>
void copy_line(T* to, int64_t to_stride, const T* from, int64_t from_stride, int64_t count) {
  if (to_stride == 1 && from_stride == 1) {
    memcpy(to, from, count * sizeof(T));
  } else {
    for (int64_t i = 0; i < count; ++i) to[i * to_stride] = from[i * from_stride];
  }
}

// Copy the positions that count, in rows of positions or of channels as in `x`. `x` starts at the
// first of them. T has the size of an element.
template <class T>
Tensor copy_counted(const Tensor& x, int64_t channels, const Counted& at, Scratch& scratch) {
  const T* from = reinterpret_cast<const T*>(x.address);
  T* copy = take<T>(scratch, channels * at.count);
  char* address = reinterpret_cast<char*>(copy);
  if (positions_adjoin(x)) {
    for (int64_t i = 0; i < channels; ++i) {
      const T* row = from + i * x.row;
      for (int64_t j = 0; j < at.count; ++j) *copy++ = row[at.places[j] * x.column];
    }
    return {address, 0, at.count, 1, x.scalar};
  }
  for (int64_t j = 0; j < at.count; ++j, copy += channels) {
    copy_line(copy, 1, from + at.places[j] * x.column, x.row, channels);
  }
  return {address, 0, 1, channels, x.scalar};
}

// A sample of a map, with the positions that count as all positions.
inline Tensor map_at(const Tensor& x, int64_t sample, int64_t channels, const Counted& at,
                     Scratch& scratch) {
  if (at.count == 0) {
    float* zero = take<float>(scratch, 1);
    *zero = 0;
    return {reinterpret_cast<char*>(zero), 0, 0, 1, x.scalar};  // one position of all channels
  }
  const Tensor found = from_position(x, sample, at.first);
  if (at.adjoin()) return found;
  const bool wide = x.scalar == Scalar::fp32;
  return (wide ? copy_counted<float> : copy_counted<uint16_t>)(found, channels, at, scratch);
}

// --- gradients -----------------------------------------------------------------------------------

template <class T>
void set_zero(T* x, int64_t stride, int64_t count) {
  if (stride == 1) {
    memset(x, 0, count * sizeof(T));
  } else {
    for (int64_t i = 0; i < count; ++i) x[i * stride] = 0;
  }
}

template <class T>
void set_zero(T* x, const Tensor& of, int64_t channels, int64_t positions) {
  if (positions_adjoin(of)) {
    for (int64_t i = 0; i < channels; ++i) set_zero(x + i * of.row, of.column, positions);
  } else {
    for (int64_t k = 0; k < positions; ++k) set_zero(x + k * of.column, of.row, channels);
  }
}

// Move the first `count` positions to their places.
template <class T>
void move_to_places(T* x, const Tensor& of, int64_t channels, const Counted& at, Scratch& scratch) {
  const int64_t span = at.end - at.first;
  if (positions_adjoin(of)) {
    T* counted_row = take<T>(scratch, at.count);
    for (int64_t i = 0; i < channels; ++i) {
      T* row = x + i * of.row;
      for (int64_t j = 0; j < at.count; ++j) counted_row[j] = row[j * of.column];
      set_zero(row, of.column, span);
      for (int64_t j = 0; j < at.count; ++j) row[at.places[j] * of.column] = counted_row[j];
    }
    return;
  }
  for (int64_t j = at.count - 1; j >= 0; --j) {  // the last first, since none moves to the left
    T *to = x + at.places[j] * of.column, *from = x + j * of.column;
    if (to != from) copy_line(to, of.row, from, of.row, channels);
  }
  for (int64_t j = at.count; j < span; ++j) {
    set_zero(x + at.places[j] * of.column, of.row, channels);
  }
}

template <class T>
void finish_gradient(const Tensor& x, int64_t sample, int64_t channels, int64_t positions,
                     const Counted& at, Scratch& scratch) {
  const auto start = [&](int64_t position) {
    return reinterpret_cast<T*>(from_position(x, sample, position).address);
  };
  if (!at.adjoin()) move_to_places(start(at.first), x, channels, at, scratch);
  set_zero(start(0), x, channels, at.first);
  set_zero(start(at.end), x, channels, positions - at.end);
}

}  // namespace fsp::cpu::FSP_VARIANT
