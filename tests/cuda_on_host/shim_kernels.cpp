// Kernels for the tests of the shim, and a door to them for ctypes.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <ptx_on_host.h>

#include <cstring>
#include <stdexcept>
#include <string>

struct Params {
  const void* input;
  void* output;
  int n;

  template <class T>
  const T* in() const {
    return static_cast<const T*>(input);
  }
  template <class T>
  T* out() const {
    return static_cast<T*>(output);
  }
};

namespace {

constexpr unsigned kAll = 0xFFFFFFFFU;

template <class T>
__device__ T* shared() {
  return reinterpret_cast<T*>(fsp::shared_memory());
}

__device__ int lane() { return static_cast<int>(threadIdx.x) % warpSize; }
__device__ int global_thread() { return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); }

// ---- threads, barriers, shuffles

__global__ void indices(const __grid_constant__ Params params) {
  uint4* out = params.out<uint4>() + global_thread();
  *out = make_uint4(threadIdx.x, blockIdx.x, blockDim.x, gridDim.x);
}

template <bool kBarrier>
__global__ void reverse(const __grid_constant__ Params params) {
  const int last = static_cast<int>(blockDim.x) - 1;
  const int thread = static_cast<int>(threadIdx.x);
  shared<float>()[thread] = static_cast<float>(thread);
  if (kBarrier) __syncthreads();
  params.out<float>()[global_thread()] = shared<float>()[last - thread];
}

// Each lane writes, and reads what its neighbour wrote.
template <bool kBarrier>
__global__ void swap_in_warp(const __grid_constant__ Params params) {
  const int thread = static_cast<int>(threadIdx.x);
  shared<float>()[thread] = static_cast<float>(thread);
  if (kBarrier) __syncwarp();
  params.out<float>()[global_thread()] = shared<float>()[thread ^ 1];
}

// n rounds, in each of which every thread reads what another one wrote in the round before.
__global__ void rotate(const __grid_constant__ Params params) {
  const unsigned thread = threadIdx.x;
  shared<int>()[thread] = static_cast<int>(thread);
  for (int i = 0; i < params.n; ++i) {
    __syncthreads();
    const int next = shared<int>()[(thread + 1) % blockDim.x];
    __syncthreads();
    shared<int>()[thread] = next;
  }
  params.out<int>()[global_thread()] = shared<int>()[thread];
}

__global__ void shuffles(const __grid_constant__ Params params) {
  int* out = params.out<int>() + 6 * threadIdx.x;
  out[0] = __shfl_sync(kAll, lane(), 5);
  out[1] = __shfl_sync(kAll, lane(), 3, 8);
  out[2] = __shfl_xor_sync(kAll, lane(), 4);
  out[3] = __shfl_down_sync(kAll, lane(), 2);
  out[4] = __shfl_down_sync(kAll, lane(), 3, 8);
  out[5] = static_cast<int>(__shfl_xor_sync(kAll, 0.5F * static_cast<float>(lane()), 1) * 2);
}

// ---- matrices

// The input is copied to shared memory, four matrices of eight rows of eight elements.
template <bool kTransposed>
__global__ void load_matrices(const __grid_constant__ Params params) {
  uint16_t* rows = shared<uint16_t>();
  for (int i = 0; i < 8; ++i) rows[8 * lane() + i] = params.in<uint16_t>()[8 * lane() + i];
  __syncwarp();
  uint32_t r[4];
  if (kTransposed) {
    fsp::ldmatrix_x4_trans(r, rows + 8 * lane());
  } else {
    fsp::ldmatrix_x4(r, rows + 8 * lane());
  }
  std::memcpy(params.out<uint32_t>() + 4 * lane(), r, sizeof r);
}

// Input: a (16 x 16, row by row), b (16 x 8, row by row) of 16 bits. Output: d (16 x 8), added to.
template <auto kMma>
__global__ void multiply_16_bits(const __grid_constant__ Params params) {
  uint16_t* a = shared<uint16_t>();
  uint16_t* b = a + 16 * 16;
  for (int i = lane(); i < 16 * 24; i += warpSize) a[i] = params.in<uint16_t>()[i];
  __syncwarp();
  uint32_t a_fragment[4];
  uint32_t b_fragment[4];
  fsp::ldmatrix_x4(a_fragment, a + 16 * (lane() % 16) + 8 * (lane() / 16));
  fsp::ldmatrix_x4_trans(b_fragment, b + 8 * (lane() % 16));
  const int row = lane() / 4;
  const int column = lane() % 4 * 2;
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = params.out<float>()[8 * (row + i / 2 * 8) + column + i % 2];
  kMma(d, a_fragment, b_fragment[0], b_fragment[1], fsp::Site::here());
  for (int i = 0; i < 4; ++i) params.out<float>()[8 * (row + i / 2 * 8) + column + i % 2] = d[i];
}

#if FSP_AMPERE

// Input: a (16 x 8), b (8 x 8) of floats, row by row. Output: d (16 x 8), added to.
__global__ void multiply_tf32(const __grid_constant__ Params params) {
  const uint32_t* a = params.in<uint32_t>();
  const uint32_t* b = a + 16 * 8;
  const int row = lane() / 4;
  const int column = lane() % 4;
  const uint32_t a_fragment[4] = {a[8 * row + column], a[8 * (row + 8) + column],
                                  a[8 * row + column + 4], a[8 * (row + 8) + column + 4]};
  float* d_rows = params.out<float>() + 2 * column;
  float d[4] = {d_rows[8 * row], d_rows[8 * row + 1], d_rows[8 * (row + 8)],
                d_rows[8 * (row + 8) + 1]};
  fsp::mma_tf32(d, a_fragment, b[8 * column + row], b[8 * (column + 4) + row]);
  for (int i = 0; i < 4; ++i) d_rows[8 * (row + i / 2 * 8) + i % 2] = d[i];
}

// ---- asynchronous copies

// Two groups of copies of 16 bytes per thread; what is then seen of them.
template <int kLeftOpen>
__global__ void copy_two_groups(const __grid_constant__ Params params) {
  float4* slots = shared<float4>() + 2 * threadIdx.x;
  const float4* source = params.in<float4>() + 2 * threadIdx.x;
  for (int i = 0; i < 2; ++i) {
    fsp::cp_async<16>(slots + i, source + i, params.n);
    fsp::cp_async_commit();
  }
  fsp::cp_async_wait<kLeftOpen>();
  float4* out = params.out<float4>() + 2 * threadIdx.x;
  for (int i = 0; i < 2; ++i) out[i] = slots[i];
  fsp::cp_async_wait<0>();
}

__global__ void copy_words(const __grid_constant__ Params params) {
  float* slot = shared<float>() + threadIdx.x;
  fsp::cp_async<4>(slot, params.in<float>() + threadIdx.x, threadIdx.x % 2 == 0 ? 4 : 0);
  fsp::cp_async_commit();
  fsp::cp_async_wait<0>();
  params.out<float>()[threadIdx.x] = *slot;
}

__global__ void copy_never_waited_for(const __grid_constant__ Params params) {
  fsp::cp_async<16>(shared<float4>() + threadIdx.x, params.in<float4>() + threadIdx.x, 16);
  fsp::cp_async_commit();
}

__global__ void copy_misaligned(const __grid_constant__ Params params) {
  fsp::cp_async<16>(shared<float4>(), params.in<float>() + 1, 16);
}

__global__ void copy_beyond_the_end(const __grid_constant__ Params params) {
  fsp::cp_async<16>(shared<float4>() + params.n, params.in<float4>(), 16);
}

#endif

// ---- mistakes

__global__ void lanes_at_different_operations(const __grid_constant__ Params) {
  int value = lane();
  if (lane() < 16) {
    value = __shfl_xor_sync(kAll, value, 1);
  } else {
    __syncwarp();
  }
}

__global__ void lanes_at_different_places(const __grid_constant__ Params) {
  if (lane() < 16) {
    __syncwarp();
  } else {
    __syncwarp();
  }
}

__global__ void half_a_warp_shuffles(const __grid_constant__ Params params) {
  if (lane() < 16) params.out<int>()[lane()] = __shfl_xor_sync(kAll, lane(), 1);
}

__global__ void warps_at_different_barriers(const __grid_constant__ Params) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void half_a_warp_at_the_barrier(const __grid_constant__ Params) {
  if (lane() < 16) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}

__global__ void mask_of_half_a_warp(const __grid_constant__ Params) { __syncwarp(0xFFFF); }

__global__ void half_the_block_leaves(const __grid_constant__ Params params) {
  if (threadIdx.x >= 32) return;
  __syncthreads();
  params.out<int>()[threadIdx.x] = 1;
}

__global__ void shared_overrun(const __grid_constant__ Params params) {
  shared<unsigned char>()[params.n + threadIdx.x] = 0;
}

__global__ void matrix_misaligned(const __grid_constant__ Params) {
  uint32_t r[4];
  fsp::ldmatrix_x4(r, shared<unsigned char>() + 2);
}

__global__ void matrix_beyond_the_end(const __grid_constant__ Params params) {
  uint32_t r[4];
  fsp::ldmatrix_x4(r, shared<unsigned char>() + params.n);
}

// Element n of a global buffer, and of a local one of eight elements.
__global__ void read_global(const __grid_constant__ Params params) {
  __syncthreads();
  params.out<float>()[threadIdx.x] = params.in<float>()[params.n];
}

__global__ void read_local(const __grid_constant__ Params params) {
  volatile float values[8] = {};
  volatile float* volatile first = values;  // volatile itself, so that no compiler sees through it
  __syncthreads();
  params.out<float>()[threadIdx.x] = first[params.n];
}

// Four floats from element n on.
__global__ void read_vector(const __grid_constant__ Params params) {
  const float* first = params.in<float>() + params.n;
  params.out<float4>()[threadIdx.x] = *reinterpret_cast<const float4*>(first);
}

// ---- speed

__global__ void switch_only(const __grid_constant__ Params params) {
  for (int i = 0; i < params.n; ++i) __syncwarp();
}

__global__ void multiply_only(const __grid_constant__ Params params) {
  const uint32_t a[4] = {};
  float d[4] = {};
  for (int i = 0; i < params.n; ++i) fsp::mma_f16(d, a, 0, 0);
  params.out<float>()[global_thread()] = d[0];
}

struct Named {
  const char* name;
  void (*kernel)(Params);
};

constexpr Named kKernels[] = {
    {"indices", indices},
    {"reverse", reverse<true>},
    {"reverse_without_barrier", reverse<false>},
    {"swap_in_warp", swap_in_warp<true>},
    {"swap_in_warp_without_barrier", swap_in_warp<false>},
    {"rotate", rotate},
    {"shuffles", shuffles},
    {"load_matrices", load_matrices<false>},
    {"load_matrices_transposed", load_matrices<true>},
    {"multiply_f16", multiply_16_bits<fsp::mma_f16>},
#if FSP_AMPERE
    {"multiply_bf16", multiply_16_bits<fsp::mma_bf16>},
    {"multiply_tf32", multiply_tf32},
    {"copy_and_wait_for_both", copy_two_groups<0>},
    {"copy_and_wait_for_the_first", copy_two_groups<1>},
    {"copy_and_wait_for_none", copy_two_groups<2>},
    {"copy_words", copy_words},
    {"copy_never_waited_for", copy_never_waited_for},
    {"copy_misaligned", copy_misaligned},
    {"copy_beyond_the_end", copy_beyond_the_end},
#endif
    {"lanes_at_different_operations", lanes_at_different_operations},
    {"lanes_at_different_places", lanes_at_different_places},
    {"half_a_warp_shuffles", half_a_warp_shuffles},
    {"warps_at_different_barriers", warps_at_different_barriers},
    {"half_a_warp_at_the_barrier", half_a_warp_at_the_barrier},
    {"mask_of_half_a_warp", mask_of_half_a_warp},
    {"half_the_block_leaves", half_the_block_leaves},
    {"shared_overrun", shared_overrun},
    {"matrix_misaligned", matrix_misaligned},
    {"matrix_beyond_the_end", matrix_beyond_the_end},
    {"read_global", read_global},
    {"read_local", read_local},
    {"read_vector", read_vector},
    {"switch_only", switch_only},
    {"multiply_only", multiply_only},
};

void (*kernel_named(const std::string& name))(Params) {
  for (const Named& entry : kKernels) {
    if (name == entry.name) return entry.kernel;
  }
  throw std::runtime_error("no kernel " + name);
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// The error's text, empty if all went well.
EXPORT const char* launch(const char* name, Params params, unsigned grid, unsigned block,
                          std::size_t shared_bytes) {
  static thread_local std::string error;
  try {
    void* arguments[] = {&params};
    const cudaError_t result = cudaLaunchKernel(kernel_named(name), dim3(grid), dim3(block),
                                                arguments, shared_bytes, cudaStream_t{});
    error = result == cudaSuccess ? "" : cudaGetErrorName(result);
  } catch (const std::runtime_error& thrown) {
    error = thrown.what();
  }
  return error.c_str();
}

EXPORT int set_shared_limit(const char* name, int bytes) {
  return cudaFuncSetAttribute(kernel_named(name), cudaFuncAttributeMaxDynamicSharedMemorySize,
                              bytes);
}

EXPORT int device_attribute(int attribute) {
  int value = 0;
  const cudaError_t error =
      cudaDeviceGetAttribute(&value, static_cast<cudaDeviceAttr>(attribute), 0);
  return error == cudaSuccess ? value : -1;
}

EXPORT int last_error() { return cudaGetLastError(); }

EXPORT void half_to_float(const std::uint16_t* from, float* to, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) to[i] = __half2float(__ushort_as_half(from[i]));
}

EXPORT void float_to_half(const float* from, std::uint16_t* to, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) to[i] = __half_as_ushort(__float2half(from[i]));
}

EXPORT void bfloat16_to_float(const std::uint16_t* from, float* to, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) to[i] = __bfloat162float(__ushort_as_bfloat16(from[i]));
}

EXPORT void float_to_bfloat16(const float* from, std::uint16_t* to, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) to[i] = __bfloat16_as_ushort(__float2bfloat16(from[i]));
}
