// How a launch runs: blocks, warps, lanes, and what they wait for.
#include <cxxabi.h>

#include <memory>
#include <mutex>
#include <stdexcept>
#include <vector>

#include "async_copies.h"
#include "cuda_runtime.h"
#include "fiber.h"
#include "race.h"
#include "shared_buffer.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace on_host {
namespace {

// What a thread waits for. `perform` is null for the barrier of the block.
struct Request {
  const char* name;
  Site site;
  WarpFunction perform;
  void* argument;

  bool matches(const Request& other) const {
    return same_text(name, other.name) && site == other.site;
  }
  std::string text() const { return std::string(name) + " (" + site.text() + ")"; }
};

void run_kernel_for_ever();

struct Thread {
  explicit Thread(unsigned number)
      : index{number, 0, 0}, fiber(run_kernel_for_ever, static_cast<int>(number)) {}

  uint3 index;
  Fiber fiber;
  AsyncCopies copies;
  Request request{};
  bool exited = false;

  std::string text() const { return exited ? "has exited" : "waits at " + request.text(); }
};

std::string demangled(const char* name) {
  char* text = abi::__cxa_demangle(name, nullptr, nullptr, nullptr);
  std::string result = text == nullptr ? name : text;
  std::free(text);
  return result;
}

// Everything that runs, or is kept for the next launch: there is one launch at a time.
class Machine {
 public:
  void run(const Launch& launch);

  Thread& current() { return *current_; }
  SharedBuffer& shared() { return *shared_; }
  const Launch& launch() { return *launch_; }

  // Called by the current thread.
  void suspend() { switch_context(current_->fiber.context, scheduler_); }
  void entered() { entered_from(scheduler_); }
  void record_error(const std::string& text) { error_ = where(*current_) + text; }

 private:
  void run_blocks();
  void run_block();
  bool run_to_barrier();
  void run_warp(unsigned warp);
  bool perform_warp_operation(unsigned warp);
  void resume(Thread& thread);
  void check_barrier();

  bool descending(unsigned step) const;
  std::string where() const;
  std::string where(const Thread& thread) const;
  [[noreturn]] void fail(const Thread& one, const Thread& other) const;

  std::mutex mutex_;
  // Fibers are kept from block to block and from launch to launch.
  std::vector<std::unique_ptr<Thread>> threads_;
  Context scheduler_;
  unsigned launches_ = 0;
  // The rest is of the launch that runs.
  const Launch* launch_ = nullptr;
  SharedBuffer* shared_ = nullptr;
  Thread* current_ = nullptr;
  unsigned phase_ = 0;
  unsigned warp_step_ = 0;
  std::string error_;
};

Machine machine;

void run_kernel_for_ever() {
  machine.entered();
  for (;;) {
    machine.launch().thread();
    Thread& thread = machine.current();
    if (!thread.copies.empty()) {
      fail("exit", "copies were started and never waited for", {"the kernel's end", 0});
    }
    thread.exited = true;
    machine.suspend();
  }
}

void Machine::run(const Launch& launch) {
  const std::lock_guard<std::mutex> lock(mutex_);
  SharedBuffer shared(launch.shared_bytes);
  launch_ = &launch;
  shared_ = &shared;
  ++launches_;
  race::begin_launch();
  gridDim = dim3(launch.blocks);
  blockDim = dim3(launch.threads);
  while (threads_.size() < launch.threads) {
    threads_.push_back(std::make_unique<Thread>(static_cast<unsigned>(threads_.size())));
  }
  try {
    run_blocks();
  } catch (...) {
    threads_.clear();  // they are in the middle of the kernel and will not go on
    error_.clear();
    throw;
  }
}

void Machine::run_blocks() {
  for (unsigned block = 0; block < launch_->blocks; ++block) {
    blockIdx = {block, 0, 0};
    run_block();
  }
}

void Machine::run_block() {
  shared_->fill(kPoison);
  race::begin_block(shared_->data(), launch_->shared_bytes);
  for (unsigned i = 0; i < launch_->threads; ++i) threads_[i]->exited = false;
  phase_ = 0;
  while (run_to_barrier()) {
    check_barrier();
    race::pass_barrier();
  }
  if (!shared_->guard_is_intact()) {
    throw std::runtime_error(where() + "the kernel wrote beyond the end of shared memory");
  }
}

// Runs every warp until all its threads are at a barrier or have exited. False: all have exited.
bool Machine::run_to_barrier() {
  const unsigned warps = launch_->threads / kWarpSize;
  const bool down = descending(phase_++);
  for (unsigned i = 0; i < warps; ++i) run_warp(down ? warps - 1 - i : i);
  for (unsigned i = 0; i < launch_->threads; ++i) {
    if (!threads_[i]->exited) return true;
  }
  return false;
}

void Machine::run_warp(unsigned warp) {
  warp_step_ = 0;
  do {
    const bool down = descending(phase_ + warp_step_++);
    for (unsigned i = 0; i < kWarpSize; ++i) {
      Thread& thread = *threads_[warp * kWarpSize + (down ? kWarpSize - 1 - i : i)];
      if (!thread.exited) resume(thread);
    }
  } while (perform_warp_operation(warp));
}

// False if the warp's threads are at a barrier of the block or have exited. A thread that has
// exited counts for a barrier, as in CUDA, but not for an operation of the warp.
bool Machine::perform_warp_operation(unsigned warp) {
  void* arguments[kWarpSize];
  const Thread* waiting = nullptr;
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    const Thread& thread = *threads_[warp * kWarpSize + lane];
    arguments[lane] = thread.request.argument;
    if (!thread.exited && waiting == nullptr) waiting = &thread;
  }
  if (waiting == nullptr) return false;
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    const Thread& thread = *threads_[warp * kWarpSize + lane];
    const bool may_be_absent = waiting->request.perform == nullptr;
    if (thread.exited ? !may_be_absent : !thread.request.matches(waiting->request)) {
      fail(thread, *waiting);
    }
  }
  if (waiting->request.perform == nullptr) return false;
  waiting->request.perform(arguments);
  return true;
}

void Machine::check_barrier() {
  const Thread* first = nullptr;
  for (unsigned i = 0; i < launch_->threads; ++i) {
    const Thread& thread = *threads_[i];
    if (thread.exited) continue;
    if (first == nullptr) first = &thread;
    if (!thread.request.matches(first->request)) fail(thread, *first);
  }
}

void Machine::resume(Thread& thread) {
  current_ = &thread;
  threadIdx = thread.index;
  race::enter_thread(thread.fiber.context.stack_bottom, thread.fiber.context.stack_bytes);
  switch_context(scheduler_, thread.fiber.context);
  race::leave_thread();
  if (!error_.empty()) throw std::runtime_error(error_);
}

// Ascending and descending take turns, in the other sense in the next block. Turns as in the
// Thue-Morse sequence, so that a loop with an even number of barriers sees both directions too.
bool Machine::descending(unsigned step) const {
  return __builtin_parity(step) != static_cast<int>(blockIdx.x % 2);
}

std::string Machine::where() const {
  return "launch " + std::to_string(launches_) + " of kernel(" + demangled(launch_->parameters) +
         ") with " + std::to_string(launch_->blocks) + " x " + std::to_string(launch_->threads) +
         " threads: block " + std::to_string(blockIdx.x) + ": ";
}

std::string Machine::where(const Thread& thread) const {
  const unsigned number = thread.index.x;
  return where() + "warp " + std::to_string(number / kWarpSize) + ", lane " +
         std::to_string(number % kWarpSize) + " ";
}

void Machine::fail(const Thread& one, const Thread& other) const {
  throw std::runtime_error(where(one) + one.text() + " while warp " +
                           std::to_string(other.index.x / kWarpSize) + ", lane " +
                           std::to_string(other.index.x % kWarpSize) + " " + other.text());
}

// Apart from fail(), whose frame is never left, so that its strings are freed.
void record_failure(const char* name, const char* reason, Site site) {
  machine.record_error(std::string("at ") + name + " (" + site.text() + "): " + reason);
}

struct ShuffleLane {
  std::uint32_t value;
  int source;
  std::uint32_t result;
};

void perform_shuffle(void* const* arguments) {
  const Lanes<ShuffleLane> lanes(arguments);
  for (int lane = 0; lane < kWarpSize; ++lane) {
    lanes[lane].result = lanes[lanes[lane].source].value;
  }
}

}  // namespace

void run(const Launch& launch) { machine.run(launch); }

void fail(const char* name, const char* reason, Site site) {
  record_failure(name, reason, site);
  for (;;) machine.suspend();
}

void fail(std::string text) {
  machine.record_error(text);
  std::string().swap(text);  // this frame is never left
  for (;;) machine.suspend();
}

void wait_for_block(Site site) {
  machine.current().request = {"__syncthreads", site, nullptr, nullptr};
  machine.suspend();
}

void wait_for_warp(const char* name, WarpFunction perform, void* argument, Site site) {
  machine.current().request = {name, site, perform, argument};
  machine.suspend();
}

std::uint32_t shuffle(const char* name, unsigned mask, std::uint32_t bits, int source, Site site) {
  check_full_mask(name, mask, site);
  ShuffleLane lane{bits, source, 0};
  wait_for_warp(name, perform_shuffle, &lane, site);
  return lane.result;
}

void check_full_mask(const char* name, unsigned mask, Site site) {
  if (mask != ~0U) fail(name, "only whole warps are known here", site);
}

void check_aligned(const char* name, const void* pointer, std::size_t alignment, Site site) {
  if (reinterpret_cast<std::uintptr_t>(pointer) % alignment != 0) {
    fail(name, "an address is not aligned", site);
  }
}

void check_shared(const char* name, const void* pointer, std::size_t bytes, Site site) {
  if (!machine.shared().contains(pointer, bytes)) {
    fail(name, "an address is not within shared memory", site);
  }
}

unsigned char* shared_memory() { return machine.shared().data(); }

int current_lane() { return static_cast<int>(machine.current().index.x % kWarpSize); }

void start_copy(const char* name, void* shared, const void* global, int bytes, int size,
                Site site) {
  if (bytes < 0 || bytes > size) fail(name, "more bytes than it copies", site);
  check_aligned(name, shared, size, site);
  check_shared(name, shared, size, site);
  if (bytes > 0) check_aligned(name, global, size, site);
  const void* code = __builtin_return_address(0);
  race::start_copy(shared, size, global, bytes, code);
  std::memset(shared, kPoison, size);
  auto* const to = static_cast<unsigned char*>(shared);
  machine.current().copies.start({to, global, bytes, size, 0, code});
}

void commit_copies() { machine.current().copies.commit(); }

void wait_for_copies(int groups_left_open) { machine.current().copies.wait(groups_left_open); }

}  // namespace on_host
