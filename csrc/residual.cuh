// Tiles of the residual D / K = G^S - G^T, their squares and their slopes.
//
// Student a (m, K), b (n, K), teacher c, d; differences p = a - c, q = b - d. If there is a mask,
// sums are divided by the number of positions that count in a sample, instead of K.
#pragma once

#include "pipeline.cuh"
#include "product.cuh"

namespace fsp {

// Tiles of the four maps in shared memory, `stages` times.
template <class T, int CHANNELS, int POSITIONS>
struct Maps {
  using Shape = Tile<T, CHANNELS, POSITIONS>;
  static constexpr int bytes = 4 * Shape::bytes;  // for each stage

  static __device__ __forceinline__ T* tile(T* memory, int map, int stage) {
    return memory + (4 * stage + map) * Shape::size;
  }
};

// The blocks of positions that one part of a sum takes.
struct Range {
  int begin, end;
};

__device__ __forceinline__ Range blocks_of_part(int positions, int block, int part, int parts) {
  const int blocks = (positions + block - 1) / block;
  const int span = (blocks + parts - 1) / parts;
  const int begin = part * span;
  return {begin < blocks ? begin : blocks, begin + span < blocks ? begin + span : blocks};
}

// A tile (CHANNELS, CHANNELS) of D / K from `line` and `column` on, summed over one part of the
// positions.
template <class T, int CHANNELS, int POSITIONS>
__device__ __forceinline__ void residual_tile(Accumulator<CHANNELS, CHANNELS>& result,
                                              const Pair& pair, int sample, int line, int column,
                                              int part, int stages, T* memory) {
  using Stages = Maps<T, CHANNELS, POSITIONS>;
  using Shape = typename Stages::Shape;
  const bool difference = pair.residual == Residual::difference;
  const bool apart = pair.residual == Residual::apart;
  float scale = pair.residual == Residual::plain ? pair.factor : 1.0f / divisor(pair, 0, sample);
  result.clear();
  // Sum over the positions of one network after the other (apart), or of both together.
#pragma unroll 1
  for (int first = 0; first < (apart ? 4 : 2); first += 2) {
    const int positions = pair.positions[first / 2];
    if (first == 2) {
      // Convert the student's sum to the teacher's scale and sign, so that one accumulator is
      // enough.
      const float by = divisor(pair, 1, sample), ratio = -scale * by;
      result.for_each([&](int, int, float& value) { value *= ratio; });
      scale = -1.0f / by;
    }
    const int last = difference ? 4 : first + 2;
    const Range blocks = blocks_of_part(positions, POSITIONS, part, pair.parts);
    pipeline(
        blocks.begin, blocks.end, stages,
        [&](int block, int stage) {
#pragma unroll 1
          for (int map = first; map < last; ++map) {
            const bool of_first = map % 2 == 0;
            load_tile<Shape>(Stages::tile(memory, map, stage), pair.maps[map], sample,
                             of_first ? line : column, block * POSITIONS,
                             of_first ? pair.m : pair.n, positions);
          }
        },
        [&](int block, int stage) {
          const auto tile = [&](int map) { return Stages::tile(memory, map, stage); };
          // Networks that are subtracted have one mask.
          if (pair.masks[first / 2].data != nullptr) {
#pragma unroll 1
            for (int map = first; map < last; ++map) {
              hide<Shape>(tile(map), pair.maps[map].channels_inner, pair.masks[first / 2].data,
                          sample, block * POSITIONS, positions);
            }
            __syncthreads();  // the zeros are there
          }
          if (difference) {  // p replaces a, and q replaces d
            subtract<Shape>(tile(0), tile(0), tile(2), pair.maps[0], pair.maps[2]);
            subtract<Shape>(tile(3), tile(1), tile(3), pair.maps[1], pair.maps[3]);
            __syncthreads();
          }
          if (Accumulator<CHANNELS, CHANNELS>::Of::idle()) return;
          const int left = positions - block * POSITIONS;
          const int count = left < POSITIONS ? left : POSITIONS;
          in_short_sums(result, [&](auto& sum) {
#pragma unroll 1
            for (int map = first; map < last; map += 2) {  // p b^T, then c q^T
              by_channel<Shape>(tile(map), pair.maps[map], [&](const auto& x) {
                by_channel<Shape>(tile(map + 1), pair.maps[map + 1], [&](const auto& y) {
                  multiply(sum, x, y, count, pair.split);
                });
              });
            }
          });
        });
  }
  const Map& ready = pair.maps[2];
  const bool subtracts = pair.residual == Residual::ready && part == 0;
  result.for_each([&](int i, int j, float& value) {
    value *= scale;
    i += line;
    j += column;
    if (subtracts && i < pair.m && j < pair.n) {
      value -= read(ready.data, ready.scalar,
                    sample * ready.sample + i * ready.channel + j * ready.width);
    }
  });
}

// This thread's share of the sum of squares of a tile.
template <int LINES, int COLUMNS>
__device__ __forceinline__ float squares(Accumulator<LINES, COLUMNS>& tile) {
  float total = 0;
  tile.for_each([&](int, int, float& value) { total = fmaf(value, value, total); });
  return total;
}

// 1 / length, or 0 for a length of 0: as in PyTorch, the subgradient of a zero column is zero.
__device__ __forceinline__ float inverse_length(float length) {
  return length == 0 ? 0.0f : 1.0f / length;
}

// The factor from D / K to slopes. (For the column norm the columns of D / K are divided by their
// lengths first.) Slopes are scaled before they are multiplied, because the product might overflow.
__device__ __forceinline__ float slope_scale(const Pair& pair, int sample) {
  return (pair.norm == Norm::column ? pair.factor : 2 * pair.factor) / divisor(pair, 0, sample);
}

}  // namespace fsp
