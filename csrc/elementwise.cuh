// Kernels that multiply no matrices: the gradient of a ready matrix from stored slopes; the sums of
// the partial losses, which end forward; the scaling of gradients in backward.
#pragma once

#include "accumulator.cuh"
#include "group.cuh"

namespace fsp {

// Write ratio * slope (m, n) as the gradient of a ready matrix. A block has a row.
__global__ void __launch_bounds__(THREADS)
    fsp_matrix_gradients(const __grid_constant__ Products group) {
  const Place place = place_of_block(group);
  const Product& product = group.entries[place.entry];
  const Map &slope = product.slope, &gradient = product.gradient;
  const int line = place.program % product.own_channels;
  const int sample = place.program / product.own_channels;
  const int map_sample = product.first_sample + sample;
  const int64_t from = sample * slope.sample + line * slope.channel;
  const int64_t to = map_sample * gradient.sample + line * gradient.channel;
  const float ratio = ratio_of(product, map_sample);
  for (int i = threadIdx.x; i < product.other_channels; i += THREADS) {
    const float value = static_cast<const float*>(slope.data)[from + i * slope.width];
    write(gradient.data, gradient.scalar, to + i * gradient.width, value * ratio);
  }
}

// Add ranges of the partial losses, each in a fixed order and in one block.
__global__ void __launch_bounds__(THREADS) fsp_finish(const __grid_constant__ Sums sums) {
  const Sum sum = sums.entries[blockIdx.x];
  float total = 0;
  for (int64_t i = sum.start + threadIdx.x; i < sum.stop; i += THREADS) {
    total += sums.partials[i];
  }
  total = block_sum(total, reinterpret_cast<float*>(shared_memory()));
  if (threadIdx.x == 0) sums.out[blockIdx.x] = total;
}

// Four elements at a time, then the rest.
template <class From, class To>
__device__ void scale_all(const Scaled& x, float factor) {
  const From* from = static_cast<const From*>(x.gradient);
  To* to = static_cast<To*>(x.out);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * THREADS;
  struct alignas(4 * sizeof(From)) Froms { From x[4]; };
  struct alignas(4 * sizeof(To)) Tos { To x[4]; };
  const auto aligned = reinterpret_cast<uintptr_t>(from) % sizeof(Froms) == 0 &&
                       reinterpret_cast<uintptr_t>(to) % sizeof(Tos) == 0;
  const int64_t fours = aligned ? x.size / 4 : 0;
  for (int64_t i = first; i < fours; i += step) {
    const Froms values = reinterpret_cast<const Froms*>(from)[i];
    Tos results;
#pragma unroll
    for (int e = 0; e < 4; ++e) results.x[e] = narrow<To>(widen(values.x[e]) * factor);
    reinterpret_cast<Tos*>(to)[i] = results;
  }
  for (int64_t i = 4 * fours + first; i < x.size; i += step) {
    to[i] = narrow<To>(widen(from[i]) * factor);
  }
}

template <class From>
__device__ void scale_all(const Scaled& x, float factor) {
  switch (x.to) {
    case Scalar::fp16: return scale_all<From, __half>(x, factor);
    case Scalar::bf16: return scale_all<From, __nv_bfloat16>(x, factor);
    default: return scale_all<From, float>(x, factor);
  }
}

// out = gradient * factor for each pair of tensors. In place, a factor of 1 is skipped.
//
// Factors are read on the device, so the host need not wait for them. Each block works on all
// tensors.
__global__ void __launch_bounds__(THREADS) fsp_scale(const __grid_constant__ Scales scales) {
  float factor = 0;
  for (int i = 0; i < scales.count; ++i) {
    const Scaled& x = scales.entries[i];
    if (i == 0 || x.place != scales.entries[i - 1].place) factor = scales.factors[x.place];
    // A gradient that was held in another dtype must be written even if the factor is 1.
    if (scales.in_place && x.from == x.to && factor == 1) continue;
    switch (x.from) {
      case Scalar::fp16: scale_all<__half>(x, factor); break;
      case Scalar::bf16: scale_all<__nv_bfloat16>(x, factor); break;
      default: scale_all<float>(x, factor);
    }
  }
}

}  // namespace fsp
