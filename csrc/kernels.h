// The kernels as the host sees them.
#pragma once

#include <cuda_runtime.h>

#include "types.h"

namespace fsp {

// A kernel and how to launch it with its parameters, of the type that it takes; or nothing.
struct Kernel {
  const char* name;
  // Shared memory of a block; `tile` matters to kernels that have tiles of several sizes.
  int (*shared_bytes)(int tile, int stages);
  // Once for each device, while it is current: brings the kernel there, and lets its launches have
  // all the shared memory that a block can get.
  cudaError_t (*load)(int most_shared_bytes);
  cudaError_t (*launch)(const void* parameters, int blocks, int shared_bytes, cudaStream_t stream);
};

// Kernels that multiply operands of one type: of the maps, or fp32 where these differ.
struct Kernels {
  Kernel one_pass;  // with tiles of 32 or 64 channels
  // Nothing for fp32: what they keep in registers does not fit there.
  Kernel wide_one_pass;  // with tiles of 128 channels
  Kernel residual, gradients;
  int residual_channels;  // of a tile
};

Kernels fp32_kernels();
Kernels fp16_kernels();
Kernels bf16_kernels();

// For at most as many positions.
Kernel gram_kernel_32();
Kernel gram_kernel_64();

Kernel combine_kernel();
Kernel matrix_gradients_kernel();
Kernel finish_kernel();
Kernel scale_kernel();

// Sizes that follow from the tiles of kernels, which are alike for all types.
constexpr int ONE_PASS_TILES[] = {32, 64};
constexpr int WIDE_ONE_PASS_TILE = 128;
constexpr int GRADIENT_CHANNELS = 128, GRADIENT_POSITIONS = 64;
constexpr int GRAM_POSITIONS = 64;
constexpr int COMBINED_COLUMNS = 32;
constexpr int SCALED_AT_A_TIME = 4 * THREADS;

}  // namespace fsp
