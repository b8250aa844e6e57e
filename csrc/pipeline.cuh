// The loop of the kernels: it copies tiles to shared memory while it multiplies the tiles before
// them.
#pragma once

#include "ptx.cuh"

namespace fsp {

template <int GROUPS>
__device__ __forceinline__ void wait_for_copies() {
#if FSP_AMPERE
  cp_async_wait<GROUPS>();
#endif
}

__device__ __forceinline__ void commit_copies() {
#if FSP_AMPERE
  cp_async_commit();
#endif
}

// For each block from `begin` to `end`, all threads call load(block, stage), which fills a stage of
// shared memory, then compute(block, stage). With two stages, a block is loaded while the block
// before it is computed. Shared memory is free when this returns.
template <class Load, class Compute>
__device__ __forceinline__ void pipeline(int begin, int end, int stages, Load load,
                                         Compute compute) {
  const int ahead = stages - 1;
  int stage = 0;
#pragma unroll 1
  for (int next = begin; next < end + ahead; ++next) {
    if (next < end) load(next, stage);
    commit_copies();
    stage ^= ahead;
    if (next - ahead < begin) continue;
    if (ahead) {
      wait_for_copies<1>();  // the last group belongs to the next block
    } else {
      wait_for_copies<0>();
    }
    __syncthreads();  // what other threads copied is there
    compute(next - ahead, stage);
    __syncthreads();  // nobody reads this stage any more
  }
}

}  // namespace fsp
