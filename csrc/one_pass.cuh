// The loss in one pass, matrix form: one block for each sample of each pair.
//
// It is for pairs whose residual fits the registers of a block. The first sweep over the positions
// accumulates the residual. The second writes the gradients, from maps that should still be in
// cache.
#pragma once

#include "group.cuh"
#include "residual.cuh"

namespace fsp {

// A sample of a pair with at most CHANNELS channels on either side.
template <class T, int CHANNELS>
struct OnePass {
  // Positions of a tile: they make whole lines of 64 or 128 bytes and leave room for two stages.
  static constexpr int positions = sizeof(T) == 2 && CHANNELS < 128 ? 64 : 32;
  using Stages = Maps<T, CHANNELS, positions>;
  using Block = Accumulator<CHANNELS, CHANNELS>;
  using Element = SlopeOf<T>;
  static constexpr int line = CHANNELS + 16 / sizeof(Element);  // of the slope in shared memory
  using Other = Tile<T, CHANNELS, positions>;
  using Own = Tile<float, CHANNELS, positions>;

  // The order in shared memory is scratch, slope, own, other. The tiles of the first sweep use the
  // memory of slope, own and other.
  static constexpr int scratch_bytes = (WARPS + CHANNELS) * sizeof(float);
  static constexpr int slope_bytes = CHANNELS * line * sizeof(Element);
  static constexpr int own_bytes = CHANNELS * Own::position_line * sizeof(float);

  static constexpr int shared_bytes(int stages) {
    const int first = stages * Stages::bytes;
    const int second = slope_bytes + own_bytes + stages * Other::bytes;
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
  template <class Number>
  static __device__ __forceinline__ Number* after_scratch(int bytes) {
    return reinterpret_cast<Number*>(shared_memory() + scratch_bytes + bytes);
  }
  // (CHANNELS, line), scaled for the student's gradients
  static __device__ __forceinline__ Element* slope() { return after_scratch<Element>(0); }
  static __device__ __forceinline__ float* own() {  // a tile of a gradient
    return after_scratch<float>(slope_bytes);
  }
  static __device__ __forceinline__ T* other(int stage) {  // a tile of the map in the product
    return after_scratch<T>(slope_bytes + own_bytes) + stage * Other::size;
  }

  // Write the wanted gradients. Returns to thread 0 the loss of the sample, unweighted.
  __device__ __forceinline__ float run() {
    Block residual;
    residual_tile<T, CHANNELS, positions>(residual, pair, sample, 0, 0, 0, stages,
                                          after_scratch<T>(0));
    const float loss =
        pair.norm == Norm::column ? divide_by_lengths(residual) : squares(residual);
    const bool ready = pair.residual == Residual::ready;
    if (ready && pair.gradients[2].data != nullptr) write_matrix_gradient(residual);
    store_slope(residual);
    const float total = block_sum(loss, scratch());  // then all threads see the slope, too
#pragma unroll 1
    for (int map = 0; map < (ready ? 2 : 4); ++map) {
      if (pair.gradients[map].data != nullptr) gradient(map);
    }
    return total;
  }

  // Divide the columns by their lengths. Returns this thread's share of the sum of the lengths.
  __device__ __forceinline__ float divide_by_lengths(Block& residual) {
    float* const sums = after_scratch<float>(0);  // (warps_down, CHANNELS)
    residual.column_squares(sums);
    __syncthreads();  // the sums of all warps are there
    float length = 0;
    if (threadIdx.x < CHANNELS) {
      for (int i = 0; i < Block::Of::warps_down; ++i) length += sums[i * CHANNELS + threadIdx.x];
      length = sqrtf(length);
      inverses()[threadIdx.x] = inverse_length(length);
    }
    __syncthreads();  // the inverses are there, and nobody reads the sums any more
    residual.for_each([](int, int column, float& value) { value *= inverses()[column]; });
    return length;
  }

  __device__ __forceinline__ void write_matrix_gradient(Block& residual) {
    const Map& gradient = pair.gradients[2];
    const float scale = -slope_scale(pair, sample) * divisor(pair, 0, sample);
    residual.for_each([&](int i, int j, float& value) {
      if (i < pair.m && j < pair.n) {
        write(gradient.data, gradient.scalar,
              sample * gradient.sample + i * gradient.channel + j * gradient.width, value * scale);
      }
    });
  }

  __device__ __forceinline__ void store_slope(Block& residual) {
    constexpr Scalar stored = sizeof(Element) == 2 ? Scalar::bf16 : Scalar::fp32;
    const float scale = slope_scale(pair, sample);
    residual.for_pairs([&](int i, int j, float first, float second) {
      struct alignas(2 * sizeof(Element)) Two {
        Element first, second;
      };
      const auto rounded = [&](float x) {
        return narrow<Element>(storable_slope(x * scale, stored, pair.split));
      };
      *reinterpret_cast<Two*>(slope() + i * line + j) = {rounded(first), rounded(second)};
    });
  }

  // Write slope @ other, or slope^T @ other, as the gradient of a map.
  __device__ __forceinline__ void gradient(int map) {
    const bool first = map % 2 == 0, teacher = map >= 2;
    const Map& partner = pair.maps[map ^ 1];
    const int count = pair.positions[teacher];
    const float ratio = teacher ? -divisor(pair, 0, sample) / divisor(pair, 1, sample) : 1.0f;
    const int own_channels = first ? pair.m : pair.n, other_channels = first ? pair.n : pair.m;
    pipeline(
        0, (count + positions - 1) / positions, stages,
        [&](int block, int stage) {
          load_tile<Other>(other(stage), partner, sample, 0, block * positions,
                           other_channels, count);
        },
        [&](int block, int stage) {
          Accumulator<CHANNELS, positions> result;
          result.clear();
          by_position<Other>(other(stage), partner, [&](const auto& y) {
            if (first) {
              const Operand<Element, line, true> x{slope()};
              multiply(result, x, y, other_channels, pair.split);
            } else {
              const Operand<Element, line, false> x{slope()};
              multiply(result, x, y, other_channels, pair.split);
            }
          });
          result.store(own(), Own::position_line, ratio);
          __syncthreads();
          write_gradient<CHANNELS, positions>(own(), pair.gradients[map], pair.maps[map],
                                              pair.masks[teacher].data, sample, 0,
                                              block * positions, own_channels, count);
        });
  }
};

// Write weighted losses, one for each block, to `partials`, and all wanted gradients. With WIDE the
// tiles of all pairs have 128 channels, and a multiprocessor has registers for one block; without
// WIDE they have fewer.
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
