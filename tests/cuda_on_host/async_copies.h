// A thread's cp.async copies, which are carried out when they are waited for and no sooner.
#pragma once

#include <cstddef>
#include <cstring>
#include <vector>

#include "race.h"

namespace on_host {

struct AsyncCopy {
  unsigned char* to;
  const void* from;
  int bytes;
  int size;  // `bytes` from the source, the rest zeros
  unsigned group;
  const void* code;  // where it was started
};

class AsyncCopies {
 public:
  void start(AsyncCopy copy) {
    copy.group = groups_;
    queue_.push_back(copy);
  }

  void commit() { ++groups_; }

  // Carries out all groups but the last `left_open` that were committed.
  void wait(int left_open) {
    std::size_t done = 0;
    while (done < queue_.size() && queue_[done].group + left_open < groups_) {
      const AsyncCopy& copy = queue_[done++];
      race::finish_copy(copy.to, copy.size, copy.from, copy.bytes, copy.code);
      if (copy.bytes > 0) std::memcpy(copy.to, copy.from, copy.bytes);
      std::memset(copy.to + copy.bytes, 0, copy.size - copy.bytes);
    }
    queue_.erase(queue_.begin(), queue_.begin() + static_cast<std::ptrdiff_t>(done));
  }

  bool empty() const { return queue_.empty(); }

 private:
  std::vector<AsyncCopy> queue_;
  unsigned groups_ = 0;
};

}  // namespace on_host
