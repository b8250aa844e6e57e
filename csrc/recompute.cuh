// The loss for many channels and few positions where no residual is stored, in one launch.
//
// A block owns some channels of one map, and with them their gradient over all positions. It goes
// over the other map's channels, computes the residual tile of each block and adds what it gives
// the gradient at once. Every tile is computed again for each map that wants a gradient, and never
// written. Sides are alike but for their names: for the second maps, a pair comes with its sides
// swapped.
#pragma once

#include "group.cuh"
#include "residual.cuh"

namespace fsp {

template <class T>
struct Recompute {
  static constexpr int channels = 64;  // of a tile, on either side
  static constexpr int positions = 32;
  static constexpr int chunk = 64, most_chunks = 4;  // of positions of the gradient
  static constexpr int line = channels + 4;
  using Stages = Maps<T, channels, positions>;
  using Other = Tile<T, channels, chunk>;
  using Own = Tile<float, channels, chunk>;

  static constexpr int scratch_bytes = WARPS * sizeof(float);
  static constexpr int slope_bytes = channels * line * sizeof(float);

  static constexpr int shared_bytes(int stages) {
    const int residual = stages * Stages::bytes, gradient = stages * Other::bytes;
    const int own = channels * Own::position_line * sizeof(float);
    const int larger = residual > gradient ? residual : gradient;
    return scratch_bytes + slope_bytes + (larger > own ? larger : own);
  }
};

// Losses of the pairs that finish here, and the gradients of a or c.
template <class T>
__global__ void __launch_bounds__(THREADS, 1)
    fsp_recompute(const __grid_constant__ Pairs group) {
  using Of = Recompute<T>;
  const Place place = place_of_block(group);
  const Pair& pair = group.entries[place.entry];
  const int down = (pair.m + Of::channels - 1) / Of::channels;
  const int line = place.program % down * Of::channels, sample = place.program / down;
  const int network = pair.own / 2;
  const int count = pair.positions[network];
  const Map& other = pair.maps[pair.own + 1];
  const float scale = (network == 0 ? 2 : -2) * pair.factor / count;

  float* const scratch = reinterpret_cast<float*>(shared_memory());
  float* const slope = scratch + WARPS;
  T* const memory = reinterpret_cast<T*>(slope + Of::channels * Of::line);
  Accumulator<Of::channels, Of::chunk> gradient[Of::most_chunks];
#pragma unroll
  for (auto& chunk : gradient) chunk.clear();
  // Registers have no index, so that a chunk of them is found by comparing.
  const auto for_chunk = [&](int chunk, auto visit) {
#pragma unroll
    for (int i = 0; i < Of::most_chunks; ++i) {
      if (i == chunk) visit(gradient[i]);
    }
  };
  float loss = 0;
  const bool matrix = pair.residual == Residual::ready && pair.gradients[2].data != nullptr;
  // A ready matrix may be alone in wanting a gradient.
  const int chunks =
      pair.gradients[pair.own].data == nullptr ? 0 : (count + Of::chunk - 1) / Of::chunk;

  for (int column = 0; column < pair.n; column += Of::channels) {
    {
      Accumulator<Of::channels, Of::channels> tile;
      residual_tile<T, Of::channels, Of::positions>(
          tile, pair, sample, line, column, 0, group.stages, memory);
      if (pair.finishes) loss += squares(tile);
      tile.store(slope, Of::line);
    }
    __syncthreads();
    if (matrix && pair.own == 0) {
      write_matrix_gradient<Of::channels, Of::channels>(slope, Of::line, pair, sample, line,
                                                        column, -2 * pair.factor);
    }
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      load_tile<typename Of::Other>(memory, other, sample, column, chunk * Of::chunk, pair.n,
                                    count);
      commit_copies();
      wait_for_copies<0>();
      __syncthreads();
      for_chunk(chunk, [&](auto& result) {
        multiply(result, Slope{{slope, Of::line, 1}, scale},
                 by_position<typename Of::Other>(memory, other), Of::channels, pair.split);
      });
      __syncthreads();
    }
  }
  float* const own = reinterpret_cast<float*>(memory);
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; ++chunk) {
    for_chunk(chunk, [&](auto& result) { result.store(own, Of::Own::position_line); });
    __syncthreads();
    write_gradient<Of::channels, Of::chunk>(own, pair.gradients[pair.own], pair.maps[pair.own],
                                            sample, line, chunk * Of::chunk, pair.m, count);
    __syncthreads();
  }
  if (pair.finishes) {
    loss = block_sum(loss, scratch);
    if (threadIdx.x == 0) group.partials[pair.partial + place.program] = loss * pair.factor;
  }
}

}  // namespace fsp
