// Kernels that multiply no matrices.
#include "combine.cuh"
#include "elementwise.cuh"
#include "host.cuh"

namespace fsp {

static int sums_shared_bytes(int, int) { return WARPS * sizeof(float); }
static int combine_shared_bytes(int, int) { return THREADS * sizeof(float); }
static int no_shared_bytes(int, int) { return 0; }

Kernel combine_kernel() {
  return kernel_of<Pairs, fsp_combine>("fsp_combine", combine_shared_bytes);
}
Kernel matrix_gradients_kernel() {
  return kernel_of<Products, fsp_matrix_gradients>("fsp_matrix_gradients", no_shared_bytes);
}
Kernel finish_kernel() { return kernel_of<Sums, fsp_finish>("fsp_finish", sums_shared_bytes); }
Kernel scale_kernel() { return kernel_of<Scales, fsp_scale>("fsp_scale", no_shared_bytes); }

}  // namespace fsp
