// The loss in one pass, matrix form: one block for each sample of each pair.
//
// For pairs whose residual fits the registers of a block. The first sweep over the positions
// accumulates it; the second, over maps that should still be in cache, writes the gradients.
#pragma once

#include "group.cuh"
#include "residual.cuh"

namespace fsp {

// A sample of a pair with at most CHANNELS channels on either side.
template <class T, int CHANNELS>
struct OnePass {
  // As many positions as make whole lines of 64 or 128 bytes and leave room for two stages.
  static constexpr int positions = sizeof(T) == 2 && CHANNELS < 128 ? 64 : 32;
  static constexpr int line = CHANNELS + 4;  // of the residual in shared memory
  using Stages = Maps<T, CHANNELS, positions>;
  using Other = Tile<T, CHANNELS, positions>;
  using Own = Tile<float, CHANNELS, positions>;

  // In this order in shared memory, the first sweep's tiles in the place of all that follow them.
  static constexpr int scratch_bytes = (WARPS + CHANNELS) * sizeof(float);
  static constexpr int residual_bytes = CHANNELS * line * sizeof(float);
  static constexpr int own_bytes = CHANNELS * Own::position_line * sizeof(float);

  static constexpr int shared_bytes(int stages) {
    const int first = stages * Stages::bytes;
    const int second = residual_bytes + own_bytes + stages * Other::bytes;
    return scratch_bytes + (first > second ? first : second);
  }

  const Pair& pair;
  int sample, stages;

  static __device__ __forceinline__ float* scratch() {  // WARPS sums
    return reinterpret_cast<float*>(shared_memory());
  }
  static __device__ __forceinline__ float* inverses() {  // CHANNELS
    return scratch() + WARPS;
  }
  // (CHANNELS, line), D / K and then the derivative of the norm by it.
  static __device__ __forceinline__ float* slope() {
    return reinterpret_cast<float*>(shared_memory() + scratch_bytes);
  }
  static __device__ __forceinline__ float* own() {  // a tile of a gradient
    return reinterpret_cast<float*>(shared_memory() + scratch_bytes + residual_bytes);
  }
  static __device__ __forceinline__ T* other(int stage) {  // of the map it is multiplied with
    unsigned char* first = shared_memory() + scratch_bytes + residual_bytes + own_bytes;
    return reinterpret_cast<T*>(first) + stage * Other::size;
  }

  // The loss of the sample, unweighted, for thread 0; and the gradients asked for.
  __device__ __forceinline__ float run() {
    Accumulator<CHANNELS, CHANNELS> residual;
    residual_tile<T, CHANNELS, positions>(residual, pair, sample, 0, 0, 0, stages,
                                          reinterpret_cast<T*>(slope()));
    residual.store(slope(), line);
    const float loss = pair.norm == Norm::column ? column_lengths() : squares(residual);
    const float total = block_sum(loss, scratch());  // by then the slope is there for all threads
#pragma unroll 1
    for (int map = 0; map < 4; ++map) {
      if (pair.gradients[map].data != nullptr) gradient(map);
    }
    return total;
  }

  // This thread's share of the sum of the columns' lengths, by which their slopes are divided.
  __device__ __forceinline__ float column_lengths() {
    __syncthreads();
    float length = 0;
    if (threadIdx.x < CHANNELS) {
      for (int i = 0; i < pair.m; ++i) {
        const float value = slope()[i * line + threadIdx.x];
        length = fmaf(value, value, length);
      }
      length = sqrtf(length);
      inverses()[threadIdx.x] = inverse_length(length);
    }
    __syncthreads();
    for (int e = threadIdx.x; e < CHANNELS * CHANNELS; e += THREADS) {
      slope()[e / CHANNELS * line + e % CHANNELS] *= inverses()[e % CHANNELS];
    }
    return length;
  }

  // (scale * slope) @ other, or with the slope transposed, is the gradient of a map.
  __device__ __forceinline__ void gradient(int map) {
    const bool first = map % 2 == 0, teacher = map >= 2;
    float scale = pair.norm == Norm::column ? pair.factor : 2 * pair.factor;
    if (teacher) scale = -scale;
    if (teacher && pair.residual == Residual::ready) {
      write_matrix_gradient<CHANNELS, CHANNELS>(slope(), line, pair, sample, 0, 0, scale);
      return;
    }
    const Map& partner = pair.maps[map ^ 1];
    const int count = pair.positions[teacher];
    const int own_channels = first ? pair.m : pair.n, other_channels = first ? pair.n : pair.m;
    const Slope x{{slope(), first ? line : 1, first ? 1 : line}, scale / count};
    pipeline(
        0, (count + positions - 1) / positions, stages,
        [&](int block, int stage) {
          load_tile<Other>(other(stage), partner, sample, 0, block * positions,
                           other_channels, count);
        },
        [&](int block, int stage) {
          Accumulator<CHANNELS, positions> result;
          result.clear();
          const Operand<T> y = by_position<Other>(other(stage), partner);
          multiply(result, x, y, other_channels, pair.split);
          result.store(own(), Own::position_line);
          __syncthreads();
          write_gradient<CHANNELS, positions>(own(), pair.gradients[map], pair.maps[map], sample, 0,
                                              block * positions, own_channels, count);
        });
  }
};

// Weighted losses, one for each block, into `partials`, and all gradients asked for: of pairs whose
// tiles have 128 channels (WIDE), of which a multiprocessor has registers for one block, or less.
template <class T, bool WIDE>
__global__ void __launch_bounds__(THREADS, WIDE ? 1 : 2)
    fsp_one_pass(const __grid_constant__ Pairs group) {
  const Place place = place_of_block(group);
  const Pair& pair = group.entries[place.entry];
  float loss;
  if constexpr (WIDE) {
    loss = OnePass<T, 128>{pair, place.program, group.stages}.run();
  } else if (pair.tile == 64) {
    loss = OnePass<T, 64>{pair, place.program, group.stages}.run();
  } else {
    loss = OnePass<T, 32>{pair, place.program, group.stages}.run();
  }
  if (threadIdx.x == 0) group.partials[pair.partial + place.program] = loss * pair.factor;
}

}  // namespace fsp
