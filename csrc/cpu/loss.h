// The loss of one sample and its gradients. plan.py explains both forms.
#pragma once

#include <math.h>

#include "product.h"

namespace fsp::cpu::FSP_VARIANT {

// Map `i` of a sample as a matrix (C, K).
inline View view_of(const Pair& pair, int i, int64_t sample) {
  const Tensor& x = pair.maps[i];
  return {x.address + sample * x.sample * size_of(x.scalar), x.row, x.column, x.scalar};
}

inline View view_of(const float* matrix, int64_t stride) {
  return {reinterpret_cast<const char*>(matrix), stride, 1, Scalar::fp32};
}

// A matrix of fp32 as an operand of products of T.
template <class T>
View view_as(const float* matrix, int64_t rows, int64_t stride, Scratch& scratch) {
  if constexpr (kElements<T> == 1) {
    return view_of(matrix, stride);
  } else {
    uint16_t* rounded = take<uint16_t>(scratch, rows * stride);
    char* bytes = reinterpret_cast<char*>(rounded);
    write(bytes, Scalar::bf16, 1, rows * stride, matrix);
    return {bytes, stride, 1, Scalar::bf16};
  }
}

inline bool wants_gradients(const Pair& pair) {
  for (const Tensor& gradient : pair.gradients) {
    if (gradient.address) return true;
  }
  return false;
}

// x += x^T, of a square matrix with rows of `stride` elements.
inline void add_transpose(float* x, int64_t size, int64_t stride) {
  for (int64_t i = 0; i < size; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      x[i * stride + j] = x[j * stride + i] = x[i * stride + j] + x[j * stride + i];
    }
  }
}

// G^S - G^T, (m, n) in rows of `stride` elements.
template <class T>
void residual(const Pair& pair, const View* maps, float* out, int64_t stride,
                     Scratch& scratch) {
  const View a = maps[0], b = maps[1].transposed(), c = maps[2], d = maps[3].transposed();
  const int64_t m = pair.m, n = pair.n, student = pair.positions[0], teacher = pair.positions[1];
  const float scale = 1.0f / student;
  if (pair.residual == Residual::apart) {
    accumulate<T>({m, n, student, 1, {only(a)}, {only(b)}, scale}, out, stride, false, scratch);
    accumulate<T>({m, n, teacher, 1, {only(c)}, {only(d)}, -1.0f / teacher}, out, stride, true,
                  scratch);
  } else if (pair.symmetric) {  // with X = (a - c) (a + c)^T / 2: a a^T - c c^T = X + X^T
    accumulate<T>({m, n, student, 1, {difference(a, c)}, {sum(b, d)}, scale / 2}, out, stride,
                  false, scratch);
    add_transpose(out, m, stride);
  } else if (pair.residual == Residual::direct) {
    accumulate<T>({m, n, student, 2, {only(a), only(c)}, {only(b), only(d)}, scale, true}, out,
                  stride, false, scratch);
  } else {
    accumulate<T>(
        {m, n, student, 2, {difference(a, c), only(c)}, {only(b), difference(b, d)}, scale}, out,
        stride, false, scratch);
  }
}

// Returns the sum of squares. Multiplies the residual by `scale`.
inline double squares(float* x, int64_t rows, int64_t stride, float scale) {
  double total = 0;
  for (int64_t i = 0; i < rows; ++i) {
    Vector<float> in_row = {};
    for (int64_t j = 0; j < stride; j += kLanes<float>) {
      const Vector<float> here = load(x + i * stride + j);
      in_row += here * here;
      store(x + i * stride + j, here * scale);
    }
    total += total_of<float>(in_row);
  }
  return total;
}

// Returns the sum of the columns' lengths. Divides each column by its length; a zero column stays,
// as in PyTorch.
inline double column_lengths(float* x, int64_t rows, int64_t stride, float scale) {
  double total = 0;
  for (int64_t j = 0; j < stride; j += kLanes<float>) {
    Vector<float> squared = {}, factor;
    for (int64_t i = 0; i < rows; ++i) {
      const Vector<float> here = load(x + i * stride + j);
      squared += here * here;
    }
    for (int k = 0; k < kLanes<float>; ++k) {
      const float length = sqrtf(squared[k]);
      total += length;
      factor[k] = length == 0 ? 0 : scale / length;
    }
    for (int64_t i = 0; i < rows; ++i) {
      store(x + i * stride + j, load(x + i * stride + j) * factor);
    }
  }
  return total;
}

// T: what is multiplied, fp32 or twos of bf16.
template <class T>
void matrix_form(const Pair& pair, const View* maps, int64_t sample, Scratch& scratch) {
  const int64_t stride = round_up(pair.n, kLanes<T>);
  float* slope = take<float>(scratch, pair.m * stride);
  residual<T>(pair, maps, slope, stride, scratch);
  const bool column = pair.norm == Norm::column;
  const float scale = static_cast<float>((column ? 1 : 2) * pair.factor / pair.positions[0]);
  const double loss = (column ? column_lengths : squares)(slope, pair.m, stride, scale);
  pair.losses[sample] = pair.factor * loss;
  if (!wants_gradients(pair)) return;
  if (pair.symmetric) add_transpose(slope, pair.m, stride);
  const View s = view_as<T>(slope, pair.m, stride, scratch);
  for (int own = 0; own < 4; ++own) {
    if (!pair.gradients[own].address) continue;
    const bool second = own % 2, teacher = own >= 2;
    const int64_t positions = pair.positions[teacher];
    const float ratio = teacher ? -static_cast<float>(pair.positions[0]) / positions : 1.0f;
    const Operand left = only(second ? s.transposed() : s), right = only(maps[own ^ 1]);
    const int64_t channels = second ? pair.n : pair.m, length = second ? pair.m : pair.n;
    write_product<T>({channels, positions, length, 1, {left}, {right}, ratio}, pair.gradients[own],
                     sample, scratch);
  }
}

// --- Gram form -----------------------------------------------------------------------------------

// x^T x, y^T x and y^T y of two operands (channels x positions), each (positions, stride). T: what
// is multiplied, fp64, since the loss cancels, or twos of bf16.
template <class T>
void gram_blocks(const Operand& x, const Operand& y, int64_t channels, int64_t positions,
                 Sum<T>* const* out, int64_t stride, Scratch& scratch) {
  constexpr int64_t width = kColumns<T>;
  const int64_t rows = round_up(positions, kRows), all = count_of<T>(channels);
  const int64_t fitting = (256 << 10) / (2 * (stride + rows) * int64_t{sizeof(T)});
  const int64_t block = smaller(all, smaller(larger(fitting, 32), 256));
  const int64_t row = stride + kLanes<T>;
  T *left[2], *right[2];
  for (int i = 0; i < 2; ++i) {
    left[i] = take<T>(scratch, block * row);
    right[i] = take<T>(scratch, block * stride);
  }
  const int64_t step = block * kElements<T>;
  for (int64_t l = 0; l < channels; l += step) {
    const int64_t length = smaller(step, channels - l), count = count_of<T>(length);
    Left<T> lefts[2];
    for (int i = 0; i < 2; ++i) {
      const Operand here = (i ? y : x).from(l, 0);
      copy_panels(here, length, positions, right[i]);
      for (int64_t j = 0; j < positions; j += width) {  // the same numbers as rows of all positions
        for (int64_t k = 0; k < count; ++k) {
          memcpy(left[i] + k * row + j, right[i] + j * count + k * width, width * sizeof(T));
        }
      }
      lefts[i] = {left[i], 1, row};
    }
    for (int pair = 0; pair < 3; ++pair) {  // (x, x), (y, x), (y, y)
      const Left<T>& a = lefts[pair > 0];
      const Right<T> b{right[pair == 2], count, width};
      for (int64_t j = 0; j < positions; j += width) {
        for (int64_t i = 0; i < positions; i += kRows) {
          if (pair != 1 && i >= j + width) break;  // below the diagonal of a symmetric block
          const Sides<T> sides{a.from(i), b.from(j), false};
          tile_of(smaller(kRows, positions - i), positions - j, &sides, 1, count, Sum<T>{1}, l > 0,
                  out[pair] + i * stride + j, stride);
        }
      }
    }
  }
  for (int pair = 0; pair < 3; pair += 2) {
    for (int64_t i = 0; i < positions; ++i) {
      for (int64_t j = 0; j < i; ++j) out[pair][i * stride + j] = out[pair][j * stride + i];
    }
  }
}

// Of a symmetric pair, b = p + c and q = p: bb, qb and qq from pp, cp and cc.
template <class Block>
void derive_second_blocks(Block* const* blocks, int64_t size, int64_t stride) {
  const Block *pp = blocks[0], *cp = blocks[1], *cc = blocks[2];
  for (int64_t i = 0; i < size; ++i) {
    for (int64_t j = 0; j < size; ++j) {
      const int64_t here = i * stride + j, there = j * stride + i;
      blocks[3][here] = pp[here] + cp[here] + cp[there] + cc[here];
      blocks[4][here] = pp[here] + cp[there];
      blocks[5][here] = pp[here];
    }
  }
}

// T: what the products of the gradients multiply; InBlock: what those of the blocks multiply.
template <class T, class InBlock>
void gram_form(const Pair& pair, const View* maps, int64_t sample, Scratch& scratch) {
  using Block = Sum<InBlock>;
  const int64_t k = pair.positions[0], stride = round_up(k, kColumns<T>), size = k * stride;
  const Operand p = difference(maps[0], maps[2]), q = difference(maps[1], maps[3]);
  const Operand b = only(maps[1]), c = only(maps[2]);
  Block* blocks[6];
  for (Block*& block : blocks) block = take<Block>(scratch, size);
  gram_blocks<InBlock>(p, c, pair.m, k, blocks, stride, scratch);
  if (pair.symmetric) {
    derive_second_blocks(blocks, k, stride);
  } else {
    gram_blocks<InBlock>(b, q, pair.n, k, blocks + 3, stride, scratch);
  }
  const Block *pp = blocks[0], *cp = blocks[1], *cc = blocks[2];
  const Block *bb = blocks[3], *qb = blocks[4], *qq = blocks[5];
  double loss = 0;
  for (int64_t i = 0; i < k; ++i) {
    double row = 0;
    for (int64_t j = i * stride; j < i * stride + k; ++j) {
      row += double{pp[j]} * bb[j] + 2 * double{cp[j]} * qb[j] + double{cc[j]} * qq[j];
    }
    loss += row;
  }
  const double factor = pair.factor / (static_cast<double>(k) * k);
  pair.losses[sample] = factor * (loss < 0 ? 0 : loss);
  if (!wants_gradients(pair)) return;
  const double scale = (pair.symmetric ? 4 : 2) * factor;
  // D b = p bb + c qb and D^T a = b (pp + cp^T) + q (cp + cc), with a = p + c; likewise d = b - q.
  float* right[2] = {take<float>(scratch, size), take<float>(scratch, size)};
  for (int own = 0; own < 4; ++own) {
    if (!pair.gradients[own].address) continue;
    for (int64_t i = 0; i < k; ++i) {
      for (int64_t j = 0; j < k; ++j) {
        const int64_t here = i * stride + j, there = j * stride + i;
        Block x = 0, y = 0;
        if (own == 0) x = bb[here], y = qb[here];
        if (own == 1) x = pp[here] + cp[there], y = cp[here] + cc[here];
        if (own == 2) x = bb[here] - qb[there], y = qb[here] - qq[here];
        if (own == 3) x = cp[there], y = cc[here];
        right[0][here] = static_cast<float>(scale * x);
        right[1][here] = static_cast<float>(scale * y);
      }
    }
    const bool second = own % 2;
    const Operand first_right = only(view_as<T>(right[0], k, stride, scratch));
    const Operand second_right = only(view_as<T>(right[1], k, stride, scratch));
    write_product<T>({second ? pair.n : pair.m,
                      k,
                      k,
                      2,
                      {second ? b : p, second ? q : c},
                      {first_right, second_right},
                      own < 2 ? 1.0f : -1.0f},
                     pair.gradients[own], sample, scratch);
  }
}

}  // namespace fsp::cpu::FSP_VARIANT
