// Who touched which memory since when. Two threads of a block race if they touch the same memory
// with no barrier in between, and one of them writes; two blocks of a launch always do. A copy to
// shared memory races with whoever touches it before the copy has been waited for.
//
// Kernels are compiled with -fsanitize=thread, which has them call a function before each access to
// memory. race.cpp defines these functions; ThreadSanitizer's own library takes no part. Operations
// of a warp order nothing here. __syncwarp would, but no kernel relies on it.
#pragma once

#include <cstddef>

namespace on_host::race {

#ifdef ON_HOST_RACES

// The machinery tells what happens, in this order.
void begin_launch();
void begin_block(const unsigned char* shared, std::size_t bytes);
void enter_thread(const void* stack, std::size_t bytes);
void leave_thread();
void pass_barrier();

// An access of the thread that runs, from a place in the code. A race ends the launch.
void access(const void* memory, std::size_t bytes, bool writes, const void* code);

// A copy to shared memory starts, and has been waited for.
void start_copy(const void* to, std::size_t size, const void* from, std::size_t bytes,
                const void* code);
void finish_copy(const void* to, std::size_t size, const void* from, std::size_t bytes,
                 const void* code);

#else

inline void begin_launch() {}
inline void begin_block(const unsigned char*, std::size_t) {}
inline void enter_thread(const void*, std::size_t) {}
inline void leave_thread() {}
inline void pass_barrier() {}
inline void access(const void*, std::size_t, bool, const void*) {}
inline void start_copy(const void*, std::size_t, const void*, std::size_t, const void*) {}
inline void finish_copy(const void*, std::size_t, const void*, std::size_t, const void*) {}

#endif

}  // namespace on_host::race
