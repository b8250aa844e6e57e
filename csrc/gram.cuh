// The loss in one pass, Gram form, for few positions and many channels: one block for each sample.
//
// With the differences p = a - c and q = b - d of residual.cuh, and pp for p^T p,
//
//     ||D||^2 = <pp, bb> + 2 <cp, qb> + <cc, qq>
//
//     D b   = p bb + c qb                     D^T a = b (pp + cp^T) + q (cp + cc)
//     D d   = p (bb - qb^T) + c (qb - qq)     D^T c = b cp^T + q cc
//
// so only six K x K blocks are accumulated, in the threads' registers, and no m x n object exists.
// Below, x, y stand for p, c on the side of the first maps and for b, q on the side of the second.
// Maps of any dtype are converted to fp32 in shared memory, and products are of TF32.
#pragma once

#include "group.cuh"
#include "residual.cuh"

namespace fsp {

// A sample of a pair with at most POSITIONS positions.
template <int POSITIONS>
struct Gram {
  static constexpr int channels = 32;  // of a tile
  static constexpr int line = POSITIONS + 4;
  using Side = Tile<float, channels, POSITIONS>;
  using Block = Accumulator<POSITIONS, POSITIONS>;

  // x^T x / K, y^T x / K and y^T y / K of one side. They are divided before they are multiplied
  // with each other, because the products might overflow.
  struct Blocks {
    Block xx, yx, yy;
  };

  static constexpr int scratch_bytes = WARPS * sizeof(float);
  static constexpr int block_bytes = POSITIONS * line * sizeof(float);
  static constexpr int own_bytes = channels * line * sizeof(float);

  static constexpr int shared_bytes(int stages) {
    return scratch_bytes + 2 * block_bytes + own_bytes + stages * 2 * Side::bytes;
  }

  const Pair& pair;
  int sample, stages;
  float* scratch;
  float* by_x;  // (POSITIONS, line): what x and y are multiplied with for a gradient
  float* by_y;
  float* own;     // a tile of a gradient
  float* memory;  // tiles of a student's and a teacher's map, `stages` times

  __device__ Gram(const Pair& pair, int sample, int stages)
      : pair(pair), sample(sample), stages(stages) {
    scratch = reinterpret_cast<float*>(shared_memory());
    by_x = scratch + WARPS;
    by_y = by_x + POSITIONS * line;
    own = by_y + POSITIONS * line;
    memory = own + channels * line;
  }

  // Write the wanted gradients. Returns to thread 0 the loss of the sample, unweighted.
  __device__ __forceinline__ float run() {
    Blocks first, second;
    accumulate(first, 0);
    accumulate(second, 1);
    float loss = block_sum(inner_product(first, second), scratch);
    // Rounding errors may make it negative: it becomes zero, or NaN after an overflow to -inf.
    if (loss < 0) loss *= 0.0f;
#pragma unroll 1
    for (int map = 0; map < 4; ++map) {
      if (pair.gradients[map].data == nullptr) continue;
      write_operands_of(map, first, second);
      gradient(map, map < 2 ? 1.0f : -1.0f);
    }
    return loss;
  }

  __device__ static float inner_product(Blocks& first, Blocks& second) {
    float total = 0;
    if (Block::Of::idle()) return total;
#pragma unroll
    for (int i = 0; i < Block::Of::down; ++i) {
#pragma unroll
      for (int j = 0; j < Block::Of::across; ++j) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const auto of = [&](Block& block) { return block.values[i][j][e / 4][e % 4]; };
          total += of(first.xx) * of(second.xx) + 2 * of(first.yx) * of(second.yx) +
                   of(first.yy) * of(second.yy);
        }
      }
    }
    return total;
  }

  // Write a thread's part of a block to shared memory, or add it to what is there. It is scaled as
  // the gradient, so that products do not overflow.
  struct Put {
    bool add;
    float scale;

    __device__ void operator()(float* block, Block& from, float sign = 1) const {
      from.for_each([&](int i, int j, float& value) { put(block[i * line + j], sign * value); });
    }
    __device__ void transposed(float* block, Block& from, float sign = 1) const {
      from.for_each([&](int i, int j, float& value) { put(block[j * line + i], sign * value); });
    }
    __device__ void put(float& to, float value) const {
      to = add ? to + value * scale : value * scale;
    }
  };

  template <class First, class Second>
  __device__ void write_operands(First set, Second add) {
    const float scale = 2 * pair.factor / divisor(pair, 0, sample);
    set(Put{false, scale});
    __syncthreads();  // a transposed element is another thread's
    add(Put{true, scale});  // visible to all threads when a pipeline has its first tile
  }

  // Write by_x and by_y, with which the gradient of a map multiplies x and y.
  __device__ __forceinline__ void write_operands_of(int map, Blocks& first, Blocks& second) {
    switch (map) {
      case 0:
        return write_operands([&](Put put) { put(by_x, second.xx); put(by_y, second.yx); },
                              [](Put) {});
      case 1:
        return write_operands(
            [&](Put put) { put(by_x, first.xx); put(by_y, first.yy); },
            [&](Put put) { put.transposed(by_x, first.yx); put(by_y, first.yx); });
      case 2:
        return write_operands([&](Put put) { put(by_x, second.xx); put(by_y, second.yx); },
                              [&](Put put) {
                                put.transposed(by_x, second.yx, -1);
                                put(by_y, second.yy, -1);
                              });
      default:
        return write_operands(
            [&](Put put) { put.transposed(by_x, first.yx); put(by_y, first.yy); }, [](Put) {});
    }
  }

  // Of both networks, since they are subtracted.
  __device__ const uint8_t* mask() const { return pair.masks[0].data; }

  __device__ float* tile(bool teacher, int stage) const {
    return memory + (2 * stage + teacher) * Side::size;
  }

  // Call run(block, operands) for each tile of channels of one side. operands(use) calls use(x, y),
  // where the lines of x and y are channels (BY_CHANNEL) or positions.
  template <bool BY_CHANNEL, class Run>
  __device__ void for_tiles(int side, Run run) {
    const int count = side == 0 ? pair.m : pair.n;
    const Map &student = pair.maps[side], &teacher = pair.maps[2 + side];
    const auto as_operand = [](const float* from, const Map& map, auto use) {
      if constexpr (BY_CHANNEL) {
        by_channel<Side>(from, map, use);
      } else {
        by_position<Side>(from, map, use);
      }
    };
    pipeline(
        0, (count + channels - 1) / channels, stages,
        [&](int block, int stage) {
#pragma unroll 1
          for (int network = 0; network < 2; ++network) {
            load_tile<Side>(tile(network, stage), pair.maps[side + 2 * network], sample,
                            block * channels, 0, count, pair.positions[0]);
          }
        },
        [&](int block, int stage) {
          // p replaces a, or q replaces d.
          float *const of_student = tile(false, stage), *const of_teacher = tile(true, stage);
          if (mask() != nullptr) {
            for (int network = 0; network < 2; ++network) {
              hide<Side>(tile(network, stage), pair.maps[side + 2 * network].channels_inner, mask(),
                         sample, 0, pair.positions[0]);
            }
            __syncthreads();  // the zeros are there
          }
          subtract<Side>(side == 0 ? of_student : of_teacher, of_student, of_teacher, student,
                         teacher);
          __syncthreads();
          run(block, [&](auto use) {
            as_operand(of_student, student, [&](const auto& x) {
              as_operand(of_teacher, teacher, [&](const auto& y) { use(x, y); });
            });
          });
        });
  }

  __device__ void accumulate(Blocks& blocks, int side) {
    blocks.xx.clear();
    blocks.yx.clear();
    blocks.yy.clear();
    const auto add = [&](Block& block, const auto& left, const auto& right) {
      in_short_sums(block, [&](Block& sum) { multiply(sum, left, right, channels, pair.split); });
    };
    for_tiles<false>(side, [&](int, const auto& operands) {
      if (Block::Of::idle()) return;
      operands([&](const auto& x, const auto& y) {
        add(blocks.xx, x, x);
        add(blocks.yx, y, x);
        add(blocks.yy, y, y);
      });
    });
    const float scale = 1.0f / divisor(pair, 0, sample);
    for (Block* block : {&blocks.xx, &blocks.yx, &blocks.yy}) {
      block->for_each([&](int, int, float& value) { value *= scale; });
    }
  }

  // Write sign * (x by_x + y by_y), the gradient of a map.
  __device__ void gradient(int map, float sign) {
    const Operand<float, line, false> columns_x{by_x}, columns_y{by_y};
    for_tiles<true>(map % 2, [&](int block, const auto& operands) {
      Accumulator<channels, POSITIONS> result;
      result.clear();
      operands([&](const auto& x, const auto& y) {
        multiply(result, x, columns_x, pair.positions[0], pair.split);
        multiply(result, y, columns_y, pair.positions[0], pair.split);
      });
      result.store(own, line, sign);
      __syncthreads();
      write_gradient<channels, POSITIONS>(own, pair.gradients[map], pair.maps[map], mask(), sample,
                                          block * channels, 0, map % 2 == 0 ? pair.m : pair.n,
                                          pair.positions[0]);
    });
  }
};

// Write weighted losses, one for each block, to `partials`, and all wanted gradients.
template <int POSITIONS>
__global__ void __launch_bounds__(THREADS, 1) fsp_gram(const __grid_constant__ Pairs group) {
  const Place place = place_of_block(group);
  const Pair& pair = group.entries[place.entry];
  const float loss = Gram<POSITIONS>(pair, place.program, group.stages).run();
  if (threadIdx.x == 0) group.partials[pair.partial + place.program] = loss * pair.factor;
}

}  // namespace fsp
