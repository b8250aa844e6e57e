// The second launch of tiles.cuh: what its blocks left of a residual becomes one.
#pragma once

#include "group.cuh"
#include "kernels.h"
#include "residual.cuh"

namespace fsp {

// Add the parts of a block of columns and take its norm; the slope replaces the first part.
__global__ void __launch_bounds__(THREADS) fsp_combine(const __grid_constant__ Pairs group) {
  const Place place = place_of_block(group);
  const Pair& pair = group.entries[place.entry];
  const int across = (pair.n + COMBINED_COLUMNS - 1) / COMBINED_COLUMNS;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int column = place.program % across * COMBINED_COLUMNS + lane;
  const bool inside = column < pair.n;
  const int64_t start = place.program / across * pair.out.sample + column;
  float* const out = static_cast<float*>(pair.out.data);
  float* const sums = reinterpret_cast<float*>(shared_memory());  // (WARPS, 32)

  float length = 0;
  for (int i = warp; inside && i < pair.m; i += WARPS) {
    float* const first = out + start + i * pair.out.channel;
    float total = 0;
    for (int part = 0; part < pair.parts; ++part) total += first[part * pair.out_part];
    *first = total;
    length = fmaf(total, total, length);
  }
  sums[threadIdx.x] = length;
  __syncthreads();
  length = 0;
  for (int i = 0; i < WARPS; ++i) length += sums[i * 32 + lane];
  __syncthreads();
  if (pair.norm == Norm::column) {
    length = sqrtf(length);
    const float inverse = inverse_length(length);
    // The same elements as above: each thread reads what it wrote itself.
    for (int i = warp; inside && i < pair.m; i += WARPS) {
      out[start + i * pair.out.channel] *= inverse;
    }
  }
  const float loss = block_sum(warp == 0 ? length : 0.0f, sums);
  if (threadIdx.x == 0) group.partials[pair.partial + place.program] = loss * pair.factor;
}

}  // namespace fsp
