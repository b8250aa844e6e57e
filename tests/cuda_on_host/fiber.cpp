#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// void switch_stack(void** saved, void* next): pushes the registers that a call preserves, stores
// the stack pointer in *saved, and pops the same registers from the stack `next`. Neither
// swapcontext (two system calls) nor longjmp (AddressSanitizer takes it for an unwinding) will do.
extern "C" void on_host_switch_stack(void** saved, void* next);

#if defined(__x86_64__)
asm(R"(
        .text
        .globl  on_host_switch_stack
        .hidden on_host_switch_stack
        .type   on_host_switch_stack, @function
on_host_switch_stack:
        pushq   %rbp
        pushq   %rbx
        pushq   %r12
        pushq   %r13
        pushq   %r14
        pushq   %r15
        movq    %rsp, (%rdi)
        movq    %rsi, %rsp
        popq    %r15
        popq    %r14
        popq    %r13
        popq    %r12
        popq    %rbx
        popq    %rbp
        ret
        .size   on_host_switch_stack, .-on_host_switch_stack
)");
// Six registers, the return address and a word that puts the stack where a call would have it.
constexpr int kFrameWords = 8;
constexpr int kReturnWord = 6;
#elif defined(__aarch64__)
asm(R"(
        .text
        .globl  on_host_switch_stack
        .hidden on_host_switch_stack
        .type   on_host_switch_stack, %function
on_host_switch_stack:
        sub     sp, sp, #160
        stp     x19, x20, [sp, #0]
        stp     x21, x22, [sp, #16]
        stp     x23, x24, [sp, #32]
        stp     x25, x26, [sp, #48]
        stp     x27, x28, [sp, #64]
        stp     x29, x30, [sp, #80]
        stp     d8, d9, [sp, #96]
        stp     d10, d11, [sp, #112]
        stp     d12, d13, [sp, #128]
        stp     d14, d15, [sp, #144]
        mov     x2, sp
        str     x2, [x0]
        mov     sp, x1
        ldp     x19, x20, [sp, #0]
        ldp     x21, x22, [sp, #16]
        ldp     x23, x24, [sp, #32]
        ldp     x25, x26, [sp, #48]
        ldp     x27, x28, [sp, #64]
        ldp     x29, x30, [sp, #80]
        ldp     d8, d9, [sp, #96]
        ldp     d10, d11, [sp, #112]
        ldp     d12, d13, [sp, #128]
        ldp     d14, d15, [sp, #144]
        add     sp, sp, #160
        ret
        .size   on_host_switch_stack, .-on_host_switch_stack
)");
constexpr int kFrameWords = 20;
constexpr int kReturnWord = 11;  // x30
#else
#error "switch_stack is written for x86-64 and aarch64"
#endif

namespace on_host {
namespace {

constexpr std::size_t kGuardBytes = 64 * 1024;  // a page, however large the system's pages are
#ifdef __SANITIZE_ADDRESS__
constexpr std::size_t kStackBytes = 256 * 1024;
#else
constexpr std::size_t kStackBytes = 64 * 1024;
#endif
// Stacks that all began at the same offset of a page would compete for the same cache lines.
constexpr std::size_t kColors = 16;
constexpr std::size_t kColorBytes = 256;

unsigned char* map_stack() {
  void* mapping = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  mprotect(mapping, kGuardBytes, PROT_NONE);
  return static_cast<unsigned char*>(mapping);
}

}  // namespace

void switch_context(Context& from, Context& to) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack_bottom, to.stack_bytes);
#endif
  on_host_switch_stack(&from.stack_pointer, to.stack_pointer);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(from.fake_stack, &to.stack_bottom, &to.stack_bytes);
#endif
}

void entered_from([[maybe_unused]] Context& from) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &from.stack_bottom, &from.stack_bytes);
#endif
}

Fiber::Fiber(void (*entry)(), int index) : mapping_(map_stack()) {
  context.stack_bottom = mapping_ + kGuardBytes;
  context.stack_bytes = kStackBytes;
  unsigned char* top = mapping_ + kGuardBytes + kStackBytes - index % kColors * kColorBytes;
  // The mapping is zeros, so that every register starts as 0 and backtraces end here.
  auto* frame = reinterpret_cast<std::uintptr_t*>(top) - kFrameWords;
  frame[kReturnWord] = reinterpret_cast<std::uintptr_t>(entry);
  context.stack_pointer = frame;
}

Fiber::~Fiber() {
#ifdef __SANITIZE_ADDRESS__
  // Frames that were abandoned rather than returned from have left their redzones behind.
  __asan_unpoison_memory_region(mapping_, kGuardBytes + kStackBytes);
#endif
  munmap(mapping_, kGuardBytes + kStackBytes);
}

}  // namespace on_host
