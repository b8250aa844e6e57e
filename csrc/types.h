// What kernels are told of a call: plain structs that bindings.cpp fills and kernels read from
// constant memory. Strides are in elements, in 64 bits: every offset is a product with one of them.
#pragma once

#include <cstdint>

namespace fsp {

constexpr int THREADS = 256;  // of every block
constexpr int WARPS = THREADS / 32;

enum class Scalar : uint8_t { fp32, fp16, bf16 };
enum class Pool : uint8_t { none, max, avg };
enum class Norm : uint8_t { squares, column };
// How D / K = G^S - G^T comes about: from p = a - c and q = b - d; from the products of networks with
// unequal positions; or from the student's product and a ready matrix. The last: a plain product,
// with no teacher.
enum class Residual : uint8_t { difference, apart, ready, plain };

// A feature map (B, C, *spatial), or a gradient of one. Three spatial axes always, leading ones of
// size 1 where there are fewer. A matrix is a map of `channel` by `width`.
struct Map {
  void* data;  // null: there is none
  int64_t sample, channel, depth, height, width;
  int32_t rows, columns;  // sizes, after pooling, of the last two axes
  uint8_t window[3];      // elements pooled along each axis
  Pool pool;
  Scalar scalar;
  bool flat;            // positions lie `width` apart, whatever their axis
  bool channels_inner;  // neighbours in memory are channels, not positions
  // Bytes of these neighbours that can be read at a time, at most 16: every line begins at a multiple
  // of as many. Below 4, elements are read one by one.
  uint8_t unit;
};

// One pair of layers of both networks: maps a, b, c, d; a ready matrix is c.
struct Pair {
  Map maps[4];
  Map gradients[4];
  // tiles.cuh: where slopes go, or D / K if another launch adds its parts, a matrix for each sample.
  // combine.cuh: where slopes go; the parts are a.
  Map out;
  int64_t out_part;  // from one part of the positions to the next
  int64_t partial;   // place of the first of its partial losses
  int32_t samples, first_sample;  // in the maps; `out` begins at it
  int32_t m, n;
  int32_t positions[2];  // of student and teacher
  int32_t parts;         // into how many the positions are split
  int32_t tile;          // one_pass.cuh: channels of a tile, of either side
  int32_t programs;      // blocks that work for this pair
  float factor;          // weight / (B or B m n)
  Residual residual;
  Norm norm;
  bool split;     // fp32 products in three of TF32, else in one
  bool finishes;  // whether the launch tells the loss
};

// One gradient as a product: ratio * slope (own, other) @ other (other, K), for each sample.
struct Product {
  Map own, gradient, other, slope;
  int32_t samples, first_sample;  // in the maps; the slope begins at it
  int32_t own_channels, other_channels, positions;
  int32_t programs;
  float ratio;
  bool split;
};

// All that one launch works on.
template <class Entry, int MOST>
struct Group {
  static constexpr int most = MOST;
  Entry entries[MOST];
  float* partials;
  int32_t count;
  int32_t stages;  // tiles under way to shared memory, 1 or 2
};

// As many as fit the 4 KB that parameters may take on every driver.
using Pairs = Group<Pair, 6>;
using Products = Group<Product, 12>;
static_assert(sizeof(Pairs) <= 4096 && sizeof(Products) <= 4096);

// elementwise.cuh
struct Sum {
  const float* partials;
  float* out;
  int64_t count;
};

struct Scaled {
  const void* gradient;
  void* out;
  int64_t size;
  Scalar from, to;
};

struct Scales {
  static constexpr int most = 100;
  Scaled entries[most];
  const float* factor;
  int32_t count;
  bool in_place;
};
static_assert(sizeof(Scales) <= 4096);

}  // namespace fsp
