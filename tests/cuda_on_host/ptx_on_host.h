// What csrc/ptx.cuh wraps, for the host: the same functions with the same meaning.
#pragma once

#include "execution.h"

// As csrc/ptx.cuh has it.
#if __CUDA_ARCH__ >= 800
#define FSP_AMPERE 1
#else
#define FSP_AMPERE 0
#endif

namespace fsp {

using on_host::Site;

// The block's dynamic shared memory.
inline unsigned char* shared_memory() { return on_host::shared_memory(); }

// Every lane gives the address of one row of eight 16-bit elements.
void ldmatrix_x4(std::uint32_t (&r)[4], const void* row, Site site = Site::here());
void ldmatrix_x4_trans(std::uint32_t (&r)[4], const void* row, Site site = Site::here());

// d += a b, rounded once and toward zero.
void mma_f16(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1,
             Site site = Site::here());

#if FSP_AMPERE

void mma_bf16(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1,
              Site site = Site::here());
void mma_tf32(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1,
              Site site = Site::here());

// Copies the first `bytes` and sets the rest of the 4, 8 or 16 to zero, both seen after the wait.
template <int SIZE>
inline void cp_async(void* shared, const void* global, int bytes, Site site = Site::here()) {
  static_assert(SIZE == 4 || SIZE == 8 || SIZE == 16);
  on_host::start_copy("cp_async", shared, global, bytes, SIZE, site);
}
inline void cp_async_commit() { on_host::commit_copies(); }
template <int N>
inline void cp_async_wait() {
  on_host::wait_for_copies(N);
}

#endif  // FSP_AMPERE

}  // namespace fsp
