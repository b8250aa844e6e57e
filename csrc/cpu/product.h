// Products of matrices whose operands are maps or differences of maps, in any layout and dtype.
//
// As in every fast product, operands are copied to the cache first, in the order in which they will
// be read. Here that copy also widens half precision and subtracts the teacher's map.
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
  const float* fp32(int64_t i, int64_t j) const {
    return reinterpret_cast<const float*>(data) + i * row + j * column;
  }
  bool is_fp32_row() const { return scalar == Scalar::fp32 && column == 1; }
  bool columns_adjoin() const { return column == 1 || (row != 1 && column <= row); }
};

// view + sign * other; the sign is -1, 0 or 1.
struct Operand {
  View view, other;
  float sign;

  Operand transposed() const { return {view.transposed(), other.transposed(), sign}; }
  Operand from(int64_t i, int64_t j) const { return {view.from(i, j), other.from(i, j), sign}; }
  // fp32 that a product can read where it is.
  bool ready() const { return sign == 0 && view.scalar == Scalar::fp32; }
};

inline Operand only(View view) { return {view, view, 0}; }
inline Operand difference(View view, View other) { return {view, other, -1}; }
inline Operand sum(View view, View other) { return {view, other, 1}; }

// The sum of one or two products of left (rows x length) and right (length x columns), times alpha.
struct Product {
  int64_t rows, columns, length;
  int terms;
  Operand left[2], right[2];
  float alpha;

  Product transposed() const {
    Product result{columns, rows, length, terms, {}, {}, alpha};
    for (int i = 0; i < terms; ++i) {
      result.left[i] = right[i].transposed();
      result.right[i] = left[i].transposed();
    }
    return result;
  }
};

// What a tile reads: left[i * row + l * step] and right[l * kColumns + j].
template <class T>
struct Sides {
  const T* left;
  int64_t row, step;
  const T* right;
};

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
  const float* row = x.view.fp32(i, j);
  if (x.sign == 0) return row;
  combine(row, x.other.fp32(i, j), x.sign, buffer, count);
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

// Copy an operand (rows x columns) to rows of memory that lie `stride` apart.
template <class T>
void copy_rows(const Operand& x, int64_t rows, int64_t columns, T* to, int64_t stride) {
  float buffer[kSpan];
  for (int64_t j = 0; j < columns; j += kSpan) {
    const int64_t count = smaller(kSpan, columns - j);
    for (int64_t i = 0; i < rows; ++i) {
      if (i + kAhead < rows) prefetch(x, i + kAhead, j, count);
      T* row = to + i * stride + j;
      if constexpr (sizeof(T) == sizeof(float)) {
        convert(read_row(x, i, j, count, row), row, count);
      } else {
        convert(read_row(x, i, j, count, buffer), row, count);
      }
    }
  }
}

// Copy an operand (rows x columns) to panels of kColumns columns; the last one is filled with
// zeros.
template <class T>
void copy_panels_of_rows(const Operand& x, int64_t rows, int64_t columns, T* panels) {
  constexpr int64_t width = kColumns<T>;
  static_assert(kSpan % width == 0);
  float buffer[kSpan];
  for (int64_t j = 0; j < columns; j += kSpan) {
    const int64_t count = smaller(kSpan, columns - j);
    for (int64_t i = 0; i < rows; ++i) {
      if (i + kAhead < rows) prefetch(x, i + kAhead, j, count);
      const float* row = read_row(x, i, j, count, buffer);
      T* to = panels + j * rows + i * width;
      int64_t k = 0;
      for (; k + width <= count; k += width, to += rows * width) convert(row + k, to, width);
      if (k == count) continue;
      memset(to, 0, width * sizeof(T));
      convert(row + k, to, count - k);
    }
  }
}

// The same, for an operand whose rows adjoin in memory, not its columns.
template <class T>
void copy_panels_of_columns(const Operand& x, int64_t rows, int64_t columns, T* panels) {
  constexpr int64_t width = kColumns<T>;
  constexpr int group = width < 8 ? width : 8;  // columns that are turned at a time
  const Operand turned = x.transposed();
  float buffer[8][kSpan];
  for (int64_t i = 0; i < rows; i += kSpan) {
    const int64_t span = smaller(kSpan, rows - i);
    for (int64_t j = 0; j < round_up(columns, width); j += group) {
      const float* read_columns[8];
      for (int k = 0; k < 8; ++k) {
        read_columns[k] = buffer[k];
        if (k < group && j + k < columns) {
          if (j + k + kAhead < columns) prefetch(turned, j + k + kAhead, i, span);
          read_columns[k] = read_row(turned, j + k, i, span, buffer[k]);
        } else {
          memset(buffer[k], 0, span * sizeof(float));
        }
      }
      T* to = panels + j / width * width * rows + i * width + j % width;
      int64_t l = 0;
      for (; l + 8 <= span; l += 8) {
        Eight block[8];
        for (int k = 0; k < 8; ++k) block[k] = load_eight(read_columns[k] + l);
        transpose(block);
        for (int k = 0; k < 8; ++k) {
          if constexpr (sizeof(T) == sizeof(float)) {
            static_assert(group == 8);
            store_eight(to + (l + k) * width, block[k]);
          } else {
            for (int e = 0; e < group; ++e) to[(l + k) * width + e] = block[k][e];
          }
        }
      }
      for (; l < span; ++l) {
        for (int k = 0; k < group; ++k) to[l * width + k] = read_columns[k][l];
      }
    }
  }
}

template <class T>
void copy_panels(const Operand& x, int64_t rows, int64_t columns, T* panels) {
  (x.view.columns_adjoin() ? copy_panels_of_rows<T> : copy_panels_of_columns<T>)(x, rows, columns,
                                                                                 panels);
}

// A tile of out = alpha * sum of left @ right, or out += that if `keep`.
template <class T, int rows>
__attribute__((noinline)) void compute_tile(const Sides<T>* sides, int terms, int64_t length,
                                            T alpha, bool keep, T* out, int64_t stride) {
  Vector<T> tile[rows][kColumnVectors] = {};
  for (int term = 0; term < terms; ++term) {
    const T* left = sides[term].left;
    const T* right = sides[term].right;
    const int64_t row = sides[term].row, step = sides[term].step;
    for (int64_t l = 0; l < length; ++l) {
      Vector<T> columns[kColumnVectors];
      for (int v = 0; v < kColumnVectors; ++v) columns[v] = load(right + v * kLanes<T>);
      for (int i = 0; i < rows; ++i) {
        for (int v = 0; v < kColumnVectors; ++v) tile[i][v] += left[i * row] * columns[v];
      }
      left += step;
      right += kColumns<T>;
    }
  }
  for (int i = 0; i < rows; ++i) {
    for (int v = 0; v < kColumnVectors; ++v) {
      T* to = out + i * stride + v * kLanes<T>;
      const Vector<T> x = tile[i][v] * alpha;
      store(to, keep ? load(to) + x : x);
    }
  }
}

template <class T, int most = kRows>
void tile_of(int64_t rows, const Sides<T>* sides, int terms, int64_t length, T alpha, bool keep,
             T* out, int64_t stride) {
  if constexpr (most > 1) {
    if (rows < most)
      return tile_of<T, most - 1>(rows, sides, terms, length, alpha, keep, out, stride);
  }
  compute_tile<T, most>(sides, terms, length, alpha, keep, out, stride);
}

// How a left operand was copied: columns that adjoin stay adjoining.
template <class T>
struct Left {
  const T* data;
  int64_t row, step;
};

template <class T>
int64_t left_elements(int64_t rows, int64_t length) {
  return larger(rows * (length + kLanes<T>), length * (rows + kLanes<T>));
}

template <class T>
Left<T> copy_left(const Operand& x, int64_t rows, int64_t length, T* to) {
  // One more vector a row, so that rows of 4 KiB do not share a set of the cache.
  if (x.view.columns_adjoin()) {
    const int64_t stride = length + kLanes<T>;
    copy_rows(x, rows, length, to, stride);
    return {to, stride, 1};
  }
  const int64_t stride = rows + kLanes<T>;
  copy_rows(x.transposed(), length, rows, to, stride);
  return {to, 1, stride};
}

// Bytes of copied operands: a block of the left one stays in the second-level cache while the
// panels of the right one pass by.
constexpr int64_t kLeftBytes = 256 << 10, kRightBytes = 1 << 20;

// Rows of left operands, of `length` elements together, that fit the cache.
inline int64_t rows_that_fit(int64_t rows, int64_t length) {
  const int64_t fitting = larger(kLeftBytes / (length * int64_t{sizeof(float)}), kRows);
  return round_up(smaller(fitting - fitting % kRows, rows), kRows);
}

template <class T>
T* take(Scratch& scratch, int64_t elements) {
  return static_cast<T*>(scratch.take(elements * sizeof(T)));
}

// Point `sides` to row `i` of the left operands and to a panel of the right ones.
inline void aim(Sides<float>* sides, int terms, const Left<float>* left, int64_t i,
                float* const* panels, int64_t panel) {
  for (int t = 0; t < terms; ++t) {
    sides[t] = {left[t].data + i * left[t].row, left[t].row, left[t].step, panels[t] + panel};
  }
}

// out = product, or out += product if `keep`; out has rows of `stride` elements, a multiple of
// kColumns. The sum over `length`, the positions of maps, is split into blocks that fit the cache.
inline void accumulate(const Product& p, float* out, int64_t stride, bool keep, Scratch& scratch) {
  const int64_t columns = round_up(p.columns, kColumns<float>);
  const int64_t fitting = kRightBytes / (p.terms * columns * int64_t{sizeof(float)});
  int64_t block = smaller(p.length, smaller(larger(fitting, 128), kSpan));
  block = smaller(p.length, round_up(ceil_div(p.length, ceil_div(p.length, block)), 8));
  const int64_t block_rows = rows_that_fit(p.rows, p.terms * block);
  Sides<float> sides[2];
  Left<float> left[2];
  float *copies[2], *panels[2];
  for (int t = 0; t < p.terms; ++t) {
    copies[t] = take<float>(scratch, left_elements<float>(block_rows, block));
    panels[t] = take<float>(scratch, columns * block);
  }
  for (int64_t l = 0; l < p.length; l += block) {
    const int64_t length = smaller(block, p.length - l);
    for (int t = 0; t < p.terms; ++t) {
      copy_panels(p.right[t].from(l, 0), length, p.columns, panels[t]);
    }
    for (int64_t i0 = 0; i0 < p.rows; i0 += block_rows) {
      const int64_t rows = smaller(block_rows, p.rows - i0);
      for (int t = 0; t < p.terms; ++t) {
        left[t] = copy_left(p.left[t].from(i0, l), rows, length, copies[t]);
      }
      for (int64_t j = 0; j < columns; j += kColumns<float>) {
        for (int64_t i = 0; i < rows; i += kRows) {
          aim(sides, p.terms, left, i, panels, j * length);
          tile_of(smaller(kRows, rows - i), sides, p.terms, length, p.alpha, keep || l > 0,
                  out + (i0 + i) * stride + j, stride);
        }
      }
    }
  }
}

// Write a product to a gradient in its own layout and dtype. Here `length` counts channels (or
// positions in Gram form) and is not split.
inline void write_product(Product p, Tensor out, int64_t sample, Scratch& scratch) {
  int64_t row = out.row, column = out.column;
  if (column != 1 && (row == 1 || row < column)) {
    p = p.transposed();
    row = out.column;
    column = out.row;
  }
  constexpr int64_t width = kColumns<float>;
  constexpr int64_t cached = 512 << 10;  // bytes of the right operands
  const int64_t fitting = cached / (p.terms * p.length * int64_t{sizeof(float)});
  const int64_t block_columns =
      smaller(larger(fitting / width, 1) * width, round_up(p.columns, width));
  const int64_t block_rows = rows_that_fit(p.rows, p.terms * p.length);
  Sides<float> sides[2];
  Left<float> left[2];
  float *copies[2], *panels[2];
  for (int t = 0; t < p.terms; ++t) {
    panels[t] = take<float>(scratch, block_columns * p.length);
    copies[t] = nullptr;
    if (!p.left[t].ready())
      copies[t] = take<float>(scratch, left_elements<float>(block_rows, p.length));
  }
  float* tile = take<float>(scratch, kRows * width);
  char* base = out.address + sample * out.sample * size_of(out.scalar);
  const bool in_place = out.scalar == Scalar::fp32 && column == 1;
  for (int64_t j0 = 0; j0 < p.columns; j0 += block_columns) {
    const int64_t columns = smaller(block_columns, p.columns - j0);
    for (int t = 0; t < p.terms; ++t)
      copy_panels(p.right[t].from(0, j0), p.length, columns, panels[t]);
    for (int64_t i0 = 0; i0 < p.rows; i0 += block_rows) {
      const int64_t rows = smaller(block_rows, p.rows - i0);
      for (int t = 0; t < p.terms; ++t) {
        const Operand x = p.left[t].from(i0, 0);
        left[t] = copies[t] ? copy_left(x, rows, p.length, copies[t])
                            : Left<float>{reinterpret_cast<const float*>(x.view.data), x.view.row,
                                          x.view.column};
      }
      for (int64_t j = 0; j < columns; j += width) {
        const int64_t count = smaller(width, columns - j);
        for (int64_t i = 0; i < rows; i += kRows) {
          const int64_t height = smaller(kRows, rows - i);
          aim(sides, p.terms, left, i, panels, j * p.length);
          char* to = base + ((i0 + i) * row + (j0 + j) * column) * size_of(out.scalar);
          if (in_place && count == width) {
            tile_of(height, sides, p.terms, p.length, p.alpha, false, reinterpret_cast<float*>(to),
                    row);
            continue;
          }
          tile_of(height, sides, p.terms, p.length, p.alpha, false, tile, width);
          for (int64_t r = 0; r < height; ++r) {
            write(to + r * row * size_of(out.scalar), out.scalar, column, count, tile + r * width);
          }
        }
      }
    }
  }
}

}  // namespace fsp::cpu::FSP_VARIANT
