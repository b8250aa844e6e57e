// What is launched for one call, prepared once: grids, shared memory and everything that depends on
// shapes and strides. A call then brings addresses and weights.
#pragma once

#include <array>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace fsp {

// Places in the list of addresses that a call brings, of what the parameters of an entry point to.
struct MapSpec {
  Map map;   // but for its address, and `unit` only as far as strides tell
  int slot;  // of the address
};

using OptionalMap = std::optional<MapSpec>;

struct PairSpec {
  Pair pair;  // but for addresses, weight and place of losses
  std::array<OptionalMap, 4> maps, gradients;
  OptionalMap out;
  int weight;  // place in the list of weights
};

struct ProductSpec {
  Product product;                  // likewise
  std::array<OptionalMap, 4> maps;  // own, gradient, other, slope
};

// Throws std::runtime_error with what CUDA says, unless all is well.
void check(cudaError_t status, const std::string& what);

// The device that is current in this thread is the caller's: whatever makes another one current, as
// launches on a device that is not have to, restores it.

// Why no kernel here runs on a device, as CUDA tells; empty if they do. Loads them, which CUDA does
// not allow while a stream is captured: that is an error.
std::string why_not_on(int device, uintptr_t stream);

// Shared memory of a block of every kernel: name, operand ("" where there is only one), tile (0
// where there is only one), bytes with one stage and with two.
using SharedBytes = std::tuple<std::string, std::string, int, int, int>;
std::vector<SharedBytes> shared_bytes();

// From now on launches are planned for such a chip, whatever device they name: one need not be there.
void assume_chip(int major, int most_shared_bytes);

// What a launch takes; its kernel by name, operand and tile as in `shared_bytes`.
struct LaunchDescription {
  std::string kernel, operand;
  int tile, threads, stages, shared_bytes;
  std::vector<int> blocks;  // of each entry
};

// Channels of the smallest tile of the one-pass kernel that holds a sample of such a pair on a
// device, 0 if there is none; of the tiles of stored residuals; whether the other kernels fit.
int one_pass_tile(int device, Scalar operand, int channels);
int residual_tile(Scalar operand);
bool gram_fits(int device, int positions);

// One launch.
class Step {
 public:
  virtual ~Step() = default;
  virtual LaunchDescription describe() const = 0;
  virtual void run(cudaStream_t stream, const std::vector<uintptr_t>& addresses,
                   const std::vector<float>& weights, float* partials) const = 0;
};

class LaunchSequence {
 public:
  // `what` tells the call in error messages.
  LaunchSequence(int device, std::string what);

  void add_one_pass(Scalar operand, std::vector<PairSpec> pairs);
  void add_gram(std::vector<PairSpec> pairs);
  void add_residual(Scalar operand, std::vector<PairSpec> pairs);
  void add_combine(std::vector<PairSpec> pairs);
  void add_gradients(Scalar operand, std::vector<ProductSpec> products);
  void add_matrix_gradients(std::vector<ProductSpec> products);

  // What a call launches, in order.
  std::vector<LaunchDescription> launches() const;

  // How many partial losses the launches leave, a float each.
  int64_t partials() const { return partials_; }

  // Launch everything on a stream. The last two addresses are of the partial losses and of their
  // sum, unless there are none.
  void run(uintptr_t stream, const std::vector<uintptr_t>& addresses,
           const std::vector<float>& weights) const;

 private:
  // `programs_of` tells how many blocks a pair needs.
  template <class ProgramsOf>
  void add(const Kernel& kernel, int tile, std::vector<PairSpec> pairs, ProgramsOf programs_of);

  int device_;
  std::string what_;
  int64_t partials_ = 0;
  std::vector<std::unique_ptr<Step>> steps_;
};

// Gradients times a factor on the device, each to another tensor or in its place.
void scale(int device, uintptr_t stream, const std::vector<Scaled>& tensors, uintptr_t factor,
           bool in_place);

}  // namespace fsp
