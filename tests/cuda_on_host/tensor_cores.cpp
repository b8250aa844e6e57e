// ldmatrix and mma, by the fragment layouts of the PTX ISA.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>

#include "ptx_on_host.h"
#include "race.h"

namespace fsp {
namespace {

using on_host::kWarpSize;
using on_host::Lanes;

// ---- ldmatrix

struct LoadLane {
  const void* row;
  std::uint32_t* r;
};

// Matrix i has the rows that lanes 8 i to 8 i + 7 point to.
void gather_rows(Lanes<LoadLane> lanes, std::uint16_t (&rows)[kWarpSize][8]) {
  for (int lane = 0; lane < kWarpSize; ++lane) std::memcpy(rows[lane], lanes[lane].row, 16);
}

std::uint32_t pair(std::uint16_t low, std::uint16_t high) {
  return low | static_cast<std::uint32_t>(high) << 16;
}

void load(void* const* arguments) {
  const Lanes<LoadLane> lanes(arguments);
  std::uint16_t rows[kWarpSize][8];
  gather_rows(lanes, rows);
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const int row = lane / 4;
    const int column = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      lanes[lane].r[i] = pair(rows[8 * i + row][column], rows[8 * i + row][column + 1]);
    }
  }
}

void load_transposed(void* const* arguments) {
  const Lanes<LoadLane> lanes(arguments);
  std::uint16_t rows[kWarpSize][8];
  gather_rows(lanes, rows);
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const int row = lane % 4 * 2;
    const int column = lane / 4;
    for (int i = 0; i < 4; ++i) {
      lanes[lane].r[i] = pair(rows[8 * i + row][column], rows[8 * i + row + 1][column]);
    }
  }
}

void ldmatrix(const char* name, on_host::WarpFunction perform, LoadLane lane, Site site,
              const void* code) {
  on_host::check_aligned(name, lane.row, 16, site);
  on_host::check_shared(name, lane.row, 16, site);
  on_host::race::access(lane.row, 16, false, code);
  on_host::wait_for_warp(name, perform, &lane, site);
}

// ---- mma

struct MmaLane {
  float* d;
  const std::uint32_t* a;
  std::uint32_t b[2];
};

struct F16 {
  static constexpr int kPerRegister = 2;
  static double value(std::uint32_t bits, int i) {
    return __half2float(__ushort_as_half(static_cast<std::uint16_t>(bits >> (16 * i))));
  }
};

struct Bf16 {
  static constexpr int kPerRegister = 2;
  static double value(std::uint32_t bits, int i) {
    return __bfloat162float(__ushort_as_bfloat16(static_cast<std::uint16_t>(bits >> (16 * i))));
  }
};

struct Tf32 {
  static constexpr int kPerRegister = 1;
  static double value(std::uint32_t bits, int) { return on_host::bits_as<float>(bits & ~0x1FFFU); }
};

// The finite numbers beyond the largest float that a float's exponent cannot express are infinite.
float toward_zero(double x) {
  float rounded = static_cast<float>(x);
  if (std::fabs(rounded) > std::fabs(x) && std::fabs(x) < 0x1p128) {
    rounded = on_host::bits_as<float>(on_host::bits_as<std::uint32_t>(rounded) - 1);
  }
  return rounded;
}

// d (16 x 8) += a (16 x depth) b (depth x 8). Lane 4 g + t holds, for a register of P elements:
// a: rows g, g + 8, g, g + 8 of registers 0 to 3, from column P t of 0 and 1, P (t + 4) of 2 and 3;
// b: column g, from rows P t and P (t + 4); d: rows g, g, g + 8, g + 8, columns 2 t, 2 t + 1, ...
template <class Element>
class Mma {
 public:
  explicit Mma(void* const* arguments) : lanes_(arguments) {
    for (int lane = 0; lane < kWarpSize; ++lane) gather(lane);
  }

  void multiply() {
    for (int i = 0; i < 16; ++i) {
      Row row = d_[i];
      for (int k = 0; k < kDepth; ++k) row += a_[i][k] * b_[k];
      d_[i] = row;
    }
  }

  void scatter() {
    for (int lane = 0; lane < kWarpSize; ++lane) {
      for (int r = 0; r < 4; ++r) lanes_[lane].d[r] = toward_zero(d_of(lane, r));
    }
  }

 private:
  static constexpr int kPerRegister = Element::kPerRegister;
  static constexpr int kDepth = 8 * kPerRegister;
  using Row = double __attribute__((vector_size(8 * sizeof(double))));

  void gather(int lane) {
    const MmaLane& held = lanes_[lane];
    const int group = lane / 4;
    for (int r = 0; r < 4; ++r) d_of(lane, r) = held.d[r];
    for (int p = 0; p < kPerRegister; ++p) {
      for (int half = 0; half < 2; ++half) {
        const int k = kPerRegister * (lane % 4 + 4 * half) + p;
        a_[group][k] = Element::value(held.a[2 * half], p);
        a_[group + 8][k] = Element::value(held.a[2 * half + 1], p);
        b_[k][group] = Element::value(held.b[half], p);
      }
    }
  }

  auto& d_of(int lane, int r) { return d_[lane / 4 + r / 2 * 8][lane % 4 * 2 + r % 2]; }

  Lanes<MmaLane> lanes_;
  double a_[16][kDepth];
  Row b_[kDepth];
  Row d_[16];
};

template <class Element>
void multiply(void* const* arguments) {
  Mma<Element> mma(arguments);
  mma.multiply();
  mma.scatter();
}

}  // namespace

void ldmatrix_x4(std::uint32_t (&r)[4], const void* row, Site site) {
  ldmatrix("ldmatrix_x4", load, {row, r}, site, __builtin_return_address(0));
}

void ldmatrix_x4_trans(std::uint32_t (&r)[4], const void* row, Site site) {
  ldmatrix("ldmatrix_x4_trans", load_transposed, {row, r}, site, __builtin_return_address(0));
}

void mma_f16(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1,
             Site site) {
  MmaLane lane{d, a, {b0, b1}};
  on_host::wait_for_warp("mma_f16", multiply<F16>, &lane, site);
}

#if FSP_AMPERE

void mma_bf16(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1,
              Site site) {
  MmaLane lane{d, a, {b0, b1}};
  on_host::wait_for_warp("mma_bf16", multiply<Bf16>, &lane, site);
}

void mma_tf32(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1,
              Site site) {
  MmaLane lane{d, a, {b0, b1}};
  on_host::wait_for_warp("mma_tf32", multiply<Tf32>, &lane, site);
}

#endif

}  // namespace fsp
