// The Python module fsp_kernels._cpu. Addresses, sizes and strides are integers, so that one module
// works with every version of PyTorch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <exception>
#include <new>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "types.h"

namespace py = pybind11;
using namespace py::literals;

namespace fsp::cpu {

// --- temporary memory ----------------------------------------------------------------------------

constexpr int64_t kAlignment = 64;
constexpr int64_t kFirstBlock = 1 << 20;

struct alignas(kAlignment) Scratch::Block {
  Block* before;
  int64_t size;  // of the memory that follows
};

void* Scratch::take(int64_t bytes) {
  bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  if (!last_ || used_ + bytes > last_->size) {
    const int64_t size = std::max({bytes, kFirstBlock, last_ ? 2 * last_->size : 0});
    void* memory = std::aligned_alloc(kAlignment, sizeof(Block) + size);
    if (!memory) throw std::bad_alloc();
    last_ = new (memory) Block{last_, size};
    used_ = 0;
  }
  char* found = reinterpret_cast<char*>(last_ + 1) + used_;
  used_ += bytes;
  return found;
}

// Keeps the last block, which is the largest.
void Scratch::clear() {
  while (last_ && last_->before) {
    Block* block = last_->before;
    last_->before = block->before;
    std::free(block);
  }
  used_ = 0;
}

Scratch::~Scratch() {
  while (last_) {
    Block* before = last_->before;
    std::free(last_);
    last_ = before;
  }
}

// --- instruction sets ----------------------------------------------------------------------------

struct Variant {
  const char* name;
  Evaluate evaluate;
};

// Those that this processor runs, best first.
std::vector<Variant> variants() {
  std::vector<Variant> found;
#ifdef __x86_64__
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw")) {
#ifdef FSP_AVX512_BF16
    if (__builtin_cpu_supports("avx512bf16")) {
      found.push_back({"avx512_bf16", avx512_bf16::evaluate});
    }
#endif
    found.push_back({"avx512", avx512::evaluate});
  }
  if (avx2) found.push_back({"avx2", avx2::evaluate});
#else
  found.push_back({"baseline", baseline::evaluate});
#endif
  return found;
}

Evaluate evaluate_by(const std::string& name) {
  for (const Variant& variant : variants()) {
    if (name == variant.name) return variant.evaluate;
  }
  throw std::invalid_argument("this processor does not run the kernels for " + name);
}

// --- the loss ------------------------------------------------------------------------------------

using Strides = std::array<int64_t, 3>;  // sample, channel, position
using Axes = std::array<int64_t, 3>;
using Layout = std::optional<std::pair<Strides, Scalar>>;
using Layouts = std::array<Layout, 4>;
constexpr int kSlots = 10;  // the addresses of a pair: a, b, c, d, their gradients, both masks

Tensor tensor(const Layout& layout) {
  if (!layout) return {nullptr, 0, 0, 0, Scalar::fp32};
  const auto& [strides, scalar] = *layout;
  return {nullptr, strides[0], strides[1], strides[2], scalar};
}

// (size, pooled size, whether averages are taken) of a map that is pooled; sizes have three axes.
using Poolings = std::array<std::optional<std::tuple<Axes, Axes, bool>>, 4>;

Pooling pooling(const Poolings::value_type& given) {
  Pooling made{};
  if (!given) return made;
  const auto& [size, pooled, average] = *given;
  std::copy(size.begin(), size.end(), made.size);
  std::copy(pooled.begin(), pooled.end(), made.pooled);
  made.average = average;
  return made;
}

Pair pair(const Layouts& maps, const Layouts& gradients, const Poolings& poolings, int64_t batch,
          std::array<int64_t, 2> channels, std::array<int64_t, 2> positions, Residual residual,
          Norm norm, Form form, bool symmetric, bool bf16_products) {
  Pair made{};
  for (int i = 0; i < 4; ++i) {
    made.maps[i] = tensor(maps[i]);
    made.gradients[i] = tensor(gradients[i]);
    made.pooling[i] = pooling(poolings[i]);
  }
  made.batch = batch;
  made.m = channels[0];
  made.n = channels[1];
  std::copy(positions.begin(), positions.end(), made.positions);
  made.residual = residual;
  made.norm = norm;
  made.form = form;
  made.symmetric = symmetric;
  made.bf16_products = bf16_products;
  return made;
}

// A planned loss. Calls from several threads at a time do not disturb each other.
class Loss {
 public:
  Loss(std::vector<Pair> pairs, const std::string& instructions)
      : pairs_(std::move(pairs)), evaluate_(evaluate_by(instructions)) {
    for (size_t i = 0; i < pairs_.size(); ++i) {
      for (int64_t sample = 0; sample < pairs_[i].batch; ++sample) samples_.push_back({i, sample});
    }
    // Samples that take longest come first, so that threads end together.
    std::stable_sort(samples_.begin(), samples_.end(), [this](const auto& x, const auto& y) {
      return work(x.first) > work(y.first);
    });
  }

  // Returns the loss of each pair and fills the gradients.
  std::vector<double> operator()(const std::vector<uintptr_t>& addresses,
                                 const std::vector<double>& factors, int threads) const {
    std::vector<Pair> pairs = pairs_;
    std::vector<std::vector<double>> losses(pairs.size());
    for (size_t i = 0; i < pairs.size(); ++i) {
      const auto address = [&](int slot) {
        return reinterpret_cast<char*>(addresses.at(kSlots * i + slot));
      };
      for (int own = 0; own < 4; ++own) {
        pairs[i].maps[own].address = address(own);
        pairs[i].gradients[own].address = address(4 + own);
      }
      for (int network = 0; network < 2; ++network) {
        pairs[i].masks[network] = reinterpret_cast<const uint8_t*>(address(8 + network));
      }
      losses[i].resize(pairs[i].batch);
      pairs[i].losses = losses[i].data();
      pairs[i].factor = factors.at(i);
    }
    run(pairs, threads);
    std::vector<double> sums;
    for (const auto& of_pair : losses) {
      double sum = 0;
      for (double loss : of_pair) sum += loss;
      sums.push_back(sum);
    }
    return sums;
  }

 private:
  double work(size_t index) const {
    const Pair& pair = pairs_[index];
    return static_cast<double>(pair.m) * pair.n * pair.positions[0];
  }

  void run(const std::vector<Pair>& pairs, [[maybe_unused]] int threads) const {
    std::exception_ptr error;
    const int64_t count = samples_.size();
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t i = 0; i < count; ++i) {
      static thread_local Scratch scratch;
      try {
        evaluate_(pairs[samples_[i].first], samples_[i].second, scratch);
      } catch (...) {
#pragma omp critical
        error = std::current_exception();
      }
      scratch.clear();
    }
    if (error) std::rethrow_exception(error);
  }

  std::vector<Pair> pairs_;
  Evaluate evaluate_;
  std::vector<std::pair<size_t, int64_t>> samples_;  // index of the pair, sample
};

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Variant& variant : variants()) names.push_back(variant.name);
  return names;
}

}  // namespace fsp::cpu

PYBIND11_MODULE(_cpu, module) {
  using namespace fsp::cpu;
  module.doc() = "The CPU kernels of fsp_kernels; see csrc/cpu/.";
  module.attr("instruction_sets") = instruction_sets();
  py::enum_<Scalar>(module, "Scalar", py::module_local())
      .value("fp32", Scalar::fp32)
      .value("fp16", Scalar::fp16)
      .value("bf16", Scalar::bf16);
  py::enum_<Norm>(module, "Norm", py::module_local())
      .value("squares", Norm::squares)
      .value("column", Norm::column);
  py::enum_<Residual>(module, "Residual", py::module_local())
      .value("difference", Residual::difference)
      .value("direct", Residual::direct)
      .value("apart", Residual::apart);
  py::enum_<Form>(module, "Form", py::module_local())
      .value("matrix", Form::matrix)
      .value("gram", Form::gram);
  py::class_<Pair>(module, "Pair", py::module_local())
      .def(py::init(&pair), py::kw_only(), "maps"_a, "gradients"_a, "poolings"_a, "batch"_a,
           "channels"_a, "positions"_a, "residual"_a, "norm"_a, "form"_a, "symmetric"_a,
           "bf16_products"_a);
  py::class_<Loss>(module, "Loss", py::module_local())
      .def(py::init<std::vector<Pair>, const std::string&>(), "pairs"_a, "instructions"_a)
      .def("__call__", &Loss::operator(), "addresses"_a, "factors"_a, "threads"_a,
           py::call_guard<py::gil_scoped_release>());
}
