// From kernels to `Kernel`s.
#pragma once

#include "gram.cuh"
#include "kernels.h"
#include "one_pass.cuh"
#include "recompute.cuh"
#include "tiles.cuh"

namespace fsp {

template <class Parameters, void (*FUNCTION)(const Parameters)>
Kernel kernel_of(const char* name, int (*shared_bytes)(int tile, int stages)) {
  return {
      name, shared_bytes,
      [](int bytes) {
        return cudaFuncSetAttribute(FUNCTION, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
      },
      [](const void* parameters, int blocks, int bytes, cudaStream_t stream) {
        void* arguments[] = {const_cast<void*>(parameters)};
        return cudaLaunchKernel(FUNCTION, dim3(blocks), dim3(THREADS), arguments,
                                static_cast<size_t>(bytes), stream);
      },
      [](cudaFuncAttributes* result) { return cudaFuncGetAttributes(result, FUNCTION); },
  };
}

template <class T>
int one_pass_shared_bytes(int tile, int stages) {
  if (tile == 32) return OnePass<T, 32>::shared_bytes(stages);
  if (tile == 64) return OnePass<T, 64>::shared_bytes(stages);
  return OnePass<T, 128>::shared_bytes(stages);
}

// A kernel that has tiles of one size.
template <class Of>
int shared_bytes_of(int, int stages) {
  return Of::shared_bytes(stages);
}

template <class T>
Kernel recompute_kernel() {
  if constexpr (sizeof(T) == 4) {
    return {};
  } else {
    static_assert(Recompute<T>::channels == RECOMPUTE_CHANNELS);
    static_assert(Recompute<T>::chunk * Recompute<T>::most_chunks == RECOMPUTE_POSITIONS);
    return kernel_of<Pairs, fsp_recompute<T>>("fsp_recompute", shared_bytes_of<Recompute<T>>);
  }
}

template <class T>
Kernels kernels_of_type() {
  static_assert(GradientTiles<T>::own == GRADIENT_CHANNELS);
  static_assert(GradientTiles<T>::positions == GRADIENT_POSITIONS);
  return {
      kernel_of<Pairs, fsp_one_pass<T>>("fsp_one_pass", one_pass_shared_bytes<T>),
      kernel_of<Pairs, fsp_residual<T>>("fsp_residual", shared_bytes_of<ResidualTiles<T>>),
      kernel_of<Products, fsp_gradients<T>>("fsp_gradients", shared_bytes_of<GradientTiles<T>>),
      recompute_kernel<T>(),
      ResidualTiles<T>::channels,
  };
}

template <int POSITIONS>
Kernel gram_kernel() {
  return kernel_of<Pairs, fsp_gram<POSITIONS>>("fsp_gram", shared_bytes_of<Gram<POSITIONS>>);
}

}  // namespace fsp
