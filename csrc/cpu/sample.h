// One sample of a pair as a pair of its own: the positions that count are all positions, and maps
// are pooled.
#pragma once

#include "mask.h"
#include "pool.h"

namespace fsp::cpu::FSP_VARIANT {

struct Sample {
  Counted at[2];  // of the student, of the teacher
  Pooled pooled[4];
  Pair pair;

  Sample(const Pair& whole, int64_t sample, Scratch& scratch) : pooled{}, pair(whole) {
    pair.losses += sample;
    for (int network = 0; network < 2; ++network) {
      const int64_t positions = whole.positions[network];
      const uint8_t* mask = whole.masks[network];
      at[network] = counted(mask ? mask + sample * positions : nullptr, positions, scratch);
      pair.positions[network] = at[network].positions();
    }
    for (int own = 0; own < 4; ++own) {
      const Counted& here = at[own / 2];
      const Pooling& pooling = whole.pooling[own];
      Tensor &map = pair.maps[own], &gradient = pair.gradients[own];
      const int64_t channels = whole.channels(own);
      if (gradient.address) gradient = from_position(gradient, sample, here.first);
      if (whole.symmetric && own % 2) {
        map = pair.maps[own - 1];
      } else if (pooling.pools()) {
        const Tensor full = from_position(map, sample, 0);
        pooled[own] = pooled_map(full, channels, pooling, gradient.address, scratch);
        map = pooled[own].map;
        if (gradient.address) gradient = pooled[own].gradient;
      } else {
        map = map_at(map, sample, channels, here, scratch);
      }
    }
  }

  // Write the gradients of pooled maps. Move the others to their places, and fill the positions
  // that do not count with zeros.
  void finish_gradients(const Pair& whole, int64_t sample, Scratch& scratch) const {
    for (int own = 0; own < 4; ++own) {
      const Tensor& gradient = whole.gradients[own];
      const int64_t channels = whole.channels(own), positions = whole.positions[own / 2];
      if (!gradient.address) continue;
      if (whole.pooling[own].pools()) {
        unpool(pooled[own], from_position(gradient, sample, 0), channels, scratch);
        continue;
      }
      const bool wide = gradient.scalar == Scalar::fp32;
      (wide ? finish_gradient<float> : finish_gradient<uint16_t>)(gradient, sample, channels,
                                                                  positions, at[own / 2], scratch);
    }
  }
};

}  // namespace fsp::cpu::FSP_VARIANT
