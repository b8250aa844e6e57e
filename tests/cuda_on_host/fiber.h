// Stacks to run a block's threads on, and how to change from one to another.
#pragma once

#include <cstddef>

namespace on_host {

struct Context {
  void* stack_pointer = nullptr;
  // Kept for AddressSanitizer, which has to know which stack is in use.
  const void* stack_bottom = nullptr;
  std::size_t stack_bytes = 0;
  void* fake_stack = nullptr;
};

// Leaves `from` and goes on in `to`; returns when `to`, and nobody else, comes back to `from`.
void switch_context(Context& from, Context& to);

// The first statement of a fiber's entry; `from` is who switched to it.
void entered_from(Context& from);

// A stack on which `entry`, which must never return, starts at the first switch.
class Fiber {
 public:
  Fiber(void (*entry)(), int index);
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  Context context;

 private:
  unsigned char* mapping_;
};

}  // namespace on_host
