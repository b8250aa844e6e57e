// One launch works on several pairs: its blocks are shared out among them, one after another.
#pragma once

#include "types.h"

namespace fsp {

struct Place {
  int entry;    // which of the group's
  int program;  // this block's number among those of the entry
};

template <class Group>
__device__ __forceinline__ Place place_of_block(const Group& group) {
  int entry = 0, program = blockIdx.x;
  while (program >= group.entries[entry].programs) program -= group.entries[entry++].programs;
  return {entry, program};
}

}  // namespace fsp
