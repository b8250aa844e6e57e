// The launches of a call, prepared once: grids, shared memory and all that depends on shapes and
// strides. A call then passes addresses and weights.
#pragma once

#include <array>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace fsp {

// A map without its address. A call passes a list of addresses.
struct MapSpec {
  Map map;   // `unit` follows from the strides alone; the address may make it smaller
  int slot;  // the index of its address in that list
};

using OptionalMap = std::optional<MapSpec>;
using OptionalSlot = std::optional<int>;

struct PairSpec {
  Pair pair;  // without addresses, weight and place of losses
  std::array<OptionalMap, 4> maps, gradients;
  OptionalMap out;
  std::array<OptionalSlot, 2> masks, counts;  // of student and teacher
  int index;  // of the pair, and of its weight in the list that a call passes
};

struct ProductSpec {
  Product product;                  // without addresses
  std::array<OptionalMap, 4> maps;  // own, gradient, other, slope
  OptionalSlot mask, multiplier, divisor;
};

// Throws std::runtime_error with CUDA's message unless `status` is cudaSuccess.
void check(cudaError_t status, const std::string& what);

// Functions that make another device current restore the caller's device before they return.

// Loads the kernels on a device. Returns CUDA's reason if they do not run there, else an empty
// string. CUDA does not allow loading while a stream is captured: then it throws.
std::string why_not_on(int device, uintptr_t stream);

// The shared memory of a block of every kernel: name, operand ("" if there is only one), tile (0 if
// there is only one), bytes with one stage and with two.
using SharedBytes = std::tuple<std::string, std::string, int, int, int>;
std::vector<SharedBytes> shared_bytes();

// From now on plan launches for such a chip, whatever device they name. The device need not exist.
void assume_chip(int major, int most_shared_bytes);

// The size of a launch. Its kernel has the name, operand and tile of `shared_bytes`.
struct LaunchDescription {
  std::string kernel, operand;
  int tile, threads, stages, shared_bytes;
  std::vector<int> blocks;  // for each entry
};

// Channels of the smallest tile of the one-pass kernel that holds so many channels on a device; 0
// if there is none.
int one_pass_tile(int device, Scalar operand, int channels);
// Channels of the tiles of stored residuals.
int residual_tile(Scalar operand);
// Whether the Gram kernels fit a device, for so many positions.
bool gram_fits(int device, int positions);

// One prepared launch.
class PreparedLaunch {
 public:
  virtual ~PreparedLaunch() = default;
  virtual LaunchDescription describe() const = 0;
  // Give the entries the next places of their pairs for partial losses; updates `next`, by pair.
  virtual void place_partials(std::map<int, int64_t>& next) = 0;
  virtual void run(cudaStream_t stream, const std::vector<uintptr_t>& addresses,
                   const std::vector<float>& weights, float* partials) const = 0;
};

class LaunchSequence {
 public:
  // `what` describes the call in error messages. There is a loss of each pair if `by_pair`, else
  // one of all.
  LaunchSequence(int device, std::string what, bool by_pair);

  void add_one_pass(Scalar operand, std::vector<PairSpec> pairs);
  void add_gram(std::vector<PairSpec> pairs);
  void add_residual(Scalar operand, std::vector<PairSpec> pairs);
  void add_combine(std::vector<PairSpec> pairs);
  void add_gradients(Scalar operand, std::vector<ProductSpec> products);
  void add_matrix_gradients(std::vector<ProductSpec> products);

  // What a call launches, in order.
  std::vector<LaunchDescription> launches() const;

  // How many partial losses, each a float, the launches write.
  int64_t partials() const { return partials_; }

  // Launch everything on a stream. If there are partial losses, the last two addresses are those of
  // the partial losses and of their sums.
  void run(uintptr_t stream, const std::vector<uintptr_t>& addresses,
           const std::vector<float>& weights) const;

 private:
  // programs_of(pair) is the number of blocks that a pair needs.
  template <class ProgramsOf>
  void add(const Kernel& kernel, int tile, std::vector<PairSpec> pairs, ProgramsOf programs_of);
  void place_partials();

  int device_;
  std::string what_;
  bool by_pair_;
  int64_t partials_ = 0;
  std::vector<Sum> sums_;
  std::vector<std::unique_ptr<PreparedLaunch>> launches_;
};

// Write gradients times factors, which are on the device, to other tensors or in place.
void scale(int device, uintptr_t stream, const std::vector<Scaled>& tensors, uintptr_t factors,
           bool in_place);

}  // namespace fsp
