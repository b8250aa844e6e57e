/* A CUDA driver for machines without one: it notes the last launch and succeeds at all else.

   Triton's launcher is linked with it in place of libcuda.so.1. */
#include <cuda.h>
#include <string.h>

#define MOST_PARAMETERS 1024

/* Written by the test before a launch: the size of each parameter in bytes. */
int stub_count;
int stub_sizes[MOST_PARAMETERS];

/* Read by the test after it. */
int stub_launches;
unsigned stub_grid[3], stub_block[3], stub_shared;
unsigned long long stub_stream, stub_function, stub_parameters[MOST_PARAMETERS];

CUresult cuLaunchKernelEx(const CUlaunchConfig *launch, CUfunction function, void **parameters,
                          void **extra) {
    const unsigned grid[3] = {launch->gridDimX, launch->gridDimY, launch->gridDimZ};
    const unsigned block[3] = {launch->blockDimX, launch->blockDimY, launch->blockDimZ};
    memcpy(stub_grid, grid, sizeof grid);
    memcpy(stub_block, block, sizeof block);
    stub_shared = launch->sharedMemBytes;
    stub_stream = (unsigned long long)launch->hStream;
    stub_function = (unsigned long long)function;
    memset(stub_parameters, 0, sizeof stub_parameters);
    for (int i = 0; i < stub_count; i++) memcpy(&stub_parameters[i], parameters[i], stub_sizes[i]);
    stub_launches++;
    return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    static unsigned long long functions;
    *function = (CUfunction)++functions;
    return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
    *(CUdeviceptr *)data = pointer; /* the only one asked for: where a GPU sees it */
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    switch (attribute) {
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
        case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 227 << 10; break;
        default: *value = 228 << 10;
    }
    return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return CUDA_SUCCESS;
}

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
    *status = CU_STREAM_CAPTURE_STATUS_NONE;
    return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = "an error of the stub";
    return CUDA_SUCCESS;
}

#define GIVES(name, type, value, ...)                      \
    CUresult name(type *result, ##__VA_ARGS__) {           \
        *result = (type)(value);                           \
        return CUDA_SUCCESS;                               \
    }
GIVES(cuDriverGetVersion, int, 13000)
GIVES(cuDeviceGetCount, int, 1)
GIVES(cuDeviceGet, CUdevice, 0, int index)
GIVES(cuCtxGetCurrent, CUcontext, 1)
GIVES(cuCtxGetDevice, CUdevice, 0)
GIVES(cuCtxGetLimit, size_t, 0, CUlimit limit)
GIVES(cuDevicePrimaryCtxRetain, CUcontext, 1, CUdevice device)
GIVES(cuModuleLoadData, CUmodule, 1, const void *image)
GIVES(cuOccupancyMaxActiveClusters, int, 1, CUfunction function, const CUlaunchConfig *launch)

#define DOES_NOTHING(name, ...) \
    CUresult name(__VA_ARGS__) { return CUDA_SUCCESS; }
DOES_NOTHING(cuInit, unsigned flags)
DOES_NOTHING(cuCtxSetCurrent, CUcontext context)
DOES_NOTHING(cuCtxSetLimit, CUlimit limit, size_t value)
DOES_NOTHING(cuModuleUnload, CUmodule module)
DOES_NOTHING(cuFuncSetAttribute, CUfunction function, CUfunction_attribute attribute, int value)
DOES_NOTHING(cuFuncSetCacheConfig, CUfunction function, CUfunc_cache config)
