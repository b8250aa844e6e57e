// The kernels, as the host launches them.
#pragma once

#include <cuda_runtime.h>

#include "types.h"

namespace fsp {

// A kernel and how to launch it, or empty. `parameters` point to a value of the type that it takes.
struct Kernel {
  const char* name;
  // Shared memory of a block, in bytes. `tile` is for kernels with tiles of several sizes.
  int (*shared_bytes)(int tile, int stages);
  // Load the kernel on the current device, and let its launches use as much shared memory as a
  // block can have. Called once for each device.
  cudaError_t (*load)(int most_shared_bytes);
  cudaError_t (*launch)(const void* parameters, int blocks, int shared_bytes, cudaStream_t stream);
};

// Kernels that multiply operands of one type: that of the maps, or fp32 if their types differ.
struct Kernels {
  Kernel one_pass;  // with tiles of 32 or 64 channels
  // Empty for fp32: its results would not fit the registers.
  Kernel wide_one_pass;  // with tiles of 128 channels
  Kernel residual, gradients;
  int residual_channels;  // of a tile
};

Kernels fp32_kernels();
Kernels fp16_kernels();
Kernels bf16_kernels();

// For at most 32 or 64 positions.
Kernel gram_kernel_32();
Kernel gram_kernel_64();

Kernel combine_kernel();
Kernel matrix_gradients_kernel();
Kernel finish_kernel();
Kernel scale_kernel();

// Sizes of the tiles of kernels, which are the same for all types.
constexpr int ONE_PASS_TILES[] = {32, 64};
constexpr int WIDE_ONE_PASS_TILE = 128;
constexpr int GRADIENT_CHANNELS = 128, GRADIENT_POSITIONS = 64;
constexpr int GRAM_POSITIONS = 64;
constexpr int COMBINED_COLUMNS = 32;
constexpr int SCALED_AT_A_TIME = 4 * THREADS;

}  // namespace fsp
