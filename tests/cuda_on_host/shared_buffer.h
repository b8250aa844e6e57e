// A block's dynamic shared memory.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <new>

namespace on_host {

class SharedBuffer {
 public:
  explicit SharedBuffer(std::size_t bytes) : bytes_(bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, kAlignment, bytes + kGuardBytes) != 0) throw std::bad_alloc();
    data_ = static_cast<unsigned char*>(memory);
    std::memset(data_ + bytes_, kGuard, kGuardBytes);
  }
  ~SharedBuffer() { std::free(data_); }
  SharedBuffer(const SharedBuffer&) = delete;
  SharedBuffer& operator=(const SharedBuffer&) = delete;

  unsigned char* data() const { return data_; }
  void fill(int byte) { std::memset(data_, byte, bytes_); }

  bool contains(const void* pointer, std::size_t bytes) const {
    const auto* first = static_cast<const unsigned char*>(pointer);
    return first >= data_ && first <= data_ + bytes_ &&
           bytes <= static_cast<std::size_t>(data_ + bytes_ - first);
  }

  bool guard_is_intact() const {
    for (std::size_t i = 0; i < kGuardBytes; ++i) {
      if (data_[bytes_ + i] != kGuard) return false;
    }
    return true;
  }

 private:
  static constexpr std::size_t kAlignment = 128;
  static constexpr unsigned char kGuard = 0xA5;
#ifdef __SANITIZE_ADDRESS__
  static constexpr std::size_t kGuardBytes = 0;  // its redzone begins where the memory ends
#else
  static constexpr std::size_t kGuardBytes = 4096;
#endif

  std::size_t bytes_;
  unsigned char* data_;
};

}  // namespace on_host
