// Feature maps: read a tile into shared memory and pool it, and write its gradient.
//
// A map is read by its strides. What is contiguous in memory, positions or channels, is contiguous
// in a tile, so reading and writing never transpose; products take tiles of both kinds. If a map is
// pooled, each position of a tile stands for a window. The pooled map is not stored anywhere else:
// the maximum is found again when its gradient is written. If a map has a mask, positions that do
// not count are read like the others, and set to zero in the tile.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "ptx.cuh"
#include "types.h"

namespace fsp {

// --- numbers -------------------------------------------------------------------------------------

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ float narrow<float>(float x) { return x; }
template <>
__device__ __forceinline__ __half narrow<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

__device__ __forceinline__ float read(const void* data, Scalar scalar, int64_t offset) {
  switch (scalar) {
    case Scalar::fp16: return widen(static_cast<const __half*>(data)[offset]);
    case Scalar::bf16: return widen(static_cast<const __nv_bfloat16*>(data)[offset]);
    default: return static_cast<const float*>(data)[offset];
  }
}

__device__ __forceinline__ void write(void* data, Scalar scalar, int64_t offset, float x) {
  switch (scalar) {
    case Scalar::fp16: static_cast<__half*>(data)[offset] = narrow<__half>(x); break;
    case Scalar::bf16: static_cast<__nv_bfloat16*>(data)[offset] = narrow<__nv_bfloat16>(x); break;
    default: static_cast<float*>(data)[offset] = x;
  }
}

// --- tiles in shared memory ----------------------------------------------------------------------

// A tile (CHANNELS, POSITIONS) of T with 16 bytes of padding after each line. So eight lines start
// in different banks, and each line starts at a multiple of 16 bytes.
template <class T, int CHANNELS, int POSITIONS>
struct Tile {
  static constexpr int channels = CHANNELS, positions = POSITIONS;
  static constexpr int padding = 16 / sizeof(T);
  static constexpr int channel_line = CHANNELS + padding;    // if channels are neighbours
  static constexpr int position_line = POSITIONS + padding;  // if positions are neighbours
  static constexpr int either[] = {CHANNELS * position_line, POSITIONS * channel_line};
  static constexpr int size = either[0] > either[1] ? either[0] : either[1];
  static constexpr int bytes = size * sizeof(T);

  static __device__ __forceinline__ int channel_stride(bool channels_inner) {
    return channels_inner ? 1 : position_line;
  }
  static __device__ __forceinline__ int position_stride(bool channels_inner) {
    return channels_inner ? channel_line : 1;
  }
};

// --- places in a map -----------------------------------------------------------------------------

// Offset within a channel of the first element of a position's window.
__device__ __forceinline__ int64_t position_offset(const Map& map, int position) {
  if (map.flat) return position * map.width;
  const int line = position / map.columns;
  return (position % map.columns) * (map.width * map.window[2]) +
         (line % map.rows) * (map.height * map.window[1]) +
         (line / map.rows) * (map.depth * map.window[0]);
}

// Call visit(offset, number) for each element of the window whose first element is at `offset`.
template <class Visit>
__device__ __forceinline__ void for_window(const Map& map, int64_t offset, Visit visit) {
  int number = 0;
#pragma unroll 1
  for (int d = map.window[0]; d > 0; --d) {
#pragma unroll 1
    for (int h = map.window[1]; h > 0; --h) {
#pragma unroll 1
      for (int w = map.window[2]; w > 0; --w) {
        visit(offset, number++);
        offset += map.width;
      }
      offset += map.height - map.window[2] * map.width;
    }
    offset += map.depth - map.window[1] * map.height;
  }
}

__device__ __forceinline__ float window_share(const Map& map) {
  return 1.0f / (map.window[0] * map.window[1] * map.window[2]);
}

struct Maximum {
  float value;
  int number;  // of the element within its window
};

// As in PyTorch: the first of equal maxima, the last NaN.
__device__ __forceinline__ Maximum window_maximum(const Map& map, int64_t first) {
  Maximum best{-INFINITY, 0};
  for_window(map, first, [&](int64_t offset, int number) {
    const float value = read(map.data, map.scalar, offset);
    if (value > best.value || value != value) best = {value, number};
  });
  return best;
}

__device__ __forceinline__ float window_average(const Map& map, int64_t first) {
  float total = 0;
  for_window(map, first, [&](int64_t offset, int) {
    total += read(map.data, map.scalar, offset);
  });
  return total * window_share(map);
}

// Not inlined, like write_window below: most maps are not pooled, and registers are scarce.
inline __device__ __noinline__ float pooled(const Map& map, int64_t first) {
  return map.pool == Pool::max ? window_maximum(map, first).value : window_average(map, first);
}

// Call visit(channel, position) for each element of a tile. Neighbouring threads get elements that
// are neighbours in memory.
template <int CHANNELS, int POSITIONS, class Visit>
__device__ __forceinline__ void for_elements(bool channels_inner, Visit visit) {
  const int i = threadIdx.x;
  int c = channels_inner ? i % CHANNELS : i / POSITIONS;
  int k = channels_inner ? i / CHANNELS : i % POSITIONS;
  const int c_step = channels_inner ? 0 : THREADS / POSITIONS;
  const int k_step = channels_inner ? THREADS / CHANNELS : 0;
#pragma unroll 1
  for (int e = 0; e < CHANNELS * POSITIONS / THREADS; ++e) {
    visit(c, k);
    c += c_step;
    k += k_step;
  }
}

// Call store(channel, position, read(channel, position)) for each element of a tile. A thread reads
// all elements of a batch before it stores any, so that many loads run at the same time.
template <int CHANNELS, int POSITIONS, int BATCH, class Read, class Store>
__device__ __forceinline__ void for_batches(bool channels_inner, Read read, Store store) {
  constexpr int all = CHANNELS * POSITIONS / THREADS, batch = all < BATCH ? all : BATCH;
  static_assert(all % batch == 0);
  const int i = threadIdx.x;
  int c = channels_inner ? i % CHANNELS : i / POSITIONS;
  int k = channels_inner ? i / CHANNELS : i % POSITIONS;
  const int c_step = channels_inner ? 0 : THREADS / POSITIONS;
  const int k_step = channels_inner ? THREADS / CHANNELS : 0;
#pragma unroll 1
  for (int first = 0; first < all; first += batch) {
    decltype(read(c, k)) values[batch];
#pragma unroll
    for (int e = 0; e < batch; ++e) values[e] = read(c + e * c_step, k + e * k_step);
#pragma unroll
    for (int e = 0; e < batch; ++e) store(c + e * c_step, k + e * k_step, values[e]);
    c += batch * c_step;
    k += batch * k_step;
  }
}

// --- reading -------------------------------------------------------------------------------------

// Neighbours that are read at once.
template <class T, int COUNT>
struct alignas(COUNT * sizeof(T)) Unit {
  T x[COUNT];
};

// Copy to shared memory. In pipeline.cuh the whole block waits for the copies.
template <int BYTES, class T>
__device__ __forceinline__ void copy(T* shared, const T* global, int elements) {
#if FSP_AMPERE
  cp_async<BYTES>(shared, global, elements * sizeof(T));
#else
  constexpr int whole = BYTES / sizeof(T);
  if (elements == whole) {
    using Whole = Unit<T, whole>;
    *reinterpret_cast<Whole*>(shared) = *reinterpret_cast<const Whole*>(global);
  } else {
    for (int i = 0; i < whole; ++i) shared[i] = i < elements ? global[i] : narrow<T>(0.0f);
  }
#endif
}

// Copy `lines` lines of `size` elements, in units of BYTES; zeros beyond.
template <int BYTES, int LINES, int INNER, class T>
__device__ __forceinline__ void load_units(T* tile, int stride, const T* global, int64_t step,
                                           int lines, int size) {
  constexpr int unit = BYTES / sizeof(T), units = INNER / unit;
  const int inner = threadIdx.x % units * unit, left = size - inner;
  const int inside = left < 0 ? 0 : left < unit ? left : unit;
#pragma unroll 1  // nobody waits for a copy, and registers are scarce
  for (int line = threadIdx.x / units; line < LINES; line += THREADS / units) {
    const int elements = line < lines ? inside : 0;
    // Without elements nothing is read, but the address must be valid.
    const T* source = elements ? global + line * step + inner : global;
    copy<BYTES>(tile + line * stride + inner, source, elements);
  }
}

// The same, in the largest units that the map allows.
template <int LINES, int INNER, class T>
__device__ __forceinline__ void load_lines(T* tile, int stride, const Map& map, int64_t start,
                                           int64_t step, int lines, int size) {
  const T* global = static_cast<const T*>(map.data) + start;
  if (map.unit == 16) {
    load_units<16, LINES, INNER>(tile, stride, global, step, lines, size);
  } else if (map.unit == 8) {
    load_units<8, LINES, INNER>(tile, stride, global, step, lines, size);
  } else {
    load_units<4, LINES, INNER>(tile, stride, global, step, lines, size);
  }
}

// Read halves and store them as fp32, four at a time. A thread reads all of a batch before it
// stores any.
template <int LINES, int INNER, class Widen>
__device__ __forceinline__ void load_widened(float* tile, int stride, const uint16_t* global,
                                             int64_t step, int lines, int size, Widen widened) {
  constexpr int units = INNER / 4, all = LINES * units / THREADS, batch = all < 4 ? all : 4;
  static_assert(all % batch == 0);
  const int inner = threadIdx.x % units * 4, left = size - inner;
  const auto line_of = [](int i) {
    return static_cast<int>(threadIdx.x / units) + i * (THREADS / units);
  };
  const auto read = [&](int line) {
    const uint16_t* source = global + line * step + inner;
    if (line >= lines || left <= 0) return make_uint2(0, 0);
    if (left >= 4) return *reinterpret_cast<const uint2*>(source);
    const uint32_t x = source[0], y = left > 1 ? source[1] : 0, z = left > 2 ? source[2] : 0;
    return make_uint2(x | y << 16, z);
  };
#pragma unroll 1
  for (int first = 0; first < all; first += batch) {
    uint2 values[batch];
#pragma unroll
    for (int i = 0; i < batch; ++i) values[i] = read(line_of(first + i));
#pragma unroll
    for (int i = 0; i < batch; ++i) {
      const uint2 x = values[i];
      *reinterpret_cast<float4*>(tile + line_of(first + i) * stride + inner) =
          make_float4(widened(x.x), widened(x.x >> 16), widened(x.y), widened(x.y >> 16));
    }
  }
}

// Load a tile (CHANNELS, POSITIONS) from `channel` and `position` on; zeros beyond the map's end.
template <class Shape, class T>
__device__ void load_tile(T* tile, const Map& map, int sample, int channel, int position,
                          int channels, int positions) {
  constexpr int C = Shape::channels, K = Shape::positions;
  const int64_t start = sample * map.sample + channel * map.channel;
  channels -= channel;
  positions -= position;
  const bool widens = sizeof(T) == 4 && map.scalar != Scalar::fp32;
  if (map.unit >= 4 && !widens) {
    const int64_t first = start + position * map.width;
    if (map.channels_inner) {
      load_lines<K, C>(tile, Shape::channel_line, map, first, map.width, positions, channels);
    } else {
      load_lines<C, K>(tile, Shape::position_line, map, first, map.channel, channels, positions);
    }
    return;
  }
  const int line = Shape::channel_stride(map.channels_inner);
  const int step = Shape::position_stride(map.channels_inner);
  const auto inside = [&](int c, int k) { return c < channels && k < positions; };
  const auto offset = [&](int c, int k) {
    return start + c * map.channel + position_offset(map, position + k);
  };
  if (map.pool != Pool::none) {
    for_elements<C, K>(map.channels_inner, [&](int c, int k) {
      tile[c * line + k * step] = narrow<T>(inside(c, k) ? pooled(map, offset(c, k)) : 0.0f);
    });
    return;
  }
  const auto load = [&](const auto* data, auto widened) {
    for_batches<C, K, 8>(
        map.channels_inner,
        [&](int c, int k) {
          return inside(c, k) ? data[offset(c, k)] : std::remove_reference_t<decltype(*data)>{};
        },
        [&](int c, int k, auto x) { tile[c * line + k * step] = widened(x); });
  };
  if constexpr (sizeof(T) == 2) {
    load(static_cast<const T*>(map.data), [](T x) { return x; });
  } else if (widens) {
    const uint16_t* data = static_cast<const uint16_t*>(map.data);
    const auto widened = [fp16 = map.scalar == Scalar::fp16](uint16_t bits) {
      return fp16 ? widen(__ushort_as_half(bits)) : widen(__ushort_as_bfloat16(bits));
    };
    const uint16_t* first = data + start + position * map.width;
    if (map.unit < 8) {
      load(data, widened);
    } else if (map.channels_inner) {
      load_widened<K, C>(tile, Shape::channel_line, first, map.width, positions, channels, widened);
    } else {
      load_widened<C, K>(tile, Shape::position_line, first, map.channel, channels, positions,
                         widened);
    }
  } else {
    const T* data = static_cast<const T*>(map.data);
#if FSP_AMPERE
    for_elements<C, K>(map.channels_inner, [&](int c, int k) {
      const bool copied = inside(c, k);
      const T* from = copied ? data + offset(c, k) : data;
      cp_async<4>(tile + c * line + k * step, from, copied ? 4 : 0);
    });
#else
    load(data, [](T x) { return x; });
#endif
  }
}

// --- subtracting ---------------------------------------------------------------------------------

// The operand of one instruction that subtracts.
template <class T>
struct Packed {
  using Type = T;
};
template <>
struct Packed<__half> {
  using Type = __half2;
};
template <>
struct Packed<__nv_bfloat16> {
  using Type = __nv_bfloat162;
};

__device__ __forceinline__ float minus(float x, float y) { return x - y; }
__device__ __forceinline__ __half2 minus(__half2 x, __half2 y) { return __hsub2(x, y); }
__device__ __forceinline__ __nv_bfloat162 minus(__nv_bfloat162 x, __nv_bfloat162 y) {
  return __hsub2(x, y);
}

template <int LINES, int INNER, class T>
__device__ __forceinline__ void subtract_lines(T* to, const T* x, const T* y, int stride) {
  constexpr int unit = 16 / sizeof(T), units = INNER / unit;
  using Pack = typename Packed<T>::Type;
  using Whole = Unit<Pack, 16 / sizeof(Pack)>;
#pragma unroll 2
  for (int e = threadIdx.x; e < LINES * units; e += THREADS) {
    const int i = e / units * stride + e % units * unit;
    const Whole left = *reinterpret_cast<const Whole*>(x + i);
    const Whole right = *reinterpret_cast<const Whole*>(y + i);
    Whole difference;
#pragma unroll
    for (int j = 0; j < 16 / sizeof(Pack); ++j) difference.x[j] = minus(left.x[j], right.x[j]);
    *reinterpret_cast<Whole*>(to + i) = difference;
  }
}

// x - y of two tiles, written over one of them and rounded once. The caller must synchronise the
// block before the result is read.
template <class Shape, class T>
__device__ __forceinline__ void subtract(T* to, const T* x, const T* y, const Map& of_x,
                                         const Map& of_y) {
  constexpr int C = Shape::channels, K = Shape::positions;
  if (of_x.channels_inner != of_y.channels_inner) {
    const auto place = [](const Map& map, int c, int k) {
      return c * Shape::channel_stride(map.channels_inner) +
             k * Shape::position_stride(map.channels_inner);
    };
    const Map& of_result = to == x ? of_x : of_y;
    for_elements<C, K>(of_result.channels_inner, [&](int c, int k) {
      const float difference = widen(x[place(of_x, c, k)]) - widen(y[place(of_y, c, k)]);
      to[place(of_result, c, k)] = narrow<T>(difference);
    });
  } else if (of_x.channels_inner) {
    subtract_lines<K, C>(to, x, y, Shape::channel_line);
  } else {
    subtract_lines<C, K>(to, x, y, Shape::position_line);
  }
}

// --- masks ---------------------------------------------------------------------------------------

// What a network's sum over the positions of a sample is divided by: how many of them count.
__device__ __forceinline__ float divisor(const Pair& pair, int network, int sample) {
  const float* counts = pair.masks[network].counts;
  return counts == nullptr ? static_cast<float>(pair.positions[network]) : counts[sample];
}

// The ratio of a product in a sample.
__device__ __forceinline__ float ratio_of(const Product& product, int sample) {
  float ratio = product.ratio;
  if (product.multiplier != nullptr) ratio *= product.multiplier[sample];
  if (product.divisor != nullptr) ratio /= product.divisor[sample];
  return ratio;
}

// Set the positions of a tile to zero where the mask (B, positions) is zero, from `position` on.
// They may hold NaN, and NaN times zero is NaN. The caller must synchronise the block before and
// after.
template <class Shape, class T>
__device__ __forceinline__ void hide(T* tile, bool channels_inner, const uint8_t* mask, int sample,
                                     int position, int positions) {
  constexpr int C = Shape::channels, K = Shape::positions;
  static_assert(THREADS % K == 0);
  const int k = threadIdx.x % K;
  if (position + k >= positions) return;
  if (mask[static_cast<int64_t>(sample) * positions + position + k] != 0) return;
  tile += k * Shape::position_stride(channels_inner);
  const int line = Shape::channel_stride(channels_inner);
#pragma unroll 1
  for (int c = threadIdx.x / K; c < C; c += THREADS / K) tile[c * line] = narrow<T>(0.0f);
}

// --- writing -------------------------------------------------------------------------------------

// Two elements as bf16; the first is in the lower half.
__device__ __forceinline__ uint32_t bf16_pair(float x, float y) {
  return __bfloat16_as_ushort(narrow<__nv_bfloat16>(x)) |
         static_cast<uint32_t>(__bfloat16_as_ushort(narrow<__nv_bfloat16>(y))) << 16;
}

// Write four neighbours, of which the first `size` exist.
__device__ __forceinline__ void write_4(const Map& map, int64_t offset, float4 x, int size) {
  if (size < 4) {
    write(map.data, map.scalar, offset, x.x);
    if (size > 1) write(map.data, map.scalar, offset + 1, x.y);
    if (size > 2) write(map.data, map.scalar, offset + 2, x.z);
  } else if (map.scalar == Scalar::fp32) {
    *reinterpret_cast<float4*>(static_cast<float*>(map.data) + offset) = x;
  } else {  // bf16, since gradients of fp16 are held in fp32
    *reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(map.data) + offset) =
        make_uint2(bf16_pair(x.x, x.y), bf16_pair(x.z, x.w));
  }
}

// Write the gradient of one pooled element to its window.
inline __device__ __noinline__ void write_window(const Map& gradient, const Map& own, int64_t to,
                                                 int64_t from, float value) {
  if (own.pool == Pool::avg) {
    const float share = value * window_share(own);
    for_window(gradient, to, [&](int64_t offset, int) {
      write(gradient.data, gradient.scalar, offset, share);
    });
  } else {
    const int chosen = window_maximum(own, from).number;
    for_window(gradient, to, [&](int64_t offset, int number) {
      write(gradient.data, gradient.scalar, offset, number == chosen ? value : 0.0f);
    });
  }
}

// Write `tile`, (CHANNELS, POSITIONS) of fp32 in lines of positions, as the gradient of `own`. With
// a mask (B, positions) the gradient is zero where the mask is.
//
// Windows do not overlap, so each element is written once.
template <int CHANNELS, int POSITIONS>
__device__ void write_gradient(float* tile, const Map& gradient, const Map& own,
                               const uint8_t* mask, int sample, int channel, int position,
                               int channels, int positions) {
  using Shape = Tile<float, CHANNELS, POSITIONS>;
  constexpr int line = Shape::position_line;
  if (mask != nullptr) {
    hide<Shape>(tile, false, mask, sample, position, positions);
    __syncthreads();  // the zeros are there
  }
  const int64_t to = sample * gradient.sample + channel * gradient.channel;
  channels -= channel;
  positions -= position;
  if (gradient.unit >= (gradient.scalar == Scalar::fp32 ? 16 : 8)) {  // four elements
    const bool inner = gradient.channels_inner;
    const int step = inner ? line : 1;
    const auto four = [&](int c, int k, int left) {
      const float* x = tile + c * line + k;
      write_4(gradient, to + c * gradient.channel + (position + k) * gradient.width,
              make_float4(x[0], x[step], x[2 * step], x[3 * step]), left);
    };
    if (inner) {
      for_elements<CHANNELS / 4, POSITIONS>(true, [&](int c, int k) {
        if (4 * c < channels && k < positions) four(4 * c, k, channels - 4 * c);
      });
    } else {
      for_elements<CHANNELS, POSITIONS / 4>(false, [&](int c, int k) {
        if (c < channels && 4 * k < positions) four(c, 4 * k, positions - 4 * k);
      });
    }
    return;
  }
  const int64_t from = sample * own.sample + channel * own.channel;
  for_elements<CHANNELS, POSITIONS>(gradient.channels_inner, [&](int c, int k) {
    if (c >= channels || k >= positions) return;
    const float value = tile[c * line + k];
    const int64_t offset = to + c * gradient.channel + position_offset(gradient, position + k);
    if (own.pool == Pool::none) {
      write(gradient.data, gradient.scalar, offset, value);
    } else {
      const int64_t read_at = from + c * own.channel + position_offset(own, position + k);
      write_window(gradient, own, offset, read_at, value);
    }
  });
}

}  // namespace fsp
