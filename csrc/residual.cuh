// The residual D / K = G^S - G^T, a tile at a time, and what the norms make of it.
//
// Student a (m, K), b (n, K), teacher c, d; differences p = a - c, q = b - d.
#pragma once

#include "pipeline.cuh"
#include "product.cuh"

namespace fsp {

// Tiles of the four maps in shared memory, `stages` times.
template <class T, int CHANNELS, int POSITIONS>
struct Maps {
  using Shape = Tile<T, CHANNELS, POSITIONS>;
  static constexpr int bytes = 4 * Shape::bytes;  // of a stage

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

// (CHANNELS, CHANNELS) of D / K from `line` and `column` on, summed over one part of the positions.
template <class T, int CHANNELS, int POSITIONS>
__device__ __forceinline__ void residual_tile(Accumulator<CHANNELS, CHANNELS>& result,
                                              const Pair& pair, int sample, int line, int column,
                                              int part, int stages, T* memory) {
  using Stages = Maps<T, CHANNELS, POSITIONS>;
  using Shape = typename Stages::Shape;
  const bool both = pair.residual == Residual::difference || pair.residual == Residual::direct;
  const bool apart = pair.residual == Residual::apart;
  float scale = pair.residual == Residual::plain ? pair.factor : 1.0f / pair.positions[0];
  result.clear();
  // The sum over the positions of one network after the other, or of both at once.
#pragma unroll 1
  for (int first = 0; first < (apart ? 4 : 2); first += 2) {
    const int positions = pair.positions[first / 2];
    if (first == 2) {
      // In the teacher's scale, with its sign: one accumulator does for both.
      const float ratio = -scale * positions;
      result.for_each([&](int, int, float& value) { value *= ratio; });
      scale = -1.0f / positions;
    }
    const Range blocks = blocks_of_part(positions, POSITIONS, part, pair.parts);
    pipeline(
        blocks.begin, blocks.end, stages,
        [&](int block, int stage) {
#pragma unroll 1
          for (int map = first; map < (both ? 4 : first + 2); ++map) {
            const bool of_first = map % 2 == 0;
            load_tile<Shape>(Stages::tile(memory, map, stage), pair.maps[map], sample,
                             of_first ? line : column, block * POSITIONS,
                             of_first ? pair.m : pair.n, positions);
          }
        },
        [&](int block, int stage) {
          if (Accumulator<CHANNELS, CHANNELS>::Of::idle()) return;
          const int left = positions - block * POSITIONS;
          const int count = left < POSITIONS ? left : POSITIONS;
          const auto operand = [&](int map) {
            return by_channel<Shape>(Stages::tile(memory, map, stage), pair.maps[map]);
          };
          in_short_sums(result, [&](auto& sum) {
            if (!both) {
              multiply(sum, operand(first), operand(first + 1), count, pair.split);
              return;
            }
            const Operand<T> a = operand(0), b = operand(1), c = operand(2), d = operand(3);
            if constexpr (sizeof(T) == 4) {
              if (pair.residual == Residual::difference) {
#pragma unroll 1
                for (int k = 0; k < count; k += 16) {
                  step(sum, Difference{a, c}, b, k, pair.split);
                  step(sum, c, Difference{b, d}, k, pair.split);
                }
                return;
              }
            }
#pragma unroll 1
            for (int k = 0; k < count; k += 16) {
              step(sum, a, b, k, pair.split);
              step(sum, c, d, k, pair.split, -1);
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

// The sum of squares of a tile, this thread's share.
template <int LINES, int COLUMNS>
__device__ __forceinline__ float squares(Accumulator<LINES, COLUMNS>& tile) {
  float total = 0;
  tile.for_each([&](int, int, float& value) { total = fmaf(value, value, total); });
  return total;
}

// A derivative of the square root that is zero at zero, as PyTorch has it.
__device__ __forceinline__ float inverse_length(float length) {
  return length == 0 ? 0.0f : 1.0f / length;
}

// Write `scale` times `tile`, (LINES, COLUMNS) of D's derivative, as a ready matrix's gradient.
template <int LINES, int COLUMNS>
__device__ void write_matrix_gradient(const float* tile, int stride, const Pair& pair, int sample,
                                      int line, int column, float scale) {
  const Map& gradient = pair.gradients[2];
  for (int e = threadIdx.x; e < LINES * COLUMNS; e += THREADS) {
    const int i = e / COLUMNS, j = e % COLUMNS;
    if (line + i < pair.m && column + j < pair.n) {
      write(gradient.data, gradient.scalar,
            sample * gradient.sample + (line + i) * gradient.channel +
                (column + j) * gradient.width,
            tile[i * stride + j] * scale);
    }
  }
}

}  // namespace fsp
