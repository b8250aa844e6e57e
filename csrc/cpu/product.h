// Products of matrices whose operands are maps or differences of maps, in any layout and dtype.
//
// As in every fast product, operands are copied to the cache first, in the order in which they will
// be read. Here that copy also widens half precision and subtracts the teacher's map. Where the
// processor multiplies bf16, maps of bf16 stay bf16, and differences are rounded to it. Maps of few
// channels that adjoin are in that order already, so they are not copied.
#pragma once

#include "bf16.h"
#include "operand.h"

namespace fsp::cpu::FSP_VARIANT {

// The sum of one or two products of left (rows x length) and right (length x columns), times alpha.
// If `subtracts`, the second product is subtracted from the first one.
struct Product {
  int64_t rows, columns, length;
  int terms;
  Operand left[2], right[2];
  float alpha;
  bool subtracts = false;

  Product transposed() const {
    Product result{columns, rows, length, terms, {}, {}, alpha, subtracts};
    for (int i = 0; i < terms; ++i) {
      result.left[i] = right[i].transposed();
      result.right[i] = left[i].transposed();
    }
    return result;
  }
};

// Where the rows of a left operand are: data[i * row + l * step], `l` counts Ts.
template <class T>
struct Left {
  const T* data;
  int64_t row, step;

  Left from(int64_t i) const { return {data + i * row, row, step}; }
};

// Where the panels of a right operand are: from(j).data[l * step + k] is its column j + k.
template <class T>
struct Right {
  const T* data;
  int64_t column, step;

  // The panel of kColumns columns from `j` on.
  Right from(int64_t j) const { return {data + j * column, column, step}; }
};

// What a tile multiplies.
template <class T>
struct Sides {
  Left<T> left;
  Right<T> right;
  bool negates;  // the sum so far
};

template <class T>
constexpr int64_t count_of(int64_t elements) {
  return ceil_div(elements, kElements<T>);
}

// Copy lines (rows x columns) to rows of memory that lie `stride` apart.
template <class T>
void copy_rows(const Lines<T>& x, int64_t rows, int64_t columns, T* to, int64_t stride) {
  Source<T> buffer[kSpan];
  for (int64_t j = 0; j < columns; j += kSpan) {
    const int64_t count = smaller(kSpan, columns - j);
    for (int64_t i = 0; i < rows; ++i) {
      if (i + kAhead < rows) x.prefetch(i + kAhead, j, count);
      T* row = to + i * stride + j;
      if constexpr (sizeof(T) == sizeof(Source<T>)) {
        convert(x.read(i, j, count, row), row, count);
      } else {
        convert(x.read(i, j, count, buffer), row, count);
      }
    }
  }
}

// Copy lines (rows x columns) to panels of kColumns columns; the last one is filled with zeros.
template <class T>
void copy_panels_of_rows(const Lines<T>& x, int64_t rows, int64_t columns, T* panels) {
  constexpr int64_t width = kColumns<T>;
  static_assert(kSpan % width == 0);
  Source<T> buffer[kSpan];
  for (int64_t j = 0; j < columns; j += kSpan) {
    const int64_t count = smaller(kSpan, columns - j);
    for (int64_t i = 0; i < rows; ++i) {
      if (i + kAhead < rows) x.prefetch(i + kAhead, j, count);
      T* to = panels + j * rows + i * width;
      if constexpr (sizeof(T) == sizeof(Source<T>)) {
        if (count < width) {
          memset(to, 0, width * sizeof(T));
          convert(x.read(i, j, count, to), to, count);
          continue;
        }
      }
      const Source<T>* row = x.read(i, j, count, buffer);
      int64_t k = 0;
      for (; k + width <= count; k += width, to += rows * width) convert(row + k, to, width);
      if (k == count) continue;
      memset(to, 0, width * sizeof(T));
      convert(row + k, to, count - k);
    }
  }
}

// The same, for a matrix whose columns are the lines.
template <class T>
void copy_panels_of_columns(const Lines<T>& x, int64_t rows, int64_t columns, T* panels) {
  constexpr int64_t width = kColumns<T>;
  constexpr int group = width < 8 ? width : 8;  // columns that are turned at a time
  Source<T> buffer[8][kSpan];
  for (int64_t i = 0; i < rows; i += kSpan) {
    const int64_t span = smaller(kSpan, rows - i);
    for (int64_t j = 0; j < round_up(columns, width); j += group) {
      const Source<T>* lines[8];
      for (int k = 0; k < 8; ++k) {
        lines[k] = buffer[k];
        if (k < group && j + k < columns) {
          if (j + k + kAhead < columns) x.prefetch(j + k + kAhead, i, span);
          lines[k] = x.read(j + k, i, span, buffer[k]);
        } else {
          memset(buffer[k], 0, span * sizeof(Source<T>));
        }
      }
      T* to = panels + j / width * width * rows + i * width + j % width;
      int64_t l = 0;
      for (; l + 8 <= span; l += 8) {
        Eight block[8];
        for (int k = 0; k < 8; ++k) block[k] = load_eight(lines[k] + l);
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
        for (int k = 0; k < group; ++k) to[l * width + k] = lines[k][l];
      }
    }
  }
}

// A tile of out = alpha * sum of left @ right, or out += that if `keep`. `length` counts Ts.
template <class T, int rows, int vectors>
__attribute__((noinline)) void compute_tile(const Sides<T>* sides, int terms, int64_t length,
                                            Sum<T> alpha, bool keep, Sum<T>* out, int64_t stride) {
  Vector<Sum<T>> tile[rows][vectors] = {};
  for (int term = 0; term < terms; ++term) {
    const auto [left, row, left_step] = sides[term].left;
    const T* right = sides[term].right.data;
    const int64_t right_step = sides[term].right.step;
    // Of every third row. From there an address reaches the next two, so that all of them take few
    // registers of addresses.
    const T* thirds[ceil_div(rows, 3)];
    for (int i = 0; i < rows; i += 3) thirds[i / 3] = left + i * row;
    if (sides[term].negates) {
      for (int i = 0; i < rows; ++i) {
        for (int v = 0; v < vectors; ++v) tile[i][v] = -tile[i][v];
      }
    }
    for (int64_t l = 0; l < length; ++l) {
      Vector<T> columns[vectors];
      for (int v = 0; v < vectors; ++v) columns[v] = load(right + v * kLanes<T>);
      for (int i = 0; i < rows; ++i) {
        for (int v = 0; v < vectors; ++v) {
          tile[i][v] = multiply_add(thirds[i / 3][i % 3 * row], columns[v], tile[i][v]);
        }
      }
      for (const T*& x : thirds) x += left_step;
      right += right_step;
    }
  }
  for (int i = 0; i < rows; ++i) {
    for (int v = 0; v < vectors; ++v) {
      Sum<T>* to = out + i * stride + v * kLanes<T>;
      const Vector<Sum<T>> x = tile[i][v] * alpha;
      store(to, keep ? load(to) + x : x);
    }
  }
}

template <class T, int vectors, int most = kRows>
void tile_of_rows(int64_t rows, const Sides<T>* sides, int terms, int64_t length, Sum<T> alpha,
                  bool keep, Sum<T>* out, int64_t stride) {
  if constexpr (most > 1) {
    if (rows < most) {
      tile_of_rows<T, vectors, most - 1>(rows, sides, terms, length, alpha, keep, out, stride);
      return;
    }
  }
  compute_tile<T, most, vectors>(sides, terms, length, alpha, keep, out, stride);
}

// At most kRows rows and kColumns columns. It writes whole vectors.
template <class T>
void tile_of(int64_t rows, int64_t columns, const Sides<T>* sides, int terms, int64_t length,
             Sum<T> alpha, bool keep, Sum<T>* out, int64_t stride) {
  auto* of_rows = columns > kLanes<T> ? tile_of_rows<T, kColumnVectors> : tile_of_rows<T, 1>;
  of_rows(rows, sides, terms, length, alpha, keep, out, stride);
}

// Whether tiles can read an operand (positions x channels) as it is: dense, in whole vectors, and so
// narrow that the rows do not share a set of the cache.
constexpr int64_t kNarrow = 128;
inline bool is_narrow(const Operand& x, int64_t channels) {
  return x.view.is_fp32_row() && x.view.row == channels && x.other.is_fp32_row() &&
         x.other.row == channels && channels % kLanes<float> == 0 && channels <= kNarrow;
}

// Such an operand: the map itself, or at `to` its sum or difference with another one.
inline const float* narrow(const Operand& x, int64_t positions, int64_t channels, float* to) {
  const float* first = x.view.at<float>(0, 0);
  if (x.sign == 0) return first;
  combine(first, x.other.at<float>(0, 0), x.sign, to, positions * channels);
  return to;
}

// Memory for a copy of a left operand (rows x count), in Ts.
template <class T>
int64_t left_size(int64_t rows, int64_t count) {
  return larger(rows * (count + kLanes<T>), count * (rows + kLanes<T>));
}

// Copy a left operand (rows x length), unless tiles can read it where it is.
template <class T>
Left<T> copy_left(const Operand& x, int64_t rows, int64_t length, T* to) {
  if constexpr (kElements<T> == 1) {
    if (is_narrow(x.transposed(), rows)) return {narrow(x.transposed(), length, rows, to), 1, rows};
  }
  const int64_t count = count_of<T>(length);
  // One more vector a row, so that rows of 4 KiB do not share a set of the cache.
  if (x.view.columns_adjoin()) {
    const int64_t stride = count + kLanes<T>;
    copy_rows<T>({x, false, length}, rows, count, to, stride);
    return {to, stride, 1};
  }
  const int64_t stride = rows + kLanes<T>;
  copy_rows<T>({x.transposed(), true, length}, count, rows, to, stride);
  return {to, 1, stride};
}

// Copy a right operand (length x columns) to panels.
template <class T>
void copy_panels(const Operand& x, int64_t length, int64_t columns, T* panels) {
  const int64_t rows = count_of<T>(length);
  if (x.view.columns_adjoin()) {
    copy_panels_of_rows<T>({x, true, length}, rows, columns, panels);
  } else {
    copy_panels_of_columns<T>({x.transposed(), false, length}, rows, columns, panels);
  }
}

// The same, unless tiles can read it where it is.
template <class T>
Right<T> copy_right(const Operand& x, int64_t length, int64_t columns, T* to) {
  if constexpr (kElements<T> == 1) {
    if (is_narrow(x, columns)) return {narrow(x, length, columns, to), 1, columns};
  }
  copy_panels(x, length, columns, to);
  return {to, count_of<T>(length), kColumns<T>};
}

// Whether a product can read a left operand where it is.
template <class T>
bool is_ready(const Operand& x, int64_t length) {
  if (x.sign != 0) return false;
  if constexpr (kElements<T> == 1) return x.view.scalar == Scalar::fp32;
  return x.view.column == 1 && x.view.row % 2 == 0 && length % 2 == 0;
}

template <class T>
Left<T> in_place(const View& x) {
  const int64_t step = kElements<T> == 1 ? x.column : 1;
  return {reinterpret_cast<const T*>(x.data), x.row / kElements<T>, step};
}

// Bytes of copied operands: a block of the left one stays in the second-level cache while the
// panels of the right one pass by.
constexpr int64_t kLeftBytes = (kVectorBytes == 64 ? 512 : 256) << 10;
constexpr int64_t kRightBytes = 1 << 20;

// Rows of left operands, of `count` Ts together, that fit the cache.
template <class T>
int64_t rows_that_fit(int64_t rows, int64_t count) {
  const int64_t fitting = larger(kLeftBytes / (count * int64_t{sizeof(T)}), kRows);
  return round_up(smaller(fitting - fitting % kRows, rows), kRows);
}

template <class T>
T* take(Scratch& scratch, int64_t elements) {
  return static_cast<T*>(scratch.take(elements * sizeof(T)));
}

// Point `sides` to row `i` of the left operands and to column `j` of the right ones.
template <class T>
void aim(Sides<T>* sides, const Product& p, const Left<T>* left, int64_t i, const Right<T>* right,
         int64_t j) {
  for (int t = 0; t < p.terms; ++t) {
    sides[t] = {left[t].from(i), right[t].from(j), p.subtracts && t > 0};
  }
}

// out = product, or out += product if `keep`; out has rows of `stride` elements, a multiple of
// kLanes. The sum over `length`, the positions of maps, is split into blocks that fit the cache.
template <class T>
void accumulate(const Product& p, float* out, int64_t stride, bool keep, Scratch& scratch) {
  const int64_t columns = round_up(p.columns, kColumns<T>), all = count_of<T>(p.length);
  const int64_t fitting = kRightBytes / (p.terms * columns * int64_t{sizeof(T)});
  int64_t block = smaller(all, smaller(larger(fitting, 128), kSpan));
  block = smaller(all, round_up(ceil_div(all, ceil_div(all, block)), 8));
  const int64_t block_rows = rows_that_fit<T>(p.rows, p.terms * block);
  Sides<T> sides[2];
  Left<T> left[2];
  Right<T> right[2];
  T *copies[2], *panels[2];
  for (int t = 0; t < p.terms; ++t) {
    copies[t] = take<T>(scratch, left_size<T>(block_rows, block));
    panels[t] = take<T>(scratch, columns * block);
  }
  const int64_t step = block * kElements<T>;
  const float alpha = p.subtracts ? -p.alpha : p.alpha;
  for (int64_t l = 0; l < p.length; l += step) {
    const int64_t length = smaller(step, p.length - l), count = count_of<T>(length);
    for (int t = 0; t < p.terms; ++t) {
      right[t] = copy_right(p.right[t].from(l, 0), length, p.columns, panels[t]);
    }
    for (int64_t i0 = 0; i0 < p.rows; i0 += block_rows) {
      const int64_t rows = smaller(block_rows, p.rows - i0);
      for (int t = 0; t < p.terms; ++t) {
        left[t] = copy_left(p.left[t].from(i0, l), rows, length, copies[t]);
      }
      for (int64_t j = 0; j < columns; j += kColumns<T>) {
        for (int64_t i = 0; i < rows; i += kRows) {
          aim(sides, p, left, i, right, j);
          tile_of(smaller(kRows, rows - i), p.columns - j, sides, p.terms, count, alpha,
                  keep || l > 0, out + (i0 + i) * stride + j, stride);
        }
      }
    }
  }
}

// Write a product to a gradient in its own layout and dtype. Here `length` counts channels (or
// positions in Gram form) and is not split.
template <class T>
void write_product(Product p, Tensor out, int64_t sample, Scratch& scratch) {
  int64_t row = out.row, column = out.column;
  if (column != 1 && (row == 1 || row < column)) {
    p = p.transposed();
    row = out.column;
    column = out.row;
  }
  constexpr int64_t width = kColumns<T>;
  constexpr int64_t cached = 512 << 10;  // bytes of the right operands
  const int64_t count = count_of<T>(p.length);
  const int64_t fitting = cached / (p.terms * count * int64_t{sizeof(T)});
  const int64_t block_columns =
      smaller(larger(fitting / width, 1) * width, round_up(p.columns, width));
  const int64_t block_rows = rows_that_fit<T>(p.rows, p.terms * count);
  Sides<T> sides[2];
  Left<T> left[2];
  Right<T> right[2];
  T *copies[2] = {}, *panels[2];
  for (int t = 0; t < p.terms; ++t) {
    panels[t] = take<T>(scratch, block_columns * count);
    if (!is_ready<T>(p.left[t], p.length)) {
      copies[t] = take<T>(scratch, left_size<T>(block_rows, count));
    }
  }
  float* tile = take<float>(scratch, kRows * width);
  char* base = out.address + sample * out.sample * size_of(out.scalar);
  const bool direct = out.scalar == Scalar::fp32 && column == 1;
  for (int64_t j0 = 0; j0 < p.columns; j0 += block_columns) {
    const int64_t columns = smaller(block_columns, p.columns - j0);
    for (int t = 0; t < p.terms; ++t) {
      right[t] = copy_right(p.right[t].from(0, j0), p.length, columns, panels[t]);
    }
    for (int64_t i0 = 0; i0 < p.rows; i0 += block_rows) {
      const int64_t rows = smaller(block_rows, p.rows - i0);
      for (int t = 0; t < p.terms; ++t) {
        const Operand x = p.left[t].from(i0, 0);
        left[t] = copies[t] ? copy_left(x, rows, p.length, copies[t]) : in_place<T>(x.view);
      }
      for (int64_t j = 0; j < columns; j += width) {
        const int64_t filled = smaller(width, columns - j);
        for (int64_t i = 0; i < rows; i += kRows) {
          const int64_t height = smaller(kRows, rows - i);
          aim(sides, p, left, i, right, j);
          char* to = base + ((i0 + i) * row + (j0 + j) * column) * size_of(out.scalar);
          if (direct && filled == width) {
            tile_of(height, width, sides, p.terms, count, p.alpha, false,
                    reinterpret_cast<float*>(to), row);
            continue;
          }
          tile_of(height, filled, sides, p.terms, count, p.alpha, false, tile, width);
          for (int64_t r = 0; r < height; ++r) {
            write(to + r * row * size_of(out.scalar), out.scalar, column, filled, tile + r * width);
          }
        }
      }
    }
  }
}

}  // namespace fsp::cpu::FSP_VARIANT
