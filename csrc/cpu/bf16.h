// Operands as twos of bf16, for processors that multiply bf16. Sums and differences of maps are
// rounded to bf16. A difference of two elements is exact if they differ by less than a factor of
// two, so the residual stays accurate near convergence.
#pragma once

#ifdef __AVX512BF16__

#include "operand.h"

namespace fsp::cpu::FSP_VARIANT {

constexpr int kBf16Lanes = 16;

inline __mmask16 mask_of(int64_t count) {
  return count < kBf16Lanes ? static_cast<__mmask16>((1u << count) - 1) : 0xffff;
}

inline __m512i bits_of(const uint16_t* x, __mmask16 mask) {
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x));
}

inline __m512 combined(__m512i x, __m512i y, float sign) {
  const __m512 other = (__m512)_mm512_slli_epi32(y, 16);
  return (__m512)_mm512_slli_epi32(x, 16) + sign * other;
}

// `count` elements of a row from column `j` on, in place if they adjoin.
inline const uint16_t* bf16_row(const View& x, int64_t i, int64_t j, int64_t count,
                                uint16_t* buffer) {
  const uint16_t* row = x.at<uint16_t>(i, j);
  if (x.column == 1) return row;
  for (int64_t k = 0; k < count; ++k) buffer[k] = row[k * x.column];
  return buffer;
}

// `count` elements of a row; the last two is filled with a zero if they are odd.
inline const TwoBf16* read_twos_along(const Operand& x, int64_t i, int64_t j, int64_t count,
                                      TwoBf16* buffer) {
  if (x.sign == 0 && x.view.column == 1 && count % 2 == 0) {
    return reinterpret_cast<const TwoBf16*>(x.view.at<uint16_t>(i, j));
  }
  uint16_t copies[2][2 * kSpan];
  const uint16_t* row = bf16_row(x.view, i, j, count, copies[0]);
  uint16_t* to = reinterpret_cast<uint16_t*>(buffer);
  if (x.sign == 0) {
    memcpy(to, row, count * sizeof(uint16_t));
  } else {
    const uint16_t* other = bf16_row(x.other, i, j, count, copies[1]);
    for (int64_t k = 0; k < count; k += kBf16Lanes) {
      const __mmask16 mask = mask_of(count - k);
      const __m512 sum = combined(bits_of(row + k, mask), bits_of(other + k, mask), x.sign);
      _mm256_mask_storeu_epi16(to + k, mask, (__m256i)_mm512_cvtneps_pbh(sum));
    }
  }
  if (count % 2) to[count] = 0;
  return buffer;
}

// `both`: else the second row is missing, and zeros stand for it.
inline void interleave(const uint16_t* first, const uint16_t* second, bool both, int64_t count,
                       TwoBf16* to) {
  for (int64_t k = 0; k < count; k += kBf16Lanes) {
    const __mmask16 mask = mask_of(count - k);
    const __m512i upper = _mm512_slli_epi32(bits_of(second + k, both ? mask : 0), 16);
    _mm512_mask_storeu_epi32(to + k, mask, _mm512_or_si512(bits_of(first + k, mask), upper));
  }
}

// `count` elements of rows `i` and `i + 1`, element by element; zeros for a row that is missing.
__attribute__((noinline)) inline const TwoBf16* read_any_twos_across(const Operand& x, int64_t i,
                                                                     int64_t j, int64_t count,
                                                                     bool both, TwoBf16* buffer) {
  static const uint16_t kInterleaved[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                            21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                            11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  uint16_t copies[4][kSpan];
  const uint16_t* rows[2] = {};
  const uint16_t* others[2] = {};
  for (int r = 0; r <= both; ++r) {
    rows[r] = bf16_row(x.view, i + r, j, count, copies[r]);
    if (x.sign != 0) others[r] = bf16_row(x.other, i + r, j, count, copies[2 + r]);
  }
  if (x.sign == 0) {
    interleave(rows[0], rows[1], both, count, buffer);
    return buffer;
  }
  const __m512i order = _mm512_loadu_si512(kInterleaved);
  for (int64_t k = 0; k < count; k += kBf16Lanes) {
    const __mmask16 mask = mask_of(count - k), second = both ? mask : 0;
    const __m512 upper =
        combined(bits_of(rows[1] + k, second), bits_of(others[1] + k, second), x.sign);
    const __m512 lower = combined(bits_of(rows[0] + k, mask), bits_of(others[0] + k, mask), x.sign);
    const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(upper, lower);
    _mm512_mask_storeu_epi32(buffer + k, mask, _mm512_permutexvar_epi16(order, rounded));
  }
  return buffer;
}

inline const TwoBf16* read_twos_across(const Operand& x, int64_t i, int64_t j, int64_t count,
                                       bool both, TwoBf16* buffer) {
  if (!both || x.sign != 0 || x.view.column != 1) {
    return read_any_twos_across(x, i, j, count, both, buffer);
  }
  const uint16_t* row = x.view.at<uint16_t>(i, j);
  interleave(row, row + x.view.row, true, count, buffer);
  return buffer;
}

template <>
struct Lines<TwoBf16> {
  Operand x;
  bool across;
  int64_t length;

  const TwoBf16* read(int64_t i, int64_t j, int64_t count, TwoBf16* buffer) const {
    if (across) return read_twos_across(x, 2 * i, j, count, 2 * i + 1 < length, buffer);
    return read_twos_along(x, i, 2 * j, smaller(2 * count, length - 2 * j), buffer);
  }
  void prefetch(int64_t i, int64_t j, int64_t count) const {
    if (across) {
      FSP_VARIANT::prefetch(x, 2 * i, j, count);
      FSP_VARIANT::prefetch(x, 2 * i + 1, j, count);
    } else {
      FSP_VARIANT::prefetch(x, i, 2 * j, 2 * count);
    }
  }
};

inline void convert(const TwoBf16* from, TwoBf16* to, int64_t count) {
  if (from != to) memcpy(to, from, count * sizeof(TwoBf16));
}

}  // namespace fsp::cpu::FSP_VARIANT

#endif  // __AVX512BF16__
