// CUDA on the host: the kernel sources of csrc/ compiled by a C++ compiler and run on the CPU, for
// tests on machines that have neither a GPU nor the CUDA toolkit.
//
// A block's threads are fibers of one OS thread; each runs to its next barrier or warp operation
// (shuffle, ldmatrix, mma), which acts once every lane has come. Blocks run one after another.
// The order of warps and lanes changes direction all the time but is the same in every run.
//
// Caught as errors: lanes of a warp at different operations, barriers that not all can reach,
// overruns of shared memory, misaligned ldmatrix and cp.async, copies that nobody waits for.
// Seen as NaN or wrong numbers: missing barriers and waits, shared memory read before it is set.
// With race.h: races between threads, blocks and copies, as errors that name both places.
// With the sanitizers: accesses outside any buffer, global memory included, or not aligned.
// Modelled for tests of the host's side: two devices, of which one is current in a thread, a limit of
// shared memory for each kernel on each, and that no kernel is loaded while a graph is captured.
// Not modelled: time, the memory model beyond the above, atomics, grids of more than one dimension,
// warp operations of part of a warp.
#pragma once

#include <math.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <typeinfo>

#include "execution.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(bytes) __attribute__((aligned(bytes)))

// ---- vector types and the built-in variables

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

constexpr int2 make_int2(int x, int y) { return {x, y}; }
constexpr int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
constexpr uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
constexpr uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
constexpr float2 make_float2(float x, float y) { return {x, y}; }
constexpr float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = on_host::kWarpSize;

// ---- arithmetic

inline unsigned __float_as_uint(float x) { return on_host::bits_as<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return on_host::bits_as<float>(x); }
inline int __float_as_int(float x) { return on_host::bits_as<int>(x); }
inline float __int_as_float(int x) { return on_host::bits_as<float>(x); }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frcp_rn(float x) { return 1.0F / x; }

template <class Integer, class = std::enable_if_t<std::is_integral_v<Integer>>>
constexpr Integer min(Integer a, Integer b) {
  return b < a ? b : a;
}
template <class Integer, class = std::enable_if_t<std::is_integral_v<Integer>>>
constexpr Integer max(Integer a, Integer b) {
  return a < b ? b : a;
}
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

template <class T>
T __ldg(const T* pointer) {
  return *pointer;
}

// ---- barriers and warp operations

inline void __syncthreads(on_host::Site site = on_host::Site::here()) {
  on_host::wait_for_block(site);
}

inline void __syncwarp(unsigned mask = ~0U, on_host::Site site = on_host::Site::here()) {
  on_host::check_full_mask("__syncwarp", mask, site);
  on_host::wait_for_warp("__syncwarp", [](void* const*) {}, nullptr, site);
}

namespace on_host {

template <class T>
T shuffled(const char* name, unsigned mask, T value, int source, Site site) {
  return bits_as<T>(shuffle(name, mask, bits_as<std::uint32_t>(value), source, site));
}

// A lane that would read beyond the last one of its group of `width` keeps its own value.
inline int within_group(int source, int width) {
  const int last = current_lane() | (width - 1);
  return source <= last ? source : current_lane();
}

}  // namespace on_host

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = warpSize,
              on_host::Site site = on_host::Site::here()) {
  const int source = (on_host::current_lane() & ~(width - 1)) | (lane & (width - 1));
  return on_host::shuffled("__shfl_sync", mask, value, source, site);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize,
                  on_host::Site site = on_host::Site::here()) {
  const int source = on_host::within_group(on_host::current_lane() ^ lane_mask, width);
  return on_host::shuffled("__shfl_xor_sync", mask, value, source, site);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                   on_host::Site site = on_host::Site::here()) {
  const int lane = on_host::current_lane() + static_cast<int>(delta);
  const int source = on_host::within_group(lane, width);
  return on_host::shuffled("__shfl_down_sync", mask, value, source, site);
}

// ---- the runtime's functions, for two devices of the architecture that is compiled for

struct CUstream_st;
using cudaStream_t = CUstream_st*;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorUnsupportedPtxVersion = 222,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorStreamCaptureUnsupported = 900,
};

enum cudaStreamCaptureStatus {
  cudaStreamCaptureStatusNone = 0,
  cudaStreamCaptureStatusActive = 1,
};

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
};

struct cudaFuncAttributes {
  std::size_t sharedSizeBytes;
  std::size_t constSizeBytes;
  std::size_t localSizeBytes;
  int maxThreadsPerBlock;
  int numRegs;
  int ptxVersion;
  int binaryVersion;
  int maxDynamicSharedSizeBytes;
};

const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaRuntimeGetVersion(int* version);
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status);

namespace on_host {

// Kernels are told apart by their address. A launch goes through if CUDA would let it, and else
// leaves an error for cudaGetLastError.
using Kernel = void (*)();
cudaError_t set_attribute(Kernel kernel, cudaFuncAttribute attribute, int value);
cudaError_t get_attributes(cudaFuncAttributes* attributes, Kernel kernel);
cudaError_t launch(Kernel kernel, dim3 grid, dim3 block, Launch launch);

}  // namespace on_host

template <class Params>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Params), cudaFuncAttribute attribute, int value) {
  return on_host::set_attribute(reinterpret_cast<on_host::Kernel>(kernel), attribute, value);
}

template <class Params>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*kernel)(Params)) {
  return on_host::get_attributes(attributes, reinterpret_cast<on_host::Kernel>(kernel));
}

template <class Params>
cudaError_t cudaLaunchKernel(void (*kernel)(Params), dim3 grid, dim3 block, void** arguments,
                             std::size_t shared_bytes = 0, cudaStream_t = nullptr) {
  const Params& params = *static_cast<const Params*>(arguments[0]);
  return on_host::launch(reinterpret_cast<on_host::Kernel>(kernel), grid, block,
                         {typeid(Params).name(), grid.x, block.x, shared_bytes,
                          [kernel, &params] { kernel(params); }});
}
