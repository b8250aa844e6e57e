// Products of two tiles by the warps of a block, C(i, j) += sum_k x(i, k) y(j, k). They run on
// tensor cores if the chip has them for these operands, else as fused multiply-adds of fp32.
//
// Halves are multiplied exactly and accumulated in fp32. fp32 is multiplied in three products of
// TF32 (`split`), which keep 22 bits, or in one. A slope, which a kernel has computed, is rounded
// once when it is stored: to bf16 if the maps are bf16, else to TF32, unless products are split.
// TF32 has the range of fp32 and holds fp16 exactly.
#pragma once

#include <type_traits>

#include "accumulator.cuh"

namespace fsp {

// --- slopes --------------------------------------------------------------------------------------

// The type that slopes are multiplied in if the maps are T. It is never fp16, whose range is too
// small.
template <class T>
using SlopeOf = std::conditional_t<std::is_same_v<T, __nv_bfloat16>, __nv_bfloat16, float>;

// Clamp finite numbers to the range of bf16: rounding would make the largest ones infinite.
__device__ __forceinline__ float within_bf16(float x) {
  constexpr float largest = 0x1.fep127f;
  return fabsf(x) < INFINITY ? fminf(fmaxf(x, -largest), largest) : x;
}

// Round to the 11 bits of TF32. Tensor cores themselves would truncate.
__device__ __forceinline__ float round_to_tf32(float x) {
  const uint32_t half = fabsf(x) < 0x1.ffep127f ? 0x1000 : 0;
  return __uint_as_float((__float_as_uint(x) + half) & 0xffffe000u);
}

// A slope, prepared so that it is rounded only once until it is multiplied. `stored` is its type in
// memory.
__device__ __forceinline__ float storable_slope(float x, Scalar stored, bool split) {
  if (stored == Scalar::bf16) return within_bf16(x);
#if FSP_AMPERE
  if (!split) return round_to_tf32(x);
#endif
  return x;
}

// --- fragments -----------------------------------------------------------------------------------

// 16 lines of an operand, with the summed elements of one mma: 16 halves or 8 of fp32. As the first
// operand of mma it is `a`. As the second (COLUMNS) it serves two mma: registers 0 and 1 are `b`
// for lines 0 to 7, registers 2 and 3 for lines 8 to 15.
struct Fragment {
  uint32_t r[4];
};

// A register of a lane holds two halves with neighbouring `k`; with SPREAD their `k` are 4 apart,
// as in mma of TF32.
template <bool COLUMNS, bool SPREAD = false, class X>
__device__ __forceinline__ Fragment load_fragment(const X& x, int line, int k) {
  constexpr int row = 16 / sizeof(typename X::Element);  // elements of a row of ldmatrix
  // Lane i gives row i % 8 of matrix i / 8.
  const int lane = threadIdx.x % 32, second = lane / 8 % 2, third = lane / 16;
  line += 8 * (COLUMNS ? third : second);
  k += row * (COLUMNS ? second : third);
  Fragment result;
  if constexpr (X::inner == 1) {
    static_assert(!SPREAD);
    ldmatrix_x4(result.r, x.data + (line + lane % 8) * X::line + k);
  } else {  // lines are neighbours, a row is one k
    static_assert(row == 8);
    const int at = SPREAD ? lane % 8 / 2 + lane % 2 * 4 : lane % 8;
    ldmatrix_x4_trans(result.r, x.data + (k + at) * X::inner + line);
  }
  return result;
}

template <class T>
struct Mma16;  // mma of 16-bit elements

template <>
struct Mma16<__half> {
  static __device__ __forceinline__ void mma(float (&d)[4], const Fragment& a, uint32_t b0,
                                             uint32_t b1) {
    mma_f16(d, a.r, b0, b1);
  }
};

#if FSP_AMPERE

template <>
struct Mma16<__nv_bfloat16> {
  static __device__ __forceinline__ void mma(float (&d)[4], const Fragment& a, uint32_t b0,
                                             uint32_t b1) {
    mma_bf16(d, a.r, b0, b1);
  }
};

// The same for fp32. With PAIRS a lane has the summed elements that it would have as halves.
template <bool COLUMNS, bool PAIRS = false, class X>
__device__ __forceinline__ Fragment load_fp32(const X& x, int line, int k) {
  if constexpr (X::inner == 1 && !PAIRS) {
    return load_fragment<COLUMNS>(x, line, k);
  } else {
    const int lane = threadIdx.x % 32;
    Fragment result;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int down = COLUMNS ? i / 2 : i % 2, half = COLUMNS ? i % 2 : i / 2;
      const int at = PAIRS ? lane % 4 * 2 + half : lane % 4 + half * 4;
      result.r[i] = __float_as_uint(x.at(line + lane / 4 + down * 8, k + at));
    }
    return result;
  }
}

// Elements of fp32 rounded to TF32, and the rest.
struct Terms {
  Fragment high, low;
};

template <bool COLUMNS, class X>
__device__ __forceinline__ Terms load_terms(const X& x, int line, int k, bool split) {
  const Fragment whole = load_fp32<COLUMNS>(x, line, k);
  Terms result;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float value = __uint_as_float(whole.r[i]), high = round_to_tf32(value);
    result.high.r[i] = __float_as_uint(high);
    result.low.r[i] = split ? __float_as_uint(value - high) + 0x1000 : 0;  // rounded to TF32, too
  }
  return result;
}

#endif  // FSP_AMPERE

// --- one step: the first 16 summed elements ------------------------------------------------------

// Without tensor cores: each thread computes its own results.
template <int LINES, int COLUMNS, class X, class Y>
__device__ __forceinline__ void step_plainly(Accumulator<LINES, COLUMNS>& result, const X& x,
                                             const Y& y) {
  using Of = Share<LINES, COLUMNS>;
  const int line = Of::first_line() + threadIdx.x % 32 / 4;
  const int column = Of::first_column() + threadIdx.x % 4 * 2;
#pragma unroll 1  // registers are scarce
  for (int k = 0; k < 16; ++k) {
#pragma unroll
    for (int i = 0; i < 2 * Of::down; ++i) {
      const float left = x.at(line + 8 * i, k);
#pragma unroll
      for (int j = 0; j < 4 * Of::across; ++j) {
        float& value = result.values[i / 2][j / 4][j / 2 % 2][i % 2 * 2 + j % 2];
        value = fmaf(left, y.at(column + j / 2 * 8 + j % 2, k), value);
      }
    }
  }
}

// Two operands of the same 16-bit type.
template <int LINES, int COLUMNS, class X, class Y>
__device__ __forceinline__ void step_halves(Accumulator<LINES, COLUMNS>& result, const X& x,
                                            const Y& y) {
  using Of = Share<LINES, COLUMNS>;
  Fragment lines[Of::down];
#pragma unroll
  for (int i = 0; i < Of::down; ++i) {
    lines[i] = load_fragment<false>(x, Of::first_line() + 16 * i, 0);
  }
#pragma unroll
  for (int j = 0; j < Of::across; ++j) {
    const Fragment columns = load_fragment<true>(y, Of::first_column() + 16 * j, 0);
#pragma unroll
    for (int i = 0; i < Of::down; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        Mma16<typename X::Element>::mma(result.values[i][j][e], lines[i], columns.r[2 * e],
                                        columns.r[2 * e + 1]);
      }
    }
  }
}

#if FSP_AMPERE

// A slope that was rounded to TF32, and a map of fp16.
template <int LINES, int COLUMNS, class X, class Y>
__device__ __forceinline__ void step_fp16_slope(Accumulator<LINES, COLUMNS>& result, const X& x,
                                                const Y& y) {
  using Of = Share<LINES, COLUMNS>;
  constexpr bool pairs = Y::inner == 1;
  Fragment lines[2][Of::down];
#pragma unroll
  for (int i = 0; i < 2 * Of::down; ++i) {
    lines[i % 2][i / 2] = load_fp32<false, pairs>(x, Of::first_line() + i / 2 * 16, i % 2 * 8);
  }
#pragma unroll
  for (int j = 0; j < Of::across; ++j) {
    const Fragment columns = load_fragment<true, !pairs>(y, Of::first_column() + 16 * j, 0);
    const auto widened = [&](int half, int e, int shift) {
      const auto bits = static_cast<uint16_t>(columns.r[2 * e + half] >> shift);
      return __float_as_uint(widen(__ushort_as_half(bits)));
    };
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const uint32_t b0 = widened(half, e, 0), b1 = widened(half, e, 16);
#pragma unroll
        for (int i = 0; i < Of::down; ++i) {
          mma_tf32(result.values[i][j][e], lines[half][i].r, b0, b1);
        }
      }
    }
  }
}

// Two operands of fp32.
template <int LINES, int COLUMNS, class X, class Y>
__device__ __forceinline__ void step_fp32(Accumulator<LINES, COLUMNS>& result, const X& x,
                                          const Y& y, bool split) {
  using Of = Share<LINES, COLUMNS>;
#pragma unroll 1
  for (int half = 0; half < 16; half += 8) {
    Terms lines[Of::down];
#pragma unroll
    for (int i = 0; i < Of::down; ++i) {
      lines[i] = load_terms<false>(x, Of::first_line() + 16 * i, half, split);
    }
#pragma unroll
    for (int j = 0; j < Of::across; ++j) {
      const Terms columns = load_terms<true>(y, Of::first_column() + 16 * j, half, split);
#pragma unroll
      for (int i = 0; i < Of::down; ++i) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float(&d)[4] = result.values[i][j][e];
          if (split) {  // the smallest terms first
            mma_tf32(d, lines[i].low.r, columns.high.r[2 * e], columns.high.r[2 * e + 1]);
            mma_tf32(d, lines[i].high.r, columns.low.r[2 * e], columns.low.r[2 * e + 1]);
          }
          mma_tf32(d, lines[i].high.r, columns.high.r[2 * e], columns.high.r[2 * e + 1]);
        }
      }
    }
  }
}

#endif  // FSP_AMPERE

template <int LINES, int COLUMNS, class X, class Y>
__device__ __forceinline__ void step(Accumulator<LINES, COLUMNS>& result, const X& x, const Y& y,
                                     bool split) {
  using Left = typename X::Element;
  using Right = typename Y::Element;
  if constexpr (std::is_same_v<Left, Right> && (std::is_same_v<Left, __half> ||
                                                (FSP_AMPERE && sizeof(Left) == 2))) {
    step_halves(result, x, y);
  } else {
#if FSP_AMPERE
    if constexpr (std::is_same_v<Right, __half>) {
      step_fp16_slope(result, x, y);
    } else {
      step_fp32(result, x, y, split);
    }
#else
    step_plainly(result, x, y);
#endif
  }
}

// result += x y^T over `count` summed elements, rounded up to whole steps: tiles are zero beyond.
template <int LINES, int COLUMNS, class X, class Y>
__device__ __forceinline__ void multiply(Accumulator<LINES, COLUMNS>& result, const X& x,
                                         const Y& y, int count, bool split) {
  if (Share<LINES, COLUMNS>::idle()) return;
  X left = x;
  Y right = y;
#pragma unroll 1
  for (int k = 0; k < count; k += 16) {
    step(result, left, right, split);
    left.data += 16 * X::inner;
    right.data += 16 * Y::inner;
  }
}

// Call add(sum) with a sum that begins at zero, then result += sum. Tensor cores truncate their
// sums where fp32 would be rounded. Over thousands of terms this error, always towards zero, adds
// up.
template <int LINES, int COLUMNS, class Add>
__device__ __forceinline__ void in_short_sums(Accumulator<LINES, COLUMNS>& result, Add add) {
  Accumulator<LINES, COLUMNS> sum;
  sum.clear();
  add(sum);
  result.add(sum);
}

}  // namespace fsp
