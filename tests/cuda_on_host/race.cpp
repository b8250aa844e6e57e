#include "race.h"

#ifdef ON_HOST_RACES

#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "cuda_runtime.h"

namespace on_host::race {
namespace {

constexpr std::size_t kGrain = 2;  // bytes that are told apart: the smallest element
constexpr std::size_t kPage = 4096;
constexpr std::size_t kMostPages = (64 << 20) / kPage;

// Time is counted in barriers, blocks and launches: two accesses at the same time are not ordered.
struct Access {
  std::uint64_t when : 29;  // 0: never
  std::uint64_t copies : 1;  // to here, and has not been waited for
  std::uint64_t thread : 10;
  std::uint64_t code : 24;  // from the start of the library
};
static_assert(sizeof(Access) == 8 && kMaxBlockThreads <= 1 << 10);

struct Cell {
  Access write;
  Access read, other_read;  // the last ones, at one time, of two threads if there were two
  Access read_before;       // by an earlier block of the launch
};

std::uint32_t now = 1, launch_began = 1, block_began = 1;
const unsigned char* stack = nullptr;  // of the thread that runs, if one does
std::size_t stack_bytes = 0;
const unsigned char* shared = nullptr;
std::vector<Cell> shared_cells;
std::unordered_map<std::uintptr_t, std::unique_ptr<Cell[]>> pages;  // of global memory

// Threads take turns with several maps: where the cells of a page are is kept for a while.
struct Kept {
  std::uintptr_t page = 0;
  Cell* cells = nullptr;
};
Kept kept[256];

bool contains(const unsigned char* first, std::size_t bytes, const unsigned char* at) {
  return static_cast<std::size_t>(at - first) < bytes;
}

bool is_shared(const unsigned char* at) {
  return contains(shared, shared_cells.size() * kGrain, at);
}

Cell& cell_of(const unsigned char* at) {
  if (is_shared(at)) return shared_cells[static_cast<std::size_t>(at - shared) / kGrain];
  const auto address = reinterpret_cast<std::uintptr_t>(at);
  const std::uintptr_t page = address / kPage;
  Kept& found = kept[page % 256];
  if (found.page != page) {
    auto& cells = pages[page];
    if (!cells) cells.reset(new Cell[kPage / kGrain]());
    found = {page, cells.get()};
  }
  return found.cells[address % kPage / kGrain];
}

// ---- messages

const Dl_info library = [] {
  Dl_info info{};
  dladdr(reinterpret_cast<const void*>(&begin_launch), &info);
  return info;
}();

// What addr2line says of a call that returns to `code`: "maps.cuh:66 (in maps.cuh:318, ...)", the
// calls that were inlined last. Where there is no addr2line: the place in the library.
std::string place(std::uint64_t code) {
  char number[32];
  std::snprintf(number, sizeof number, "0x%llx", static_cast<unsigned long long>(code - 1));
  const std::string command =
      std::string("addr2line -i -e '") + library.dli_fname + "' " + number + " 2>/dev/null";
  std::string text;
  int lines = 0;
  if (FILE* output = popen(command.c_str(), "r")) {
    char line[1024];
    while (std::fgets(line, sizeof line, output) != nullptr) {
      line[std::strcspn(line, " \n")] = '\0';  // "(discriminator 2)" may follow
      if (line[0] == '?' || std::strstr(line, "cuda_on_host") != nullptr) continue;
      const char* slash = std::strrchr(line, '/');
      text += lines == 0 ? "" : lines == 1 ? " (in " : ", ";
      text += slash == nullptr ? line : slash + 1;
      ++lines;
    }
    pclose(output);
  }
  if (lines == 0) return std::string(library.dli_fname) + "+" + number;
  return lines == 1 ? text : text + ")";
}

[[noreturn]] void report(const unsigned char* at, bool writes, const Access& own,
                         const Access& other, bool other_wrote) {
  const char* done = other.copies ? "started a copy" : other_wrote ? "wrote" : "read";
  const char* why = other.copies              ? "which has not been waited for"
                    : other.when < block_began ? "in an earlier block of the launch"
                                               : "and no barrier came in between";
  fail(std::string("races in ") + (is_shared(at) ? "shared" : "global") + " memory: it " +
       (writes ? "writes" : "reads") + " at " + place(own.code) + "; warp " +
       std::to_string(other.thread / kWarpSize) + ", lane " +
       std::to_string(other.thread % kWarpSize) + " " + done + " at " + place(other.code) + ", " +
       why);
}

// ---- accesses

void touch(const unsigned char* at, bool writes, Access own) {
  Cell& cell = cell_of(at);
  const auto in_earlier_block = [](const Access& other) {
    return launch_began <= other.when && other.when < block_began;
  };
  const auto check = [&](const Access& other, bool other_wrote) {
    const bool unordered = other.when == now && other.thread != own.thread;
    if (unordered || in_earlier_block(other) || other.copies) {
      report(at, writes, own, other, other_wrote);
    }
  };
  check(cell.write, true);
  if (writes) {
    for (const Access& read : {cell.read, cell.other_read, cell.read_before}) check(read, false);
    cell.write = own;
  } else if (cell.read.when != now) {
    if (in_earlier_block(cell.read)) cell.read_before = cell.read;
    cell.read = own;
  } else if (cell.read.thread != own.thread) {
    cell.other_read = own;
  }
}

Access access_by(const void* code) {
  Access own{};
  own.when = now;
  own.thread = threadIdx.x;
  own.code = static_cast<std::uint64_t>(static_cast<const char*>(code) -
                                        static_cast<const char*>(library.dli_fbase));
  return own;
}

void set_copying(const void* memory, std::size_t bytes, bool copies) {
  const auto* at = static_cast<const unsigned char*>(memory);
  for (std::size_t i = 0; i < bytes; i += kGrain) cell_of(at + i).write.copies = copies;
}

}  // namespace

void begin_launch() {
  launch_began = ++now;
  if (pages.size() > kMostPages) {
    pages.clear();
    for (Kept& entry : kept) entry = {};
  }
}

void begin_block(const unsigned char* memory, std::size_t bytes) {
  block_began = ++now;
  shared = memory;
  shared_cells.assign((bytes + kGrain - 1) / kGrain, Cell{});
}

void enter_thread(const void* memory, std::size_t bytes) {
  stack = static_cast<const unsigned char*>(memory);
  stack_bytes = bytes;
}

void leave_thread() { stack = nullptr; }

void pass_barrier() { ++now; }

void access(const void* memory, std::size_t bytes, bool writes, const void* code) {
  const auto* at = static_cast<const unsigned char*>(memory);
  if (stack == nullptr || contains(stack, stack_bytes, at)) return;
  const Access own = access_by(code);
  for (std::size_t i = 0; i < bytes; i += kGrain) touch(at + i, writes, own);
}

void start_copy(const void* to, std::size_t size, const void* from, std::size_t bytes,
                const void* code) {
  access(from, bytes, false, code);
  access(to, size, true, code);
  set_copying(to, size, true);
}

void finish_copy(const void* to, std::size_t size, const void* from, std::size_t bytes,
                 const void* code) {
  set_copying(to, size, false);
  access(from, bytes, false, code);
  access(to, size, true, code);
}

}  // namespace on_host::race

// ---- what -fsanitize=thread calls

#define HOOK extern "C" __attribute__((visibility("hidden"))) void
#define ACCESS(name, bytes, writes)                                              \
  HOOK __tsan_##name(void* at) {                                                 \
    on_host::race::access(at, bytes, writes, __builtin_return_address(0));       \
  }
#define ACCESSES(bytes)                       \
  ACCESS(read##bytes, bytes, false)           \
  ACCESS(write##bytes, bytes, true)           \
  ACCESS(unaligned_read##bytes, bytes, false) \
  ACCESS(unaligned_write##bytes, bytes, true)

ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)

HOOK __tsan_read_range(void* at, std::size_t bytes) {
  on_host::race::access(at, bytes, false, __builtin_return_address(0));
}
HOOK __tsan_write_range(void* at, std::size_t bytes) {
  on_host::race::access(at, bytes, true, __builtin_return_address(0));
}
HOOK __tsan_init() {}
HOOK __tsan_func_entry(void*) {}
HOOK __tsan_func_exit() {}
HOOK __tsan_vptr_update(void**, void*) {}
HOOK __tsan_vptr_read(void**) {}

#endif  // ON_HOST_RACES
