// Makes a `Kernel`, which the host launches, from each kernel function.
#pragma once

#include "gram.cuh"
#include "kernels.h"
#include "one_pass.cuh"
#include "tiles.cuh"

namespace fsp {

template <class Parameters, void (*FUNCTION)(const Parameters)>
Kernel kernel_of(const char* name, int (*shared_bytes)(int tile, int stages)) {
  return {
      name, shared_bytes,
      [](int most_shared_bytes) {
        cudaFuncAttributes attributes;
        const cudaError_t status = cudaFuncGetAttributes(&attributes, FUNCTION);
        if (status != cudaSuccess) return status;
        // The limit includes the static shared memory of the kernel.
        const int bytes = most_shared_bytes - static_cast<int>(attributes.sharedSizeBytes);
        return cudaFuncSetAttribute(FUNCTION, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
      },
      [](const void* parameters, int blocks, int bytes, cudaStream_t stream) {
        void* arguments[] = {const_cast<void*>(parameters)};
        return cudaLaunchKernel(FUNCTION, dim3(blocks), dim3(THREADS), arguments,
                                static_cast<size_t>(bytes), stream);
      },
  };
}

template <class T>
int one_pass_shared_bytes(int tile, int stages) {
  return tile == 32 ? OnePass<T, 32>::shared_bytes(stages) : OnePass<T, 64>::shared_bytes(stages);
}

// For kernels with tiles of one size.
template <class Of>
int shared_bytes_of(int, int stages) {
  return Of::shared_bytes(stages);
}

template <class T>
Kernels kernels_of_type() {
  static_assert(GradientTiles<T>::own == GRADIENT_CHANNELS);
  static_assert(GradientTiles<T>::positions == GRADIENT_POSITIONS);
  Kernels result{};
  result.one_pass =
      kernel_of<Pairs, fsp_one_pass<T, false>>("fsp_one_pass", one_pass_shared_bytes<T>);
  if constexpr (sizeof(T) == 2) {
    result.wide_one_pass = kernel_of<Pairs, fsp_one_pass<T, true>>(
        "fsp_one_pass", shared_bytes_of<OnePass<T, WIDE_ONE_PASS_TILE>>);
  }
  result.residual =
      kernel_of<Pairs, fsp_residual<T>>("fsp_residual", shared_bytes_of<ResidualTiles<T>>);
  result.gradients =
      kernel_of<Products, fsp_gradients<T>>("fsp_gradients", shared_bytes_of<GradientTiles<T>>);
  result.residual_channels = ResidualTiles<T>::channels;
  return result;
}

template <int POSITIONS>
Kernel gram_kernel() {
  return kernel_of<Pairs, fsp_gram<POSITIONS>>("fsp_gram", shared_bytes_of<Gram<POSITIONS>>);
}

}  // namespace fsp
