// What the headers of this folder ask of the machinery in runtime.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <type_traits>

namespace on_host {

constexpr int kWarpSize = 32;
constexpr int kMaxBlockThreads = 1024;

// Shared memory starts out as this byte, and so does a copy that nobody has waited for: four of
// them are NaN as a float, two as a half or a bfloat16.
constexpr int kPoison = 0xFF;

inline bool same_text(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }

// A place in the kernel's source. As the default of a last parameter it is where the call stands.
// A return address would not do: compilers duplicate calls and merge them.
struct Site {
  const char* file;
  int line;

  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
  bool operator==(const Site& other) const {
    return line == other.line && same_text(file, other.file);
  }
  std::string text() const {
    const char* slash = std::strrchr(file, '/');
    return std::string(slash == nullptr ? file : slash + 1) + ":" + std::to_string(line);
  }
};

template <class To, class From>
To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From) && std::is_trivially_copyable_v<To>);
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// What the lanes of a warp handed to an operation.
template <class Argument>
class Lanes {
 public:
  explicit Lanes(void* const* arguments) : arguments_(arguments) {}
  Argument& operator[](int lane) const { return *static_cast<Argument*>(arguments_[lane]); }

 private:
  void* const* arguments_;
};

// Acts on the 32 lanes' arguments once all lanes have come.
using WarpFunction = void (*)(void* const* arguments);

// These are called by the threads of a block.
void wait_for_block(Site site);
void wait_for_warp(const char* name, WarpFunction perform, void* argument, Site site);
std::uint32_t shuffle(const char* name, unsigned mask, std::uint32_t bits, int source, Site site);
void check_full_mask(const char* name, unsigned mask, Site site);
void check_aligned(const char* name, const void* pointer, std::size_t alignment, Site site);
void check_shared(const char* name, const void* pointer, std::size_t bytes, Site site);
unsigned char* shared_memory();
int current_lane();
[[noreturn]] void fail(const char* name, const char* reason, Site site);
[[noreturn]] void fail(std::string text);

// Asynchronous copies of the calling thread: queued, and carried out when they are waited for.
void start_copy(const char* name, void* shared, const void* global, int bytes, int size, Site site);
void commit_copies();
void wait_for_copies(int groups_left_open);

struct Launch {
  const char* parameters;  // the mangled name of the parameter block's type, for messages
  unsigned blocks;
  unsigned threads;
  std::size_t shared_bytes;
  std::function<void()> thread;  // what each thread runs
};

// Runs every block. Throws std::runtime_error if a thread does what the GPU would not forgive.
void run(const Launch& launch);

}  // namespace on_host
