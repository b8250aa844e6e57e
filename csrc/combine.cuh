// The second launch of tiles.cuh: adds the parts of a residual that its blocks wrote.
#pragma once

#include "group.cuh"
#include "kernels.h"
#include "residual.cuh"

namespace fsp {

// Add the parts of a block of columns; write its loss and slopes.
__global__ void __launch_bounds__(THREADS) fsp_combine(const __grid_constant__ Pairs group) {
  const Place place = place_of_block(group);
  const Pair& pair = group.entries[place.entry];
  const Map &parts = pair.maps[0], &out = pair.out;
  const int across = (pair.n + COMBINED_COLUMNS - 1) / COMBINED_COLUMNS;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int column = place.program % across * COMBINED_COLUMNS + lane;
  const bool inside = column < pair.n, whole = pair.norm == Norm::column;
  const int sample = place.program / across;
  float* const first = static_cast<float*>(parts.data) + sample * parts.sample + column;
  float* const sums = reinterpret_cast<float*>(shared_memory());  // (WARPS, 32)
  const float scale = slope_scale(pair, pair.first_sample + sample);
  const auto write_slope = [&](int i, float value) {
    if (out.data == nullptr) return;
    write(out.data, out.scalar, sample * out.sample + i * out.channel + column,
          storable_slope(value, out.scalar, pair.split));
  };

  float length = 0;
  for (int i = warp; inside && i < pair.m; i += WARPS) {
    float* const at = first + i * parts.channel;
    float total = 0;
    for (int part = 0; part < pair.parts; ++part) total += at[part * pair.out_part];
    length = fmaf(total, total, length);
    if (whole) {
      *at = total;
    } else {
      write_slope(i, total * scale);
    }
  }
  sums[threadIdx.x] = length;
  __syncthreads();
  length = 0;
  for (int i = 0; i < WARPS; ++i) length += sums[i * 32 + lane];
  __syncthreads();
  if (whole) {
    length = sqrtf(length);
    const float inverse = inverse_length(length);
    // The same elements as above: each thread reads what it wrote itself.
    for (int i = warp; inside && i < pair.m; i += WARPS) {
      write_slope(i, first[i * parts.channel] * inverse * scale);
    }
  }
  const float loss = block_sum(warp == 0 ? length : 0.0f, sums);
  if (threadIdx.x == 0) group.partials[pair.partial + place.program] = loss * pair.factor;
}

}  // namespace fsp
