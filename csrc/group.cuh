// One launch works on several entries of a group. Its first blocks are for the first entry, and so
// on.
#pragma once

#include "types.h"

namespace fsp {

struct Place {
  int entry;    // the entry that this block works for
  int program;  // this block's number among the blocks of the entry
};

template <class Group>
__device__ __forceinline__ Place place_of_block(const Group& group) {
  int entry = 0, program = blockIdx.x;
  while (program >= group.entries[entry].programs) program -= group.entries[entry++].programs;
  return {entry, program};
}

}  // namespace fsp
