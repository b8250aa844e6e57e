// The loss for maps whose residual is too large for one block: it is computed in tiles.
//
// The first launch writes slopes, the loss's derivatives by a b^T, to memory: in bf16 if the maps
// are bf16, else in fp32. If the tiles would not fill the device, several blocks share a tile, each
// with a part of the positions. In this case, or if the norm needs whole columns, the first launch
// writes D / K, and a second launch adds the parts and computes loss and slopes. The last launch
// writes the gradients. The first launch alone, without a teacher, computes FSP matrices and their
// derivatives.
#pragma once

#include "group.cuh"
#include "residual.cuh"

namespace fsp {

template <class T>
struct ResidualTiles {
  static constexpr int channels = sizeof(T) == 2 ? 128 : 64;  // of a tile, on both sides
  static constexpr int positions = 32;
  using Stages = Maps<T, channels, positions>;

  static constexpr int scratch_bytes = WARPS * sizeof(float);
  static constexpr int shared_bytes(int stages) { return scratch_bytes + stages * Stages::bytes; }
};

// For pairs that finish here, write the losses of tiles, and slopes to `out` if there is one. For
// other pairs write D / K to `out`.
template <class T>
__global__ void __launch_bounds__(THREADS, sizeof(T) == 2 ? 1 : 2)
    fsp_residual(const __grid_constant__ Pairs group) {
  using Of = ResidualTiles<T>;
  constexpr int C = Of::channels;
  const Place place = place_of_block(group);
  const Pair& pair = group.entries[place.entry];
  // Blocks for the tiles of a sample are neighbours, so they find its maps in cache.
  const int across = (pair.n + C - 1) / C, down = (pair.m + C - 1) / C;
  const int line = place.program / across % down * C, column = place.program % across * C;
  const int part = place.program / (across * down) % pair.parts;
  const int sample = place.program / (across * down * pair.parts);
  float* scratch = reinterpret_cast<float*>(shared_memory());
  Accumulator<C, C> tile;
  residual_tile<T, C, Of::positions>(tile, pair, pair.first_sample + sample, line, column, part,
                                        group.stages, reinterpret_cast<T*>(scratch + WARPS));
  if (pair.out.data != nullptr) {
    const Map& out = pair.out;
    const int64_t start = sample * out.sample + part * pair.out_part;
    const float scale = slope_scale(pair, pair.first_sample + sample);
    tile.for_each([&](int i, int j, float value) {
      if (line + i < pair.m && column + j < pair.n) {
        if (pair.finishes) value = storable_slope(value * scale, out.scalar, pair.split);
        write(out.data, out.scalar,
              start + (line + i) * out.channel + (column + j) * out.width, value);
      }
    });
  }
  if (pair.finishes) {
    const float loss = block_sum(squares(tile), scratch);
    if (threadIdx.x == 0) group.partials[pair.partial + place.program] = loss * pair.factor;
  }
}

template <class T>
struct GradientTiles {
  static constexpr int own = 128, other = 32, positions = 64;
  using Element = SlopeOf<T>;
  using Slope = Tile<Element, own, other>;
  using Other = Tile<T, other, positions>;
  using Own = Tile<float, own, positions>;
  static constexpr int own_bytes = own * Own::position_line * sizeof(float);

  static constexpr int shared_bytes(int stages) {
    return own_bytes + stages * (Slope::bytes + Other::bytes);
  }
};

// Load a tile of slopes. Slopes may be fp32 although the maps are bf16: in pairs with a ready
// matrix, whose gradient is not rounded to bf16.
template <class Shape, class Element>
__device__ __forceinline__ void load_slopes(Element* tile, const Product& product, int sample,
                                            int own, int other) {
  const Map& slope = product.slope;
  if constexpr (sizeof(Element) == 2) {
    if (slope.scalar == Scalar::fp32) {
      const float* const data = static_cast<const float*>(slope.data) + sample * slope.sample;
      const int line = Shape::channel_stride(slope.channels_inner);
      const int step = Shape::position_stride(slope.channels_inner);
      for_batches<Shape::channels, Shape::positions, 8>(
          slope.channels_inner,
          [&](int i, int j) {
            const bool inside =
                own + i < product.own_channels && other + j < product.other_channels;
            return inside ? data[(own + i) * slope.channel + (other + j) * slope.width] : 0.0f;
          },
          [&](int i, int j, float x) {
            tile[i * line + j * step] = narrow<Element>(within_bf16(x));
          });
      return;
    }
  }
  load_tile<Shape>(tile, slope, sample, own, other, product.own_channels, product.other_channels);
}

// Write ratio * slope @ other for every gradient. A block has a tile of channels and positions.
template <class T>
__global__ void __launch_bounds__(THREADS, 2)
    fsp_gradients(const __grid_constant__ Products group) {
  using Of = GradientTiles<T>;
  const Place place = place_of_block(group);
  const Product& product = group.entries[place.entry];
  const int down = (product.own_channels + Of::own - 1) / Of::own;
  const int across = (product.positions + Of::positions - 1) / Of::positions;
  const int channel = place.program % down * Of::own;
  const int position = place.program / down % across * Of::positions;
  const int sample = place.program / (down * across);
  const int map_sample = product.first_sample + sample;

  float* const own = reinterpret_cast<float*>(shared_memory());
  auto* const slopes = reinterpret_cast<typename Of::Element*>(shared_memory() + Of::own_bytes);
  T* const others = reinterpret_cast<T*>(slopes + group.stages * Of::Slope::size);
  Accumulator<Of::own, Of::positions> result;
  result.clear();
  pipeline(
      0, (product.other_channels + Of::other - 1) / Of::other, group.stages,
      [&](int block, int stage) {
        load_slopes<typename Of::Slope>(slopes + stage * Of::Slope::size, product, sample, channel,
                                        block * Of::other);
        load_tile<typename Of::Other>(others + stage * Of::Other::size, product.other, map_sample,
                                      block * Of::other, position, product.other_channels,
                                      product.positions);
      },
      [&](int, int stage) {
        const auto add = [&](auto& sum) {
          by_channel<typename Of::Slope>(
              slopes + stage * Of::Slope::size, product.slope, [&](const auto& x) {
                by_position<typename Of::Other>(
                    others + stage * Of::Other::size, product.other,
                    [&](const auto& y) { multiply(sum, x, y, Of::other, product.split); });
              });
        };
        if constexpr (sizeof(T) == 4) {
          in_short_sums(result, add);
        } else {
          add(result);  // it will be rounded to 16 bits anyway
        }
      });
  result.store(own, Of::Own::position_line, ratio_of(product, map_sample));
  __syncthreads();
  write_gradient<Of::own, Of::positions>(own, product.gradient, product.own, product.mask,
                                         map_sample, channel, position, product.own_channels,
                                         product.positions);
}

}  // namespace fsp
