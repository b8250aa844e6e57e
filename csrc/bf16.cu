// Kernels that multiply bf16.
#include "host.cuh"

namespace fsp {

Kernels bf16_kernels() { return kernels_of_type<__nv_bfloat16>(); }

}  // namespace fsp
