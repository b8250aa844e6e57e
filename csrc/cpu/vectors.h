// Vectors of the instruction set that a file is compiled for, and the dtypes of maps.
//
// No header of the C++ library is included where code is compiled for one instruction set: the
// linker might keep that set's copy of an inline function for all of them.
#pragma once

#ifdef __F16C__
#include <immintrin.h>
#endif
#include <string.h>

#include "types.h"

namespace fsp::cpu::FSP_VARIANT {

constexpr int kVectorBytes = FSP_VECTOR_BYTES;
// A tile of a product is held in registers: so many rows, and columns of so many vectors.
constexpr int kRows = kVectorBytes == 64 ? 12 : kVectorBytes == 32 ? 6 : 4;
constexpr int kColumnVectors = 2;

// Two elements of bf16 that are next to each other along the sum of a product. A processor with
// products of bf16 multiplies such twos, and adds both products.
struct TwoBf16 {
  uint16_t elements[2];
};

// Clang heeds `aligned` in a typedef, not in `using`.
template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float Type __attribute__((vector_size(kVectorBytes)));
  typedef float Unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
};
template <>
struct VectorOf<double> {
  typedef double Type __attribute__((vector_size(kVectorBytes)));
  typedef double Unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
};
template <>
struct VectorOf<TwoBf16> {
  typedef uint32_t Type __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t Unaligned __attribute__((vector_size(kVectorBytes), aligned(2), may_alias));
};
template <class T>
using Vector = typename VectorOf<T>::Type;

// What is multiplied as T: what its products are summed in, what elements are read as before they
// are copied as T, and the elements of a map in one T.
template <class T>
struct Multiplied {
  using Sum = T;
  using Source = float;
  static constexpr int elements = 1;
};
template <>
struct Multiplied<TwoBf16> {
  using Sum = float;
  using Source = TwoBf16;
  static constexpr int elements = 2;
};
template <class T>
using Sum = typename Multiplied<T>::Sum;
template <class T>
using Source = typename Multiplied<T>::Source;
template <class T>
constexpr int kElements = Multiplied<T>::elements;

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));
// Columns of a tile, and of a panel of the right operand.
template <class T>
constexpr int kColumns = kColumnVectors * kLanes<T>;

template <class T>
inline Vector<T> load(const T* from) {
  static_assert(alignof(typename VectorOf<T>::Unaligned) == alignof(T));
  return *reinterpret_cast<const typename VectorOf<T>::Unaligned*>(from);
}
template <class T>
inline void store(T* to, Vector<T> x) {
  *reinterpret_cast<typename VectorOf<T>::Unaligned*>(to) = x;
}

inline Vector<float> multiply_add(float x, Vector<float> y, Vector<float> sum) {
  return sum + x * y;
}
inline Vector<double> multiply_add(double x, Vector<double> y, Vector<double> sum) {
  return sum + x * y;
}
#ifdef __AVX512BF16__
inline Vector<float> multiply_add(TwoBf16 x, Vector<TwoBf16> y, Vector<float> sum) {
  int32_t both;
  memcpy(&both, &x, sizeof both);
  return (Vector<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(both),
                                         (__m512bh)y);
}
#endif

template <class T>
inline T total_of(Vector<T> x) {
  T total = 0;
  for (int i = 0; i < kLanes<T>; ++i) total += x[i];
  return total;
}

constexpr int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }
constexpr int64_t larger(int64_t x, int64_t y) { return x < y ? y : x; }
constexpr int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }
constexpr int64_t round_up(int64_t x, int64_t to) { return ceil_div(x, to) * to; }

constexpr int size_of(Scalar scalar) { return scalar == Scalar::fp32 ? 4 : 2; }

inline float widened(uint16_t bits, Scalar scalar) {
  if (scalar == Scalar::bf16) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float x;
    memcpy(&x, &wide, sizeof x);
    return x;
  }
#ifdef __F16C__
  return _cvtsh_ss(bits);
#else
  _Float16 x;
  memcpy(&x, &bits, sizeof x);
  return static_cast<float>(x);
#endif
}

// Round to nearest, ties to even. NaN stays NaN.
inline uint16_t rounded_to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const uint32_t up = bits + 0x7fff + (bits >> 16 & 1);
  return static_cast<uint16_t>((x == x ? up : bits | 0x400000) >> 16);
}

// Read `count` elements that lie `stride` elements apart, as fp32. Returns `buffer`, or the
// elements themselves if they can be read in place.
inline const float* read(const char* from, Scalar scalar, int64_t stride, int64_t count,
                         float* buffer) {
  if (scalar == Scalar::fp32) {
    const float* x = reinterpret_cast<const float*>(from);
    if (stride == 1) return x;
    for (int64_t i = 0; i < count; ++i) buffer[i] = x[i * stride];
    return buffer;
  }
  const uint16_t* x = reinterpret_cast<const uint16_t*>(from);
  int64_t i = 0;
  if (stride == 1) {
#ifdef __F16C__
    if (scalar == Scalar::fp16) {
      for (; i + 8 <= count; i += 8) {
        const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i));
        _mm256_storeu_ps(buffer + i, _mm256_cvtph_ps(half));
      }
    }
#endif
    if (scalar == Scalar::bf16) {
      for (; i < count; ++i) buffer[i] = widened(x[i], Scalar::bf16);  // in vectors
    }
  }
  for (; i < count; ++i) buffer[i] = widened(x[i * stride], scalar);
  return buffer;
}

// Write fp32 numbers to `count` elements of a gradient, fp32 or bf16, that lie `stride` apart.
inline void write(char* to, Scalar scalar, int64_t stride, int64_t count, const float* x) {
  if (scalar == Scalar::fp32) {
    float* out = reinterpret_cast<float*>(to);
    if (stride == 1) {
      memcpy(out, x, count * sizeof(float));
    } else {
      for (int64_t i = 0; i < count; ++i) out[i * stride] = x[i];
    }
    return;
  }
  uint16_t* out = reinterpret_cast<uint16_t*>(to);
  int64_t i = 0;
#ifdef __AVX512BF16__
  for (; stride == 1 && i + 16 <= count; i += 16) {
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x + i));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), rounded);
  }
#endif
  for (; i < count; ++i) out[i * stride] = rounded_to_bf16(x[i]);
}

// --- transposition of 8 x 8 blocks ---------------------------------------------------------------

typedef float Eight __attribute__((vector_size(32)));
typedef float UnalignedEight __attribute__((vector_size(32), aligned(2), may_alias));
typedef int EightIndices __attribute__((vector_size(32)));
static_assert(alignof(UnalignedEight) == 2);

template <class T>
Eight load_eight(const T* from) {
  static_assert(sizeof(T) == sizeof(float));
  return *reinterpret_cast<const UnalignedEight*>(from);
}
template <class T>
void store_eight(T* to, Eight x) {
  *reinterpret_cast<UnalignedEight*>(to) = x;
}

// GCC and Clang name the shuffle of two vectors differently.
#ifdef __clang__
#define FSP_SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define FSP_SHUFFLE(x, y, ...) __builtin_shuffle(x, y, EightIndices{__VA_ARGS__})
#endif

inline void transpose(Eight (&x)[8]) {
  Eight pairs[8], fours[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = FSP_SHUFFLE(x[i], x[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    pairs[i + 1] = FSP_SHUFFLE(x[i], x[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const Eight left = pairs[i + j], right = pairs[i + j + 2];
      fours[i + 2 * j] = FSP_SHUFFLE(left, right, 0, 1, 8, 9, 4, 5, 12, 13);
      fours[i + 2 * j + 1] = FSP_SHUFFLE(left, right, 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
  for (int i = 0; i < 4; ++i) {
    x[i] = FSP_SHUFFLE(fours[i], fours[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    x[i + 4] = FSP_SHUFFLE(fours[i], fours[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

}  // namespace fsp::cpu::FSP_VARIANT
