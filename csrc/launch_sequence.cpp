#include "launch_sequence.h"

#include <algorithm>
#include <limits>
#include <map>
#include <mutex>
#include <set>
#include <stdexcept>

namespace fsp {

namespace {

const Kernels& kernels_of(Scalar operand) {
  static const Kernels fp32 = fp32_kernels(), fp16 = fp16_kernels(), bf16 = bf16_kernels();
  return operand == Scalar::fp16 ? fp16 : operand == Scalar::bf16 ? bf16 : fp32;
}

int64_t divide_up(int64_t x, int64_t y) { return (x + y - 1) / y; }

std::map<cudaDeviceAttr, int> assumed;  // see assume_chip

int attribute(int device, cudaDeviceAttr which,
              const std::string& what = "asking for an attribute of the device") {
  if (const auto known = assumed.find(which); known != assumed.end()) return known->second;
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), what);
  return value;
}

int most_shared_bytes(int device) {
  return attribute(device, cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

bool fits(int device, const Kernel& kernel, int tile) {
  return kernel.launch != nullptr && kernel.shared_bytes(tile, 1) <= most_shared_bytes(device);
}

// Two if the chip has asynchronous copies and enough shared memory: a tile is then copied while
// another is multiplied.
int stages_of(int device, const Kernel& kernel, int tile) {
  const bool copies = attribute(device, cudaDevAttrComputeCapabilityMajor) >= 8;
  return copies && kernel.shared_bytes(tile, 2) <= most_shared_bytes(device) ? 2 : 1;
}

// Call visit(kernel, operand, tile) for each kernel. `operand` is "" if the kernel is for all
// operands, `tile` 0 if it has one size.
template <class Visit>
void for_every_kernel(Visit visit) {
  const std::pair<Scalar, const char*> operands[] = {
      {Scalar::fp32, "fp32"}, {Scalar::fp16, "fp16"}, {Scalar::bf16, "bf16"}};
  for (const auto& [operand, name] : operands) {
    const Kernels& kernels = kernels_of(operand);
    for (const int tile : ONE_PASS_TILES) visit(kernels.one_pass, name, tile);
    if (kernels.wide_one_pass.launch != nullptr) {
      visit(kernels.wide_one_pass, name, WIDE_ONE_PASS_TILE);
    }
    visit(kernels.residual, name, 0);
    visit(kernels.gradients, name, 0);
  }
  visit(gram_kernel_32(), "", 32);
  visit(gram_kernel_64(), "", 64);
  for (const Kernel& kernel :
       {combine_kernel(), matrix_gradients_kernel(), finish_kernel(), scale_kernel()}) {
    visit(kernel, "", 0);
  }
}

// Makes a device current, and restores the previous one. Usually PyTorch has made it current
// already.
class OnDevice {
 public:
  explicit OnDevice(int device) : status(cudaGetDevice(&before_)), device_(device) {
    if (status == cudaSuccess && device_ != before_) status = cudaSetDevice(device_);
  }
  ~OnDevice() {
    if (status == cudaSuccess && device_ != before_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  cudaError_t status;

 private:
  int before_ = 0, device_;
};

// Loads all kernels on the current device when it is first used.
//
// They are loaded together, so that none has to be loaded while a graph is captured, and so that no
// launch changes attributes of kernels that another launch relies on.
cudaError_t load_kernels(int device, cudaStream_t stream) {
  static std::mutex mutex;
  static std::set<int> loaded;
  const std::lock_guard<std::mutex> lock(mutex);
  if (loaded.count(device) != 0) return cudaSuccess;
  cudaStreamCaptureStatus capturing;
  cudaError_t status = cudaStreamIsCapturing(stream, &capturing);
  if (status != cudaSuccess) return status;
  if (capturing != cudaStreamCaptureStatusNone) {
    throw std::runtime_error(
        "fsp_kernels: kernels have to be loaded when the cuda backend is first used on cuda:" +
        std::to_string(device) +
        ", which CUDA does not allow while a graph is captured: call it once before capturing");
  }
  const int most = most_shared_bytes(device);
  for_every_kernel([&](const Kernel& kernel, const char*, int) {
    if (status == cudaSuccess) status = kernel.load(most);
  });
  if (status == cudaSuccess) loaded.insert(device);
  return status;
}

void place(Map& map, const OptionalMap& spec, const std::vector<uintptr_t>& addresses) {
  if (!spec) return;
  const uintptr_t address = addresses.at(spec->slot);
  map.data = reinterpret_cast<void*>(address);
  map.unit = spec->map.unit;
  while (address % map.unit != 0) map.unit /= 2;
}

// The address in a slot; null if there is none.
template <class T>
const T* address_at(OptionalSlot slot, const std::vector<uintptr_t>& addresses) {
  return slot ? reinterpret_cast<const T*>(addresses.at(*slot)) : nullptr;
}

void place(Pair& pair, const PairSpec& spec, const std::vector<uintptr_t>& addresses,
           const std::vector<float>& weights) {
  pair.factor *= weights.at(spec.index);
  for (int i = 0; i < 4; ++i) {
    place(pair.maps[i], spec.maps[i], addresses);
    place(pair.gradients[i], spec.gradients[i], addresses);
  }
  place(pair.out, spec.out, addresses);
  for (int i = 0; i < 2; ++i) {
    pair.masks[i] = {address_at<uint8_t>(spec.masks[i], addresses),
                     address_at<float>(spec.counts[i], addresses)};
  }
}

void place(Product& product, const ProductSpec& spec, const std::vector<uintptr_t>& addresses,
           const std::vector<float>&) {
  Map* const maps[] = {&product.own, &product.gradient, &product.other, &product.slope};
  for (int i = 0; i < 4; ++i) place(*maps[i], spec.maps[i], addresses);
  product.mask = address_at<uint8_t>(spec.mask, addresses);
  product.multiplier = address_at<float>(spec.multiplier, addresses);
  product.divisor = address_at<float>(spec.divisor, addresses);
}

Map map_of(const OptionalMap& spec) { return spec ? spec->map : Map{}; }

Pair entry_of(const PairSpec& spec) {
  Pair pair = spec.pair;
  for (int i = 0; i < 4; ++i) {
    pair.maps[i] = map_of(spec.maps[i]);
    pair.gradients[i] = map_of(spec.gradients[i]);
  }
  pair.out = map_of(spec.out);
  return pair;
}

Product entry_of(const ProductSpec& spec) {
  Product product = spec.product;
  product.own = map_of(spec.maps[0]);
  product.gradient = map_of(spec.maps[1]);
  product.other = map_of(spec.maps[2]);
  product.slope = map_of(spec.maps[3]);
  return product;
}

template <class Group, class Spec>
class Launch : public PreparedLaunch {
 public:
  // programs_of(entry) is the number of blocks that an entry needs.
  template <class ProgramsOf>
  Launch(int device, const std::string& what, const Kernel& kernel, int tile,
         std::vector<Spec> specs, ProgramsOf programs_of)
      : kernel_(kernel), specs_(std::move(specs)), what_(kernel.name + (" on " + what)) {
    if (specs_.empty() || specs_.size() > Group::most) {
      throw std::invalid_argument("a launch takes 1 to " + std::to_string(Group::most) +
                                  " entries, got " + std::to_string(specs_.size()));
    }
    group_.stages = stages_of(device, kernel, tile);
    group_.count = static_cast<int>(specs_.size());
    int64_t blocks = 0;
    for (size_t i = 0; i < specs_.size(); ++i) {
      group_.entries[i] = entry_of(specs_[i]);
      const int64_t programs = programs_of(group_.entries[i]);
      blocks += programs;
      group_.entries[i].programs = static_cast<int>(programs);
    }
    if (blocks > std::numeric_limits<int>::max()) {
      throw std::invalid_argument(what_ + " would take " + std::to_string(blocks) +
                                  " blocks, but one launch has at most 2147483647: call it with "
                                  "fewer samples");
    }
    blocks_ = static_cast<int>(blocks);
    shared_bytes_ = kernel.shared_bytes(tile, group_.stages);
  }

  void place_partials(std::map<int, int64_t>& next) override {
    if constexpr (std::is_same_v<Spec, PairSpec>) {
      for (int i = 0; i < group_.count; ++i) {
        if (!group_.entries[i].finishes) continue;
        int64_t& place = next[specs_[i].index];
        group_.entries[i].partial = place;
        place += group_.entries[i].programs;
      }
    }
  }

  LaunchDescription describe() const override {
    LaunchDescription facts{kernel_.name, "", 0, THREADS, group_.stages, shared_bytes_, {}};
    for (int i = 0; i < group_.count; ++i) facts.blocks.push_back(group_.entries[i].programs);
    for_every_kernel([&](const Kernel& kernel, const char* operand, int tile) {
      // Each instance of a kernel template has its own `load`. If several tiles share an instance,
      // the last one is reported.
      if (kernel.load != kernel_.load) return;
      facts.operand = operand;
      facts.tile = tile;
    });
    return facts;
  }

  void run(cudaStream_t stream, const std::vector<uintptr_t>& addresses,
           const std::vector<float>& weights, float* partials) const override {
    Group group = group_;
    group.partials = partials;
    for (int i = 0; i < group.count; ++i) {
      place(group.entries[i], specs_[i], addresses, weights);
    }
    check(kernel_.launch(&group, blocks_, shared_bytes_, stream), what_);
  }

 private:
  Kernel kernel_;
  std::vector<Spec> specs_;
  std::string what_;
  Group group_{};
  int blocks_ = 0, shared_bytes_ = 0;
};

using PairLaunch = Launch<Pairs, PairSpec>;
using ProductLaunch = Launch<Products, ProductSpec>;

int64_t samples_of(const Pair& pair) { return pair.samples; }

}  // namespace

void check(cudaError_t status, const std::string& what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // clear the error, which the next call would report again
  throw std::runtime_error("fsp_kernels: " + what + ": CUDA error: " + cudaGetErrorString(status) +
                           " (" + cudaGetErrorName(status) + ")");
}

std::string why_not_on(int device, uintptr_t stream) {
  const OnDevice on(device);
  cudaError_t status = on.status;
  if (status == cudaSuccess) {
    status = load_kernels(device, reinterpret_cast<cudaStream_t>(stream));
  }
  if (status == cudaSuccess) return "";
  cudaGetLastError();
  return cudaGetErrorString(status);
}

std::vector<SharedBytes> shared_bytes() {
  std::vector<SharedBytes> result;
  for_every_kernel([&](const Kernel& kernel, const char* operand, int tile) {
    result.emplace_back(kernel.name, operand, tile, kernel.shared_bytes(tile, 1),
                        kernel.shared_bytes(tile, 2));
  });
  return result;
}

void assume_chip(int major, int most_shared_bytes) {
  assumed = {{cudaDevAttrComputeCapabilityMajor, major},
             {cudaDevAttrMaxSharedMemoryPerBlockOptin, most_shared_bytes}};
}

int one_pass_tile(int device, Scalar operand, int channels) {
  const Kernels& kernels = kernels_of(operand);
  for (const int tile : ONE_PASS_TILES) {
    if (tile >= channels) return fits(device, kernels.one_pass, tile) ? tile : 0;
  }
  const bool wide = channels <= WIDE_ONE_PASS_TILE && fits(device, kernels.wide_one_pass, 0);
  return wide ? WIDE_ONE_PASS_TILE : 0;
}

int residual_tile(Scalar operand) { return kernels_of(operand).residual_channels; }

bool gram_fits(int device, int positions) {
  return positions <= GRAM_POSITIONS && fits(device, gram_kernel_64(), 0);
}

LaunchSequence::LaunchSequence(int device, std::string what, bool by_pair)
    : device_(device), what_(std::move(what)), by_pair_(by_pair) {
  // Throws if there is no such device.
  attribute(device_, cudaDevAttrComputeCapabilityMajor, what_);
}

template <class ProgramsOf>
void LaunchSequence::add(const Kernel& kernel, int tile, std::vector<PairSpec> pairs,
                  ProgramsOf programs_of) {
  launches_.push_back(std::make_unique<PairLaunch>(device_, what_, kernel, tile, std::move(pairs),
                                                   programs_of));
  place_partials();
}

// Places of a pair are neighbours, so that they can be added alone.
void LaunchSequence::place_partials() {
  std::map<int, int64_t> next;
  for (const auto& launch : launches_) launch->place_partials(next);
  partials_ = 0;
  sums_.clear();
  for (auto& [pair, count] : next) {
    sums_.push_back({partials_, partials_ + count});
    count = partials_;
    partials_ = sums_.back().stop;
  }
  for (const auto& launch : launches_) launch->place_partials(next);
  if (!by_pair_ && partials_ > 0) sums_ = {{0, partials_}};
}

void LaunchSequence::add_one_pass(Scalar operand, std::vector<PairSpec> pairs) {
  // Tiles of 32 and 64 channels share a launch, with the shared memory that the larger needs.
  std::vector<PairSpec> narrow, wide;
  int largest = 0;
  for (PairSpec& spec : pairs) {
    const int tile = one_pass_tile(device_, operand, std::max(spec.pair.m, spec.pair.n));
    if (tile == 0) throw std::invalid_argument("one pass: too many channels");
    spec.pair.tile = tile;
    (tile == WIDE_ONE_PASS_TILE ? wide : narrow).push_back(spec);
    if (tile != WIDE_ONE_PASS_TILE) largest = std::max(largest, tile);
  }
  const Kernels& kernels = kernels_of(operand);
  if (!wide.empty()) add(kernels.wide_one_pass, WIDE_ONE_PASS_TILE, std::move(wide), samples_of);
  if (!narrow.empty()) add(kernels.one_pass, largest, std::move(narrow), samples_of);
}

void LaunchSequence::add_gram(std::vector<PairSpec> pairs) {
  const bool small = std::all_of(pairs.begin(), pairs.end(),
                                 [](const PairSpec& x) { return x.pair.positions[0] <= 32; });
  add(small ? gram_kernel_32() : gram_kernel_64(), 0, std::move(pairs), samples_of);
}

void LaunchSequence::add_residual(Scalar operand, std::vector<PairSpec> pairs) {
  const Kernels& kernels = kernels_of(operand);
  add(kernels.residual, 0, std::move(pairs), [tile = kernels.residual_channels](const Pair& pair) {
    return int64_t{pair.samples} * pair.parts * divide_up(pair.m, tile) * divide_up(pair.n, tile);
  });
}

void LaunchSequence::add_combine(std::vector<PairSpec> pairs) {
  add(combine_kernel(), 0, std::move(pairs), [](const Pair& pair) {
    return pair.samples * divide_up(pair.n, COMBINED_COLUMNS);
  });
}

void LaunchSequence::add_gradients(Scalar operand, std::vector<ProductSpec> products) {
  launches_.push_back(std::make_unique<ProductLaunch>(
      device_, what_, kernels_of(operand).gradients, 0, std::move(products), [](const Product& x) {
        return x.samples * divide_up(x.own_channels, GRADIENT_CHANNELS) *
               divide_up(x.positions, GRADIENT_POSITIONS);
      }));
}

void LaunchSequence::add_matrix_gradients(std::vector<ProductSpec> products) {
  launches_.push_back(std::make_unique<ProductLaunch>(
      device_, what_, matrix_gradients_kernel(), 0, std::move(products),
      [](const Product& x) { return int64_t{x.samples} * x.own_channels; }));
}

std::vector<LaunchDescription> LaunchSequence::launches() const {
  std::vector<LaunchDescription> facts;
  for (const auto& launch : launches_) facts.push_back(launch->describe());
  const Kernel last = finish_kernel();
  for (size_t first = 0; first < sums_.size(); first += Sums::most) {
    const auto blocks = static_cast<int>(std::min<size_t>(sums_.size() - first, Sums::most));
    facts.push_back({last.name, "", 0, THREADS, 1, last.shared_bytes(0, 1), {blocks}});
  }
  return facts;
}

void LaunchSequence::run(uintptr_t stream, const std::vector<uintptr_t>& addresses,
                  const std::vector<float>& weights) const {
  const OnDevice on(device_);
  check(on.status, what_);
  const auto queue = reinterpret_cast<cudaStream_t>(stream);
  check(load_kernels(device_, queue), what_);
  float *partials = nullptr, *out = nullptr;
  if (partials_ > 0) {
    partials = reinterpret_cast<float*>(addresses.at(addresses.size() - 2));
    out = reinterpret_cast<float*>(addresses.back());
  }
  for (const auto& launch : launches_) {
    launch->run(queue, addresses, weights, partials);
  }
  const Kernel kernel = finish_kernel();
  for (size_t first = 0; first < sums_.size(); first += Sums::most) {
    const size_t count = std::min<size_t>(sums_.size() - first, Sums::most);
    Sums sums{{}, partials, out + first};
    std::copy_n(sums_.begin() + first, count, sums.entries);
    check(kernel.launch(&sums, static_cast<int>(count), kernel.shared_bytes(0, 1), queue),
          kernel.name + (" on " + what_));
  }
}

void scale(int device, uintptr_t stream, const std::vector<Scaled>& tensors, uintptr_t factors,
           bool in_place) {
  // Enough blocks to saturate memory, but so few that starting them for a factor of 1 costs
  // nothing.
  constexpr int64_t most_blocks = 1024;
  const Kernel kernel = scale_kernel();
  const std::string what =
      kernel.name + (" on " + std::to_string(tensors.size()) + " gradients");
  const OnDevice on(device);
  check(on.status, what);
  const auto queue = reinterpret_cast<cudaStream_t>(stream);
  check(load_kernels(device, queue), what);
  for (size_t first = 0; first < tensors.size(); first += Scales::most) {
    Scales scales{};
    scales.count = static_cast<int>(std::min<size_t>(tensors.size() - first, Scales::most));
    scales.factors = reinterpret_cast<const float*>(factors);
    scales.in_place = in_place;
    int64_t largest = 1;
    for (int i = 0; i < scales.count; ++i) {
      scales.entries[i] = tensors[first + i];
      largest = std::max(largest, scales.entries[i].size);
    }
    const int64_t blocks = (largest + SCALED_AT_A_TIME - 1) / SCALED_AT_A_TIME;
    check(kernel.launch(&scales, static_cast<int>(std::min(blocks, most_blocks)), 0, queue), what);
  }
}

}  // namespace fsp
