// Kernels that multiply fp16.
#include "host.cuh"

namespace fsp {

Kernels fp16_kernels() { return kernels_of_type<__half>(); }

}  // namespace fsp
