// Products of two tiles by the warps of a block, C(i, j) += sum_k x(i, k) y(j, k): on tensor cores
// where the chip has them for the operands at hand, else by fused multiply-adds of fp32.
//
// Halves are multiplied as they are, exactly, into fp32. fp32 is multiplied in three products of
// TF32 (`split`), which keep 22 bits, or in one. What a kernel computed itself, a residual, is
// fp32; beside bf16 it is split in two terms of bf16, beside fp16, whose range it may exceed,
// rounded to TF32, which holds fp16 exactly.
#pragma once

#include <type_traits>

#include "maps.cuh"

namespace fsp {

// Lines `i` or `j` of an operand lie `line` elements apart, the summed elements `inner` apart; one
// of the two is 1.
template <class T>
struct Operand {
  const T* data;
  int line, inner;

  __device__ __forceinline__ float at(int i, int k) const {
    return widen(data[i * line + k * inner]);
  }
};

// x - y, in fp32: what is multiplied in the difference form.
struct Difference {
  Operand<float> x, y;

  __device__ __forceinline__ float at(int i, int k) const { return x.at(i, k) - y.at(i, k); }
};

// A residual, times the scale of a gradient. The product of what is not scaled may overflow.
struct Slope {
  Operand<float> values;
  float scale;

  __device__ __forceinline__ float at(int i, int k) const { return values.at(i, k) * scale; }
};

// A tile as an operand whose lines are channels, or positions.
template <class Shape, class T>
__device__ __forceinline__ Operand<T> by_channel(const T* tile, const Map& map) {
  return {tile, Shape::channel_stride(map.channels_inner),
          Shape::position_stride(map.channels_inner)};
}

template <class Shape, class T>
__device__ __forceinline__ Operand<T> by_position(const T* tile, const Map& map) {
  return {tile, Shape::position_stride(map.channels_inner),
          Shape::channel_stride(map.channels_inner)};
}

// --- who computes what ---------------------------------------------------------------------------

// How the warps of a block share (LINES, COLUMNS): each has `down` x `across` blocks of 16 x 16.
// Where there are fewer of these than warps, some have nothing to do.
template <int LINES, int COLUMNS>
struct Share {
  static constexpr int warps_down = LINES / 16 < 4 ? LINES / 16 : 4;
  static constexpr int warps_left = WARPS / warps_down;
  static constexpr int warps_across = COLUMNS / 16 < warps_left ? COLUMNS / 16 : warps_left;
  static constexpr int down = LINES / 16 / warps_down;
  static constexpr int across = COLUMNS / 16 / warps_across;

  static __device__ __forceinline__ int first_line() {
    return threadIdx.x / 32 % warps_down * (16 * down);
  }
  static __device__ __forceinline__ int first_column() {
    return threadIdx.x / 32 / warps_down * (16 * across);
  }
  static __device__ __forceinline__ bool idle() {
    return threadIdx.x / 32 >= warps_down * warps_across;
  }
};

// This thread's part of (LINES, COLUMNS) that the block computes: of each 16 x 16 of its warp two
// 16 x 8, each as mma has its results.
template <int LINES, int COLUMNS>
struct Accumulator {
  using Of = Share<LINES, COLUMNS>;
  float values[Of::down][Of::across][2][4];

  __device__ __forceinline__ void clear() {
    for_each([](int, int, float& value) { value = 0; });
  }

  // visit(line, column, value) of this thread's values.
  template <class Visit>
  __device__ __forceinline__ void for_each(Visit visit) {
    if (Of::idle()) return;
    const int lane = threadIdx.x % 32;
    const int line = Of::first_line() + lane / 4, column = Of::first_column() + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < Of::down; ++i) {
#pragma unroll
      for (int j = 0; j < Of::across; ++j) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          visit(line + 16 * i + e / 2 % 2 * 8, column + 16 * j + e / 4 * 8 + e % 2,
                values[i][j][e / 4][e % 4]);
        }
      }
    }
  }

  __device__ __forceinline__ void add(const Accumulator& other) {
#pragma unroll
    for (int i = 0; i < Of::down; ++i) {
#pragma unroll
      for (int j = 0; j < Of::across; ++j) {
#pragma unroll
        for (int e = 0; e < 8; ++e) values[i][j][e / 4][e % 4] += other.values[i][j][e / 4][e % 4];
      }
    }
  }

  // Put into shared memory, in lines of `stride` elements.
  __device__ __forceinline__ void store(float* tile, int stride, float scale = 1) {
    for_each([&](int line, int column, float& value) {
      tile[line * stride + column] = value * scale;
    });
  }
};

// --- fragments -----------------------------------------------------------------------------------

// 16 lines of an operand by as many summed elements as one mma takes. As the first operand of an
// mma it is `a`; as the second, registers 0 and 2 are `b` of lines 0 to 7, 1 and 3 of lines 8 to
// 15.
struct Fragment {
  uint32_t r[4];
};

template <class T>
__device__ __forceinline__ Fragment load_fragment(const Operand<T>& x, int line, int k) {
  const int lane = threadIdx.x % 32, half = lane % 16, other = lane / 16;
  Fragment result;
  if (x.inner == 1) {
    ldmatrix_x4(result.r, x.data + (line + half) * x.line + k + 8 * other);
  } else {  // lines are neighbours: lane i has row i % 8 of matrix i / 8, a row being one k
    ldmatrix_x4_trans(result.r,
                      x.data + (k + lane % 8 + 8 * other) * x.inner + line + (half & 8));
  }
  return result;
}

template <class T>
struct Sixteen;  // 16-bit elements on tensor cores

template <>
struct Sixteen<__half> {
  static __device__ __forceinline__ void mma(float (&d)[4], const Fragment& a, uint32_t b0,
                                             uint32_t b1) {
    mma_f16(d, a.r, b0, b1);
  }
};

#if FSP_AMPERE

template <>
struct Sixteen<__nv_bfloat16> {
  static __device__ __forceinline__ void mma(float (&d)[4], const Fragment& a, uint32_t b0,
                                             uint32_t b1) {
    mma_bf16(d, a.r, b0, b1);
  }
};

// Rounding to fewer bits makes the largest finite numbers infinite. These are cut off instead, and
// what that leaves of them is finite, too.
__device__ __forceinline__ uint32_t finite_tf32(float x) {
  const uint32_t rounded = to_tf32(x);
  const bool infinite = rounded << 1 == 0xff000000u;  // without the sign
  return infinite ? __float_as_uint(x) & 0xffffe000u : rounded;
}

__device__ __forceinline__ float below_top_of_bf16(float x) {
  const bool top = fabsf(x) >= 0x1.ffp127f;  // NaN is not
  return top ? __uint_as_float(__float_as_uint(x) & 0xffff0000u) : x;
}

// Elements of fp32 as TF32, and what that leaves of them.
struct Terms {
  Fragment high, low;
};

template <class X>
__device__ __forceinline__ Terms load_terms(const X& x, int line, int k, bool split) {
  const int lane = threadIdx.x % 32;
  Terms result;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float value = x.at(line + lane / 4 + i % 2 * 8, k + lane % 4 + i / 2 * 4);
    result.high.r[i] = finite_tf32(value);
    result.low.r[i] = split ? to_tf32(value - __uint_as_float(result.high.r[i])) : 0;
  }
  return result;
}

// The same as two terms of bf16, which hold 16 bits.
__device__ __forceinline__ Terms load_bf16_terms(const Slope& x, int line, int k) {
  const int lane = threadIdx.x % 32;
  Terms result;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int at_line = line + lane / 4 + i % 2 * 8, at = k + lane % 4 * 2 + i / 2 * 8;
    const float first = x.at(at_line, at), second = x.at(at_line, at + 1);
    const uint32_t high = bf16_pair(below_top_of_bf16(first), below_top_of_bf16(second));
    result.high.r[i] = high;
    result.low.r[i] = bf16_pair(first - __uint_as_float(high << 16),
                                second - __uint_as_float(high & 0xffff0000u));
  }
  return result;
}

#endif  // FSP_AMPERE

// --- one step: as many summed elements as an mma takes -------------------------------------------

// Without tensor cores: every thread multiplies for its own results.
template <int LINES, int COLUMNS, class X, class Y>
__device__ __forceinline__ void multiply_plainly(Accumulator<LINES, COLUMNS>& result, const X& x,
                                                 const Y& y, int begin, int end, float sign) {
  using Of = Share<LINES, COLUMNS>;
  const int line = Of::first_line() + threadIdx.x % 32 / 4;
  const int column = Of::first_column() + threadIdx.x % 4 * 2;
  for (int k = begin; k < end; ++k) {
#pragma unroll
    for (int i = 0; i < 2 * Of::down; ++i) {
      const float left = sign * x.at(line + 8 * i, k);
#pragma unroll
      for (int j = 0; j < 4 * Of::across; ++j) {
        float& value = result.values[i / 2][j / 4][j / 2 % 2][i % 2 * 2 + j % 2];
        value = fmaf(left, y.at(column + j / 2 * 8 + j % 2, k), value);
      }
    }
  }
}

// Two maps of 16-bit elements. A negative sign subtracts, so that a residual never grows to what
// it is the difference of.
template <int LINES, int COLUMNS, class T>
__device__ __forceinline__ void step(Accumulator<LINES, COLUMNS>& result, const Operand<T>& x,
                                     const Operand<T>& y, int k, bool, float sign = 1) {
  using Of = Share<LINES, COLUMNS>;
#if !FSP_AMPERE
  if constexpr (!std::is_same_v<T, __half>) {
    multiply_plainly(result, x, y, k, k + 16, sign);
    return;
  } else
#endif
  {
    const uint32_t signs = sign < 0 ? 0x80008000u : 0;
    Fragment lines[Of::down];
#pragma unroll
    for (int i = 0; i < Of::down; ++i) {
      lines[i] = load_fragment(x, Of::first_line() + 16 * i, k);
#pragma unroll
      for (int e = 0; e < 4; ++e) lines[i].r[e] ^= signs;
    }
#pragma unroll
    for (int j = 0; j < Of::across; ++j) {
      const Fragment columns = load_fragment(y, Of::first_column() + 16 * j, k);
#pragma unroll
      for (int i = 0; i < Of::down; ++i) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          Sixteen<T>::mma(result.values[i][j][e], lines[i], columns.r[e], columns.r[2 + e]);
        }
      }
    }
  }
}

// Two operands of fp32, maps or differences of maps; or, unsplit, a residual beside fp16.
template <int LINES, int COLUMNS, class X, class Y>
__device__ __forceinline__ void step_fp32(Accumulator<LINES, COLUMNS>& result, const X& x,
                                          const Y& y, int k, bool split, float sign) {
#if FSP_AMPERE
  using Of = Share<LINES, COLUMNS>;
#pragma unroll 1
  for (int half = 0; half < 16; half += 8) {
    Terms lines[Of::down];
#pragma unroll
    for (int i = 0; i < Of::down; ++i) {
      lines[i] = load_terms(x, Of::first_line() + 16 * i, k + half, split);
      if (sign < 0) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          lines[i].high.r[e] ^= 0x80000000u;
          lines[i].low.r[e] ^= 0x80000000u;
        }
      }
    }
#pragma unroll
    for (int j = 0; j < Of::across; ++j) {
      const Terms columns = load_terms(y, Of::first_column() + 16 * j, k + half, split);
#pragma unroll
      for (int i = 0; i < Of::down; ++i) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float(&d)[4] = result.values[i][j][e];
          if (split) {  // the smallest terms first
            mma_tf32(d, lines[i].low.r, columns.high.r[e], columns.high.r[2 + e]);
            mma_tf32(d, lines[i].high.r, columns.low.r[e], columns.low.r[2 + e]);
          }
          mma_tf32(d, lines[i].high.r, columns.high.r[e], columns.high.r[2 + e]);
        }
      }
    }
  }
#else
  multiply_plainly(result, x, y, k, k + 16, sign);
#endif
}

template <int LINES, int COLUMNS>
__device__ __forceinline__ void step(Accumulator<LINES, COLUMNS>& result, const Operand<float>& x,
                                     const Operand<float>& y, int k, bool split, float sign = 1) {
  step_fp32(result, x, y, k, split, sign);
}

template <int LINES, int COLUMNS>
__device__ __forceinline__ void step(Accumulator<LINES, COLUMNS>& result, const Difference& x,
                                     const Operand<float>& y, int k, bool split) {
  step_fp32(result, x, y, k, split, 1);
}

template <int LINES, int COLUMNS>
__device__ __forceinline__ void step(Accumulator<LINES, COLUMNS>& result, const Operand<float>& x,
                                     const Difference& y, int k, bool split) {
  step_fp32(result, x, y, k, split, 1);
}

// A residual and a map.
template <int LINES, int COLUMNS>
__device__ __forceinline__ void step(Accumulator<LINES, COLUMNS>& result, const Slope& x,
                                     const Operand<float>& y, int k, bool split) {
  step_fp32(result, x, y, k, split, 1);
}

template <int LINES, int COLUMNS>
__device__ __forceinline__ void step(Accumulator<LINES, COLUMNS>& result, const Slope& x,
                                     const Operand<__half>& y, int k, bool) {
  step_fp32(result, x, y, k, false, 1);
}

template <int LINES, int COLUMNS>
__device__ __forceinline__ void step(Accumulator<LINES, COLUMNS>& result, const Slope& x,
                                     const Operand<__nv_bfloat16>& y, int k, bool) {
#if FSP_AMPERE
  using Of = Share<LINES, COLUMNS>;
  Terms lines[Of::down];
#pragma unroll
  for (int i = 0; i < Of::down; ++i) {
    lines[i] = load_bf16_terms(x, Of::first_line() + 16 * i, k);
  }
#pragma unroll
  for (int j = 0; j < Of::across; ++j) {
    const Fragment columns = load_fragment(y, Of::first_column() + 16 * j, k);
#pragma unroll
    for (int i = 0; i < Of::down; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        mma_bf16(result.values[i][j][e], lines[i].low.r, columns.r[e], columns.r[2 + e]);
        mma_bf16(result.values[i][j][e], lines[i].high.r, columns.r[e], columns.r[2 + e]);
      }
    }
  }
#else
  multiply_plainly(result, x, y, k, k + 16, 1);
#endif
}

// result += x y^T over `count` summed elements, rounded up to whole steps: tiles are zero there.
template <int LINES, int COLUMNS, class X, class Y>
__device__ __forceinline__ void multiply(Accumulator<LINES, COLUMNS>& result, const X& x,
                                         const Y& y, int count, bool split) {
  if (Share<LINES, COLUMNS>::idle()) return;
#pragma unroll 1
  for (int k = 0; k < count; k += 16) step(result, x, y, k, split);
}

// result += what add(sum) adds to a sum of its own. Tensor cores cut their sums off where fp32
// would be rounded, and always towards zero: over thousands of terms that adds up.
template <int LINES, int COLUMNS, class Add>
__device__ __forceinline__ void in_short_sums(Accumulator<LINES, COLUMNS>& result, Add add) {
  Accumulator<LINES, COLUMNS> sum;
  sum.clear();
  add(sum);
  result.add(sum);
}

// --- sums over a block ---------------------------------------------------------------------------

// The sum of `value` over all threads, in a fixed order, for thread 0. Uses and then frees
// `scratch`, WARPS numbers in shared memory.
__device__ inline float block_sum(float value, float* scratch) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  value = 0;
  if (threadIdx.x == 0) {
    for (int warp = 0; warp < WARPS; ++warp) value += scratch[warp];
  }
  __syncthreads();
  return value;
}

}  // namespace fsp
