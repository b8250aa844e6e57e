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
inline void residual(const Pair& pair, const View* maps, float* out, int64_t stride,
                     Scratch& scratch) {
  const View a = maps[0], b = maps[1].transposed(), c = maps[2], d = maps[3].transposed();
  const int64_t m = pair.m, n = pair.n, student = pair.positions[0], teacher = pair.positions[1];
  const float scale = 1.0f / student;
  if (pair.residual == Residual::apart) {
    accumulate({m, n, student, 1, {only(a)}, {only(b)}, scale}, out, stride, false, scratch);
    accumulate({m, n, teacher, 1, {only(c)}, {only(d)}, -1.0f / teacher}, out, stride, true,
               scratch);
  } else if (pair.symmetric) {  // with X = (a - c) (a + c)^T / 2: a a^T - c c^T = X + X^T
    accumulate({m, n, student, 1, {difference(a, c)}, {sum(b, d)}, scale / 2}, out, stride, false,
               scratch);
    add_transpose(out, m, stride);
  } else {
    accumulate({m, n, student, 2, {difference(a, c), only(c)}, {only(b), difference(b, d)}, scale},
               out, stride, false, scratch);
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

inline void matrix_form(const Pair& pair, const View* maps, int64_t sample, Scratch& scratch) {
  const int64_t stride = round_up(pair.n, kColumns<float>);
  float* slope = take<float>(scratch, pair.m * stride);
  residual(pair, maps, slope, stride, scratch);
  const bool column = pair.norm == Norm::column;
  const float scale = static_cast<float>((column ? 1 : 2) * pair.factor / pair.positions[0]);
  const double loss = (column ? column_lengths : squares)(slope, pair.m, stride, scale);
  pair.losses[sample] = pair.factor * loss;
  if (!wants_gradients(pair)) return;
  if (pair.symmetric) add_transpose(slope, pair.m, stride);
  const View s = view_of(slope, stride);
  for (int own = 0; own < 4; ++own) {
    if (!pair.gradients[own].address) continue;
    const bool second = own % 2, teacher = own >= 2;
    const int64_t positions = pair.positions[teacher];
    const float ratio = teacher ? -static_cast<float>(pair.positions[0]) / positions : 1.0f;
    const Operand left = only(second ? s.transposed() : s), right = only(maps[own ^ 1]);
    const int64_t channels = second ? pair.n : pair.m, length = second ? pair.m : pair.n;
    write_product({channels, positions, length, 1, {left}, {right}, ratio}, pair.gradients[own],
                  sample, scratch);
  }
}

// --- Gram form -----------------------------------------------------------------------------------

// x^T x, y^T x and y^T y of two operands (channels x positions), each (positions, stride), in fp64:
// the loss cancels.
inline void gram_blocks(const Operand& x, const Operand& y, int64_t channels, int64_t positions,
                        double* const* out, int64_t stride, Scratch& scratch) {
  constexpr int64_t width = kColumns<double>;
  const int64_t rows = round_up(positions, kRows);
  const int64_t fitting = (256 << 10) / (2 * (stride + rows) * int64_t{sizeof(double)});
  const int64_t block = smaller(channels, smaller(larger(fitting, 32), 256));
  const int64_t step = stride + kLanes<double>;
  double *left[2], *right[2];
  for (int i = 0; i < 2; ++i) {
    left[i] = take<double>(scratch, block * step);
    right[i] = take<double>(scratch, block * stride);
  }
  for (int64_t l = 0; l < channels; l += block) {
    const int64_t length = smaller(block, channels - l);
    Left<double> lefts[2];
    for (int i = 0; i < 2; ++i) {
      const Operand here = (i ? y : x).from(l, 0);
      copy_panels(here, length, positions, right[i]);
      for (int64_t j = 0; j < positions; j += width) {  // the same numbers as rows of all positions
        for (int64_t k = 0; k < length; ++k) {
          memcpy(left[i] + k * step + j, right[i] + j * length + k * width, width * sizeof(double));
        }
      }
      lefts[i] = {left[i], 1, step};
    }
    for (int pair = 0; pair < 3; ++pair) {  // (x, x), (y, x), (y, y)
      const Left<double>& a = lefts[pair > 0];
      const double* b = right[pair == 2];
      for (int64_t j = 0; j < positions; j += width) {
        for (int64_t i = 0; i < positions; i += kRows) {
          if (pair != 1 && i >= j + width) break;  // below the diagonal of a symmetric block
          const Sides<double> sides{a.data + i, a.row, a.step, b + j * length};
          tile_of(smaller(kRows, positions - i), &sides, 1, length, 1.0, l > 0,
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
inline void derive_second_blocks(double* const* blocks, int64_t size, int64_t stride) {
  const double *pp = blocks[0], *cp = blocks[1], *cc = blocks[2];
  for (int64_t i = 0; i < size; ++i) {
    for (int64_t j = 0; j < size; ++j) {
      const int64_t here = i * stride + j, there = j * stride + i;
      blocks[3][here] = pp[here] + cp[here] + cp[there] + cc[here];
      blocks[4][here] = pp[here] + cp[there];
      blocks[5][here] = pp[here];
    }
  }
}

inline void gram_form(const Pair& pair, const View* maps, int64_t sample, Scratch& scratch) {
  const int64_t k = pair.positions[0], stride = round_up(k, kColumns<float>), size = k * stride;
  const Operand p = difference(maps[0], maps[2]), q = difference(maps[1], maps[3]);
  const Operand b = only(maps[1]), c = only(maps[2]);
  double* blocks[6];
  for (double*& block : blocks) block = take<double>(scratch, size);
  gram_blocks(p, c, pair.m, k, blocks, stride, scratch);
  if (pair.symmetric) {
    derive_second_blocks(blocks, k, stride);
  } else {
    gram_blocks(b, q, pair.n, k, blocks + 3, stride, scratch);
  }
  const double *pp = blocks[0], *cp = blocks[1], *cc = blocks[2];
  const double *bb = blocks[3], *qb = blocks[4], *qq = blocks[5];
  double loss = 0;
  for (int64_t i = 0; i < k; ++i) {
    double row = 0;
    for (int64_t j = i * stride; j < i * stride + k; ++j) {
      row += pp[j] * bb[j] + 2 * cp[j] * qb[j] + cc[j] * qq[j];
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
        double x = 0, y = 0;
        if (own == 0) x = bb[here], y = qb[here];
        if (own == 1) x = pp[here] + cp[there], y = cp[here] + cc[here];
        if (own == 2) x = bb[here] - qb[there], y = qb[here] - qq[here];
        if (own == 3) x = cp[there], y = cc[here];
        right[0][here] = static_cast<float>(scale * x);
        right[1][here] = static_cast<float>(scale * y);
      }
    }
    const bool second = own % 2;
    const Operand first_right = only(view_of(right[0], stride));
    const Operand second_right = only(view_of(right[1], stride));
    write_product({second ? pair.n : pair.m,
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
