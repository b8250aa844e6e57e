// The runtime's functions, for one device of the architecture that is compiled for.
#include <map>
#include <mutex>
#include <stdexcept>

#include "cuda_runtime.h"

namespace {

constexpr int kArchitecture = __CUDA_ARCH__ / 10;
#if __CUDA_ARCH__ == 750
constexpr int kMaxSharedBytes = 64 * 1024;
#elif __CUDA_ARCH__ == 800
constexpr int kMaxSharedBytes = 163 * 1024;
#else
#error "__CUDA_ARCH__ is 750 or 800"
#endif
constexpr int kSharedBytesUnasked = 48 * 1024;  // more is for kernels that ask for it
constexpr int kRuntimeVersion = 12000;

thread_local cudaError_t last_error = cudaSuccess;

cudaError_t returned(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

// The dynamic shared memory that each kernel has asked for.
std::mutex limits_mutex;
std::map<on_host::Kernel, int> limits;

int shared_limit(on_host::Kernel kernel) {
  const std::lock_guard<std::mutex> lock(limits_mutex);
  const auto found = limits.find(kernel);
  return found == limits.end() ? kSharedBytesUnasked : found->second;
}

struct ErrorText {
  cudaError_t error;
  const char* name;
  const char* text;
};

constexpr ErrorText kErrors[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration",
     "invalid configuration argument"},
    {cudaErrorInsufficientDriver, "cudaErrorInsufficientDriver",
     "CUDA driver version is insufficient for CUDA runtime version"},
    {cudaErrorInvalidDeviceFunction, "cudaErrorInvalidDeviceFunction", "invalid device function"},
    {cudaErrorNoDevice, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorNoKernelImageForDevice, "cudaErrorNoKernelImageForDevice",
     "no kernel image is available for execution on the device"},
    {cudaErrorUnsupportedPtxVersion, "cudaErrorUnsupportedPtxVersion",
     "the provided PTX was compiled with an unsupported toolchain."},
    {cudaErrorLaunchOutOfResources, "cudaErrorLaunchOutOfResources",
     "too many resources requested for launch"},
};

ErrorText described(cudaError_t error) {
  for (const ErrorText& entry : kErrors) {
    if (entry.error == error) return entry;
  }
  return {error, "unrecognized error code", "unrecognized error code"};
}

}  // namespace

const char* cudaGetErrorName(cudaError_t error) { return described(error).name; }
const char* cudaGetErrorString(cudaError_t error) { return described(error).text; }

cudaError_t cudaPeekAtLastError() { return last_error; }
cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  return returned(device == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return returned(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = kArchitecture == 75 ? 40 : 108;  // a T4, an A100
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = kArchitecture / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = kArchitecture % 10;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = kMaxSharedBytes;
      return cudaSuccess;
  }
  return returned(cudaErrorInvalidValue);
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = kRuntimeVersion;
  return cudaSuccess;
}

namespace on_host {

cudaError_t set_attribute(Kernel kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 ||
      value > kMaxSharedBytes) {
    return returned(cudaErrorInvalidValue);
  }
  const std::lock_guard<std::mutex> lock(limits_mutex);
  limits[kernel] = value;
  return cudaSuccess;
}

cudaError_t get_attributes(cudaFuncAttributes* attributes, Kernel kernel) {
  *attributes = {};
  attributes->maxThreadsPerBlock = kMaxBlockThreads;
  attributes->ptxVersion = kArchitecture;
  attributes->binaryVersion = kArchitecture;
  attributes->maxDynamicSharedSizeBytes = shared_limit(kernel);
  return cudaSuccess;
}

cudaError_t launch(Kernel kernel, dim3 grid, dim3 block, Launch launch) {
  const unsigned threads = block.x * block.y * block.z;
  if (grid.x * grid.y * grid.z == 0 || threads == 0 || threads > kMaxBlockThreads) {
    return returned(cudaErrorInvalidConfiguration);
  }
  if (launch.shared_bytes > static_cast<std::size_t>(shared_limit(kernel))) {
    return returned(cudaErrorInvalidValue);
  }
  if (grid.y * grid.z != 1 || block.x != threads || threads % kWarpSize != 0) {
    throw std::runtime_error("only grids of one dimension and whole warps are known here");
  }
  run(launch);
  return cudaSuccess;
}

}  // namespace on_host
