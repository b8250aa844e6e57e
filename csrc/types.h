// The parameters of kernels: plain structs that bindings.cpp fills and kernels read from constant
// memory. Strides are in elements. They have 64 bits, so that products with them have, too.
#pragma once

#include <cstdint>

namespace fsp {

constexpr int THREADS = 256;  // of every block
constexpr int WARPS = THREADS / 32;

enum class Scalar : uint8_t { fp32, fp16, bf16 };
enum class Pool : uint8_t { none, max, avg };
enum class Norm : uint8_t { squares, column };
// How D / K = G^S - G^T is computed:
//   difference: from p = a - c and q = b - d;
//   apart: from both networks' products, one after the other, since their positions differ;
//   ready: from the student's product and a ready matrix;
//   plain: a product without a teacher, instead of a residual.
enum class Residual : uint8_t { difference, apart, ready, plain };

// A feature map (B, C, *spatial) or its gradient. There are always three spatial axes; if the map
// has fewer, the leading ones have size 1. A matrix is a map with the strides `channel` and
// `width`.
struct Map {
  void* data;  // null if there is no map
  int64_t sample, channel, depth, height, width;
  int32_t rows, columns;  // sizes, after pooling, of the last two axes
  uint8_t window[3];      // elements pooled along each axis
  Pool pool;
  Scalar scalar;
  bool flat;            // the stride `width` leads from each position to the next across all axes
  bool channels_inner;  // channels, not positions, are neighbours in memory
  // Bytes of neighbours that can be read at once, at most 16: every line begins at a multiple of so
  // many bytes. Below 4, elements are read one by one.
  uint8_t unit;
};

// Which positions of a network's maps count, in each sample of a batch.
struct Mask {
  const uint8_t* data;  // (B, K), contiguous; null if all positions count
  const float* counts;  // (B,): how many positions count, at least 1; null if all do
};

// One pair of layers of both networks: maps a, b, c, d. A ready matrix takes the place of c.
struct Pair {
  Map maps[4];
  Map gradients[4];
  Mask masks[2];  // of student and teacher
  // A matrix for each sample. In tiles.cuh: slopes, or D / K if another launch adds its parts. In
  // combine.cuh: slopes; the parts to add are maps[0].
  Map out;
  int64_t out_part;  // elements of `out` from one part of the positions to the next
  int64_t partial;   // index of the first of its partial losses
  int32_t samples, first_sample;  // first_sample of the maps is the first sample of `out`
  int32_t m, n;
  int32_t positions[2];  // of student and teacher
  int32_t parts;         // into how many parts the positions are split
  int32_t tile;          // one_pass.cuh: channels of a tile, on both sides
  int32_t programs;      // blocks that work for this pair
  float factor;          // weight / (B or B m n)
  Residual residual;
  Norm norm;
  bool split;     // three products of TF32 for each of fp32, else one
  bool finishes;  // this launch computes the loss
};

// One gradient as a product: ratio * slope (own, other) @ other (other, K), for each sample.
struct Product {
  Map own, gradient, other, slope;
  const uint8_t* mask;  // (B, K), contiguous: the gradient is zero where the mask is; or null
  // (B,), or null: what the ratio is also multiplied with and divided by in each sample.
  const float *multiplier, *divisor;
  int32_t samples, first_sample;  // first_sample of the maps is the first sample of the slope
  int32_t own_channels, other_channels, positions;
  int32_t programs;
  float ratio;
  bool split;
};

// The entries of one launch.
template <class Entry, int MOST>
struct Group {
  static constexpr int most = MOST;
  Entry entries[MOST];
  float* partials;
  int32_t count;
  int32_t stages;  // of shared memory, 1 or 2; see pipeline.cuh
};

// As many entries as fit the 4 KB that every driver allows for parameters.
using Pairs = Group<Pair, 6>;
using Products = Group<Product, 12>;
static_assert(sizeof(Pairs) <= 4096 && sizeof(Products) <= 4096);

// elementwise.cuh
struct Sum {  // of the partial losses from start to stop - 1
  int64_t start, stop;
};

struct Sums {
  static constexpr int most = 32;
  Sum entries[most];
  const float* partials;
  float* out;
};
static_assert(sizeof(Sums) <= 4096);

struct Scaled {
  const void* gradient;
  void* out;
  int64_t size;
  Scalar from, to;
  int32_t place;  // of its factor
};

struct Scales {
  static constexpr int most = 100;
  Scaled entries[most];
  const float* factors;
  int32_t count;
  bool in_place;
};
static_assert(sizeof(Scales) <= 4096);

}  // namespace fsp
