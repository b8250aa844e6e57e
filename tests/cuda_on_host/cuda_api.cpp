// The runtime's functions, for two devices of the architecture that is compiled for.
#include <map>
#include <mutex>
#include <stdexcept>
#include <utility>

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
constexpr int kDevices = 2;

thread_local cudaError_t last_error = cudaSuccess;
thread_local int current_device = 0;

cudaError_t returned(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

// What tests ask for, and are told.
struct {
  int launches[kDevices];
  int capturing;          // whether a graph is captured, in every stream
  int (*observer)();      // called by every launch, if set
  int observed;           // what it returned last
} seen = {};

// The kernels that are loaded, by device, with the dynamic shared memory that each has asked for.
std::mutex limits_mutex;
std::map<std::pair<int, on_host::Kernel>, int> limits;

// The limit of a kernel on the current device. What is used is loaded, which may fail.
cudaError_t load(on_host::Kernel kernel, int** limit) {
  const auto [entry, is_new] = limits.try_emplace({current_device, kernel}, kSharedBytesUnasked);
  if (is_new && seen.capturing != 0) {
    limits.erase(entry);
    return returned(cudaErrorStreamCaptureUnsupported);
  }
  *limit = &entry->second;
  return cudaSuccess;
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
    {cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported",
     "operation not permitted when stream is capturing"},
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
  *count = kDevices;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kDevices) return returned(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = seen.capturing != 0 ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device < 0 || device >= kDevices) return returned(cudaErrorInvalidDevice);
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
  int* limit = nullptr;
  const cudaError_t status = load(kernel, &limit);
  if (status == cudaSuccess) *limit = value;
  return status;
}

cudaError_t get_attributes(cudaFuncAttributes* attributes, Kernel kernel) {
  const std::lock_guard<std::mutex> lock(limits_mutex);
  int* limit = nullptr;
  const cudaError_t status = load(kernel, &limit);
  if (status != cudaSuccess) return status;
  *attributes = {};
  attributes->maxThreadsPerBlock = kMaxBlockThreads;
  attributes->ptxVersion = kArchitecture;
  attributes->binaryVersion = kArchitecture;
  attributes->maxDynamicSharedSizeBytes = *limit;
  return cudaSuccess;
}

cudaError_t launch(Kernel kernel, dim3 grid, dim3 block, Launch launch) {
  const unsigned threads = block.x * block.y * block.z;
  if (grid.x * grid.y * grid.z == 0 || threads == 0 || threads > kMaxBlockThreads) {
    return returned(cudaErrorInvalidConfiguration);
  }
  {
    const std::lock_guard<std::mutex> lock(limits_mutex);
    int* limit = nullptr;
    const cudaError_t status = load(kernel, &limit);
    if (status != cudaSuccess) return status;
    if (launch.shared_bytes > static_cast<std::size_t>(*limit)) {
      return returned(cudaErrorInvalidValue);
    }
    ++seen.launches[current_device];
  }
  if (seen.observer != nullptr) seen.observed = seen.observer();
  if (grid.y * grid.z != 1 || block.x != threads || threads % kWarpSize != 0) {
    throw std::runtime_error("only grids of one dimension and whole warps are known here");
  }
  run(launch);
  return cudaSuccess;
}

}  // namespace on_host

// The door for tests, by ctypes.
extern "C" __attribute__((visibility("default"))) void* on_host_seen() { return &seen; }
extern "C" __attribute__((visibility("default"))) int on_host_device() { return current_device; }
