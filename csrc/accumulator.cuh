// What the threads of a block hold and share when they multiply two tiles: operands in shared
// memory, each warp's share of the result, and sums over the block.
#pragma once

#include "maps.cuh"

namespace fsp {

// An operand of lines `i` (or `j`) and summed elements `k`. Either the lines or the summed elements
// are neighbours in memory; the others are STRIDE apart. The compiler knows which, so in a loop
// only one address is not a constant.
template <class T, int STRIDE, bool SUMMED_INNER>
struct Operand {
  using Element = T;
  static constexpr int line = SUMMED_INNER ? STRIDE : 1, inner = SUMMED_INNER ? 1 : STRIDE;
  const T* data;

  __device__ __forceinline__ float at(int i, int k) const {
    return widen(data[i * line + k * inner]);
  }
};

// Call run(operand) with the tile as an operand whose lines are channels, or (by_position)
// positions.
template <class Shape, class T, class Run>
__device__ __forceinline__ void by_channel(const T* tile, const Map& map, Run run) {
  if (map.channels_inner) {
    run(Operand<T, Shape::channel_line, false>{tile});
  } else {
    run(Operand<T, Shape::position_line, true>{tile});
  }
}

template <class Shape, class T, class Run>
__device__ __forceinline__ void by_position(const T* tile, const Map& map, Run run) {
  if (map.channels_inner) {
    run(Operand<T, Shape::channel_line, true>{tile});
  } else {
    run(Operand<T, Shape::position_line, false>{tile});
  }
}

// --- who computes what ---------------------------------------------------------------------------

// How the warps of a block share a result (LINES, COLUMNS): each has `down` x `across` blocks of
// 16 x 16. If there are fewer blocks than warps, some warps are idle.
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

// This thread's part of a result (LINES, COLUMNS) of the block. Each 16 x 16 of its warp is two
// 16 x 8, of which a thread holds the elements that mma gives it.
template <int LINES, int COLUMNS>
struct Accumulator {
  using Of = Share<LINES, COLUMNS>;
  float values[Of::down][Of::across][2][4];

  __device__ __forceinline__ void clear() {
    for_each([](int, int, float& value) { value = 0; });
  }

  // Call visit(line, column, first, second) for each two of this thread's values that are
  // neighbours in a line.
  template <class Visit>
  __device__ __forceinline__ void for_pairs(Visit visit) {
    if (Of::idle()) return;
    const int lane = threadIdx.x % 32;
    const int line = Of::first_line() + lane / 4, column = Of::first_column() + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < Of::down; ++i) {
#pragma unroll
      for (int j = 0; j < Of::across; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float* pair = &values[i][j][e / 2][e % 2 * 2];
          visit(line + 16 * i + e % 2 * 8, column + 16 * j + e / 2 * 8, pair[0], pair[1]);
        }
      }
    }
  }

  // Call visit(line, column, value) for each of this thread's values.
  template <class Visit>
  __device__ __forceinline__ void for_each(Visit visit) {
    for_pairs([&](int line, int column, float& first, float& second) {
      visit(line, column, first);
      visit(line, column + 1, second);
    });
  }

  // Write the sums of squares of this warp's part of each column to its line of `sums`
  // (warps_down, COLUMNS).
  __device__ __forceinline__ void column_squares(float* sums) {
    if (Of::idle()) return;
    const int lane = threadIdx.x % 32, line = threadIdx.x / 32 % Of::warps_down;
    sums += line * COLUMNS + Of::first_column() + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < Of::across; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float total = 0;
#pragma unroll
        for (int i = 0; i < 2 * Of::down; ++i) {
          const float value = values[i / 2][j][e / 2][i % 2 * 2 + e % 2];
          total = fmaf(value, value, total);
        }
        for (int step = 4; step < 32; step *= 2) total += __shfl_xor_sync(~0u, total, step);
        if (lane < 4) sums[16 * j + e / 2 * 8 + e % 2] = total;
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

  // Write to shared memory, in lines of `stride` elements.
  __device__ __forceinline__ void store(float* tile, int stride, float scale = 1) {
    for_pairs([&](int line, int column, float& first, float& second) {
      *reinterpret_cast<float2*>(tile + line * stride + column) =
          make_float2(first * scale, second * scale);
    });
  }
};

// --- sums over a block ---------------------------------------------------------------------------

// Returns to thread 0 the sum of `value` over all threads, in a fixed order. `scratch` is WARPS
// numbers in shared memory, which are free again afterwards.
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
