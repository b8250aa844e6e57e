// Kernels that multiply fp32.
#include "host.cuh"

namespace fsp {

Kernels fp32_kernels() { return kernels_of_type<float>(); }

Kernel gram_kernel_32() { return gram_kernel<32>(); }
Kernel gram_kernel_64() { return gram_kernel<64>(); }

}  // namespace fsp
