// Adaptive pooling of a map of one sample, and its gradient. Windows, ties and NaN are treated as
// by PyTorch. Vectors of channels are pooled: all of them where they adjoin in memory, else a panel
// of kPanel at a time.
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

// Vectors of channels of all positions. `stride`: from position to position, in elements.
template <class Element>
struct Panel {
  Element* data;
  int64_t stride, vectors;

  Element* at(int64_t position, int64_t vector) const {
    return data + position * stride + vector * kLanes<float>;
  }
};

typedef uint16_t Bf16s __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
static_assert(alignof(Bf16s) == 2);

inline Vector<float> load_wide(const float* from) { return load(from); }
inline Vector<float> load_wide(const uint16_t* from) {  // of bf16
  const Bf16s bits = *reinterpret_cast<const Bf16s*>(from);
  return (Vector<float>)(__builtin_convertvector(bits, Vector<TwoBf16>) << 16);
}

// Averages of a panel, of fp32 or bf16.
template <class Element>
void average(Panel<const Element> panel, const Windows& windows, Panel<float> pooled) {
  for (int64_t o = 0; o < windows.pooled; ++o) {
    const int32_t first = windows.starts[o], end = windows.starts[o + 1];
    for (int64_t v = 0; v < panel.vectors; ++v) {
      Vector<float> total = {};
      for (int32_t e = first; e < end; ++e) total += load_wide(panel.at(windows.members[e], v));
      store(pooled.at(o, v), total / static_cast<float>(end - first));
    }
  }
}

// Maxima of a panel and their places, which lie as the maxima do.
template <class Element>
void maximum(Panel<const Element> panel, const Windows& windows, Panel<float> pooled,
             Places* places) {
  for (int64_t o = 0; o < windows.pooled; ++o) {
    const int32_t first = windows.starts[o], end = windows.starts[o + 1];
    for (int64_t v = 0; v < panel.vectors; ++v) {
      Vector<float> best = load_wide(panel.at(windows.members[first], v));
      Places place = places_of(windows.members[first]);
      for (int32_t e = first + 1; e < end; ++e) {
        const int32_t position = windows.members[e];
        const Vector<float> x = load_wide(panel.at(position, v));
        const Places takes = (x > best) | (x != x);
        best = takes ? x : best;
        place = takes ? places_of(position) : place;
      }
      store(pooled.at(o, v), best);
      places[o * pooled.stride / kLanes<float> + v] = place;
    }
  }
}

// Add the gradient of a pooled panel to that of the panel. Without `places`, of averages.
inline void add_unpooled(Panel<const float> pooled, const Windows& windows, const Places* places,
                         Panel<float> panel) {
  for (int64_t o = 0; o < windows.pooled; ++o) {
    const int32_t first = windows.starts[o], end = windows.starts[o + 1];
    for (int64_t v = 0; v < panel.vectors; ++v) {
      const Vector<float> gradient = load(pooled.at(o, v)), zero = {};
      for (int32_t e = first; e < end; ++e) {
        const int32_t position = windows.members[e];
        float* to = panel.at(position, v);
        if (places) {
          const Places place = places[o * pooled.stride / kLanes<float> + v];
          const Places is_here = place == places_of(position);
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
  float* out = take<float>(scratch, size);
  result.map = {reinterpret_cast<char*>(out), 0, 1, stride, Scalar::fp32};
  if (!pooling.average) result.places = take<Places>(scratch, size / kLanes<float>);
  if (wants_gradient) {
    char* gradient = reinterpret_cast<char*>(take<float>(scratch, size));
    result.gradient = {gradient, 0, 1, stride, Scalar::fp32};
  }
  const View rows{x.address, x.column, x.row, x.scalar};
  const auto pool = [&](auto panel, int64_t c) {
    const Panel<float> pooled{out + c, stride, panel.vectors};
    if (pooling.average) {
      average(panel, windows, pooled);
    } else {
      maximum(panel, windows, pooled, result.places + c / kLanes<float>);
    }
  };
  if (rows.column == 1 && x.scalar != Scalar::fp16 && channels % kLanes<float> == 0) {
    const int64_t vectors = channels / kLanes<float>;
    if (x.scalar == Scalar::fp32) {
      pool(Panel<const float>{rows.at<float>(0, 0), rows.row, vectors}, 0);
    } else {
      pool(Panel<const uint16_t>{rows.at<uint16_t>(0, 0), rows.row, vectors}, 0);
    }
  } else {
    float* panel = take<float>(scratch, windows.positions * kPanel);
    for (int64_t c = 0; c < channels; c += kPanel) {
      const int64_t count = smaller(kPanel, channels - c);
      copy_panels(only(rows.from(0, c)), windows.positions, count, panel);
      pool(Panel<const float>{panel, kPanel, kColumnVectors}, c);
    }
  }
  if (x.scalar == Scalar::bf16 && !pooling.average) {  // maxima of bf16 are bf16
    char* rounded = reinterpret_cast<char*>(take<uint16_t>(scratch, size));
    write(rounded, Scalar::bf16, 1, size, out);
    result.map = {rounded, 0, 1, stride, Scalar::bf16};
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
  const auto add = [&](Panel<float> panel, int64_t c) {
    const float* pooled = reinterpret_cast<const float*>(x.gradient.address) + c;
    const Places* places = x.places ? x.places + c / kLanes<float> : nullptr;
    add_unpooled({pooled, stride, panel.vectors}, windows, places, panel);
  };
  const View rows{out.address, out.column, out.row, out.scalar};
  if (rows.is_fp32_row() && channels % kLanes<float> == 0) {
    const Panel<float> panel{reinterpret_cast<float*>(out.address), out.column,
                             channels / kLanes<float>};
    for (int64_t p = 0; p < windows.positions; ++p) {
      memset(panel.at(p, 0), 0, channels * sizeof(float));
    }
    add(panel, 0);
    return;
  }
  float* panel = take<float>(scratch, windows.positions * kPanel);
  for (int64_t c = 0; c < channels; c += kPanel) {
    memset(panel, 0, windows.positions * kPanel * sizeof(float));
    add({panel, kPanel, kColumnVectors}, c);
    write_panel(panel, windows.positions, smaller(kPanel, channels - c), out, c);
  }
}

}  // namespace fsp::cpu::FSP_VARIANT
