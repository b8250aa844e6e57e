// Adaptive pooling of a map of one sample, and its gradient. Windows, ties and NaN are treated as
// by PyTorch. A panel of channels is pooled at a time, in vectors: (positions, kColumns) of fp32.
#pragma once

#include "product.h"

namespace fsp::cpu::FSP_VARIANT {

using Places = int32_t __attribute__((vector_size(kVectorBytes)));
constexpr int64_t kPanel = kColumns<float>;  // channels

// The positions in each window, in order: members[starts[o]] to members[starts[o + 1]].
struct Windows {
  const int32_t *starts, *members;
  int64_t positions, pooled;
};

inline Windows windows_of(const Pooling& pooling, Scratch& scratch) {
  const int64_t *size = pooling.size, *pooled = pooling.pooled;
  const auto first = [&](int axis, int64_t i) { return i * size[axis] / pooled[axis]; };
  const auto end = [&](int axis, int64_t i) {
    return ceil_div((i + 1) * size[axis], pooled[axis]);
  };
  int64_t most = 1;
  for (int axis = 0; axis < 3; ++axis) most *= size[axis] + pooled[axis];
  const int64_t count = pooled[0] * pooled[1] * pooled[2];
  int32_t *starts = take<int32_t>(scratch, count + 1), *start = starts;
  int32_t *members = take<int32_t>(scratch, most), *member = members;
  for (int64_t i = 0; i < pooled[0]; ++i) {
    for (int64_t j = 0; j < pooled[1]; ++j) {
      for (int64_t k = 0; k < pooled[2]; ++k) {
        *start++ = static_cast<int32_t>(member - members);
        for (int64_t z = first(0, i); z < end(0, i); ++z) {
          for (int64_t y = first(1, j); y < end(1, j); ++y) {
            for (int64_t x = first(2, k); x < end(2, k); ++x) {
              *member++ = static_cast<int32_t>((z * size[1] + y) * size[2] + x);
            }
          }
        }
      }
    }
  }
  *start = static_cast<int32_t>(member - members);
  return {starts, members, size[0] * size[1] * size[2], count};
}

inline Places places_of(int32_t position) { return Places{} + position; }
template <class Float>
Float* at(Float* panel, int64_t position, int vector) {
  return panel + position * kPanel + vector * kLanes<float>;
}

// Averages of a panel.
inline void average(const float* panel, const Windows& windows, float* pooled) {
  for (int64_t o = 0; o < windows.pooled; ++o) {
    const int32_t first = windows.starts[o], end = windows.starts[o + 1];
    for (int v = 0; v < kColumnVectors; ++v) {
      Vector<float> total = {};
      for (int32_t e = first; e < end; ++e) total += load(at(panel, windows.members[e], v));
      store(at(pooled, o, v), total / static_cast<float>(end - first));
    }
  }
}

// Maxima of a panel and their places.
inline void maximum(const float* panel, const Windows& windows, float* pooled, Places* places) {
  for (int64_t o = 0; o < windows.pooled; ++o) {
    const int32_t first = windows.starts[o], end = windows.starts[o + 1];
    for (int v = 0; v < kColumnVectors; ++v) {
      Vector<float> best = load(at(panel, windows.members[first], v));
      Places place = places_of(windows.members[first]);
      for (int32_t e = first + 1; e < end; ++e) {
        const int32_t position = windows.members[e];
        const Vector<float> x = load(at(panel, position, v));
        const Places takes = (x > best) | (x != x);
        best = takes ? x : best;
        place = takes ? places_of(position) : place;
      }
      store(at(pooled, o, v), best);
      places[o * kColumnVectors + v] = place;
    }
  }
}

// Add the gradient of a pooled panel to that of the panel. Without `places`, of averages.
inline void add_unpooled(const float* pooled, const Windows& windows, const Places* places,
                         float* panel) {
  for (int64_t o = 0; o < windows.pooled; ++o) {
    const int32_t first = windows.starts[o], end = windows.starts[o + 1];
    for (int v = 0; v < kColumnVectors; ++v) {
      const Vector<float> gradient = load(at(pooled, o, v)), zero = {};
      for (int32_t e = first; e < end; ++e) {
        const int32_t position = windows.members[e];
        float* to = at(panel, position, v);
        if (places) {
          const Places is_here = places[o * kColumnVectors + v] == places_of(position);
          store(to, load(to) + (is_here ? gradient : zero));
        } else {
          store(to, load(to) + gradient / static_cast<float>(end - first));
        }
      }
    }
  }
}

// A map of a sample that is pooled before it is multiplied, as rows of channels, and the memory of
// the gradient that its products are written to.
struct Pooled {
  Windows windows;
  Tensor map, gradient;
  Places* places;
};

inline Pooled pooled_map(const Tensor& x, int64_t channels, const Pooling& pooling,
                         bool wants_gradient, Scratch& scratch) {
  Pooled result{windows_of(pooling, scratch), {}, {}, nullptr};
  const Windows& windows = result.windows;
  const int64_t stride = round_up(channels, kPanel), size = windows.pooled * stride;
  // Maxima of bf16 are bf16.
  const Scalar scalar =
      x.scalar == Scalar::bf16 && !pooling.average ? Scalar::bf16 : Scalar::fp32;
  char* out = reinterpret_cast<char*>(take<float>(scratch, size));
  float* panel = take<float>(scratch, windows.positions * kPanel);
  float* pooled = take<float>(scratch, windows.pooled * kPanel);
  result.map = {out, 0, 1, stride, scalar};
  if (!pooling.average) result.places = take<Places>(scratch, size / kLanes<float>);
  if (wants_gradient) {
    char* gradient = reinterpret_cast<char*>(take<float>(scratch, size));
    result.gradient = {gradient, 0, 1, stride, Scalar::fp32};
  }
  const Operand rows = only(View{x.address, x.column, x.row, x.scalar});
  for (int64_t c = 0; c < channels; c += kPanel) {
    copy_panels(rows.from(0, c), windows.positions, smaller(kPanel, channels - c), panel);
    if (pooling.average) {
      average(panel, windows, pooled);
    } else {
      Places* places = result.places + c / kLanes<float> * windows.pooled;
      maximum(panel, windows, pooled, places);
    }
    for (int64_t o = 0; o < windows.pooled; ++o) {
      write(out + (o * stride + c) * size_of(scalar), scalar, 1, kPanel, pooled + o * kPanel);
    }
  }
  return result;
}

// Write a panel to a gradient, from channel `c` on.
inline void write_panel(const float* panel, int64_t positions, int64_t channels, const Tensor& out,
                        int64_t c) {
  const auto to = [&](int64_t channel, int64_t position) {
    return out.address + ((c + channel) * out.row + position * out.column) * size_of(out.scalar);
  };
  if (!positions_adjoin(out)) {
    for (int64_t p = 0; p < positions; ++p) {
      write(to(0, p), out.scalar, out.row, channels, panel + p * kPanel);
    }
    return;
  }
  float rows[8][kSpan];
  for (int64_t first = 0; first < positions; first += kSpan) {
    const int64_t span = smaller(kSpan, positions - first);
    for (int64_t k = 0; k < channels; k += 8) {
      const float* from = panel + first * kPanel + k;
      int64_t p = 0;
      for (; p + 8 <= span; p += 8) {
        Eight block[8];
        for (int i = 0; i < 8; ++i) block[i] = load_eight(from + (p + i) * kPanel);
        transpose(block);
        for (int i = 0; i < 8; ++i) store_eight(rows[i] + p, block[i]);
      }
      for (; p < span; ++p) {
        for (int i = 0; i < 8; ++i) rows[i][p] = from[p * kPanel + i];
      }
      for (int64_t i = 0; i < smaller(8, channels - k); ++i) {
        write(to(k + i, first), out.scalar, out.column, span, rows[i]);
      }
    }
  }
}

// Write the gradient of the map from that of the pooled map.
inline void unpool(const Pooled& x, const Tensor& out, int64_t channels, Scratch& scratch) {
  const Windows& windows = x.windows;
  const int64_t stride = x.gradient.column;
  const float* gradient = reinterpret_cast<const float*>(x.gradient.address);
  float* panel = take<float>(scratch, windows.positions * kPanel);
  float* pooled = take<float>(scratch, windows.pooled * kPanel);
  for (int64_t c = 0; c < channels; c += kPanel) {
    memset(panel, 0, windows.positions * kPanel * sizeof(float));
    for (int64_t o = 0; o < windows.pooled; ++o) {
      memcpy(pooled + o * kPanel, gradient + o * stride + c, kPanel * sizeof(float));
    }
    const Places* places = x.places ? x.places + c / kLanes<float> * windows.pooled : nullptr;
    add_unpooled(pooled, windows, places, panel);
    write_panel(panel, windows.positions, smaller(kPanel, channels - c), out, c);
  }
}

}  // namespace fsp::cpu::FSP_VARIANT
