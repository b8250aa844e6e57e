// The Python module fsp_kernels._cuda. Device addresses, sizes, strides and streams are integers,
// so that one module works with every version of PyTorch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "launch_sequence.h"

namespace py = pybind11;
using namespace py::literals;

namespace fsp {
namespace {

using Strides = std::array<int64_t, 5>;  // sample, channel, depth, height, width
using Window = std::array<uint8_t, 3>;
using Sizes = std::array<int64_t, 2>;
using Slots = std::array<OptionalSlot, 2>;  // of student and teacher

// Kernels count in 32 bits, and exceed a size by less than a tile.
int32_t size(const char* what, int64_t value) {
  constexpr int64_t most = INT32_MAX - 1024;
  if (value >= 0 && value <= most) return static_cast<int32_t>(value);
  throw std::invalid_argument(std::string(what) + " are " + std::to_string(value) +
                              ", but the kernels of the cuda backend take at most " +
                              std::to_string(most));
}

MapSpec map_spec(int slot, Scalar scalar, Strides strides, int64_t rows, int64_t columns,
                 Window window, Pool pool, bool flat, bool channels_inner, uint8_t unit) {
  Map map{};
  map.sample = strides[0];
  map.channel = strides[1];
  map.depth = strides[2];
  map.height = strides[3];
  map.width = strides[4];
  map.rows = size("rows of a map", rows);
  map.columns = size("columns of a map", columns);
  std::copy(window.begin(), window.end(), map.window);
  map.pool = pool;
  map.scalar = scalar;
  map.flat = flat;
  map.channels_inner = channels_inner;
  map.unit = unit;
  return {map, slot};
}

PairSpec pair_spec(std::array<OptionalMap, 4> maps, std::array<OptionalMap, 4> gradients,
                   OptionalMap out, int64_t out_part, int64_t samples, int64_t first_sample,
                   Sizes channels, Sizes positions, int parts, Residual residual, Norm norm,
                   bool split, bool finishes, int index, float factor, Slots masks,
                   Slots counts) {
  Pair pair{};
  pair.out_part = out_part;
  pair.samples = size("samples", samples);
  pair.first_sample = size("samples", first_sample);
  pair.m = size("channels", channels[0]);
  pair.n = size("channels", channels[1]);
  for (int i = 0; i < 2; ++i) pair.positions[i] = size("positions", positions[i]);
  pair.parts = parts;
  pair.residual = residual;
  pair.norm = norm;
  pair.split = split;
  pair.finishes = finishes;
  pair.factor = factor;
  return {pair, maps, gradients, out, masks, counts, index};
}

ProductSpec product_spec(OptionalMap own, MapSpec gradient, OptionalMap other, MapSpec slope,
                         int64_t samples, int64_t first_sample, Sizes channels,
                         int64_t positions, bool split, float ratio, OptionalSlot mask,
                         OptionalSlot multiplier, OptionalSlot divisor) {
  Product product{};
  product.samples = size("samples", samples);
  product.first_sample = size("samples", first_sample);
  product.own_channels = size("channels", channels[0]);
  product.other_channels = size("channels", channels[1]);
  product.positions = size("positions", positions);
  product.split = split;
  product.ratio = ratio;
  return {product, {own, gradient, other, slope}, mask, multiplier, divisor};
}

// Calls of CUDA may take long, so other Python threads run meanwhile. pybind11 converts the
// arguments before it releases the lock, and the result or the error afterwards.
using WithoutGil = py::call_guard<py::gil_scoped_release>;

// addresses of gradient and result, number of elements, dtypes of gradient and result, place of
// the factor
using ScaledTuple = std::tuple<uintptr_t, uintptr_t, int64_t, Scalar, Scalar, int>;

void scale_tuples(int device, uintptr_t stream, const std::vector<ScaledTuple>& tensors,
                  uintptr_t factors, bool in_place) {
  std::vector<Scaled> scaled;
  scaled.reserve(tensors.size());
  for (const auto& [from, out, size, from_scalar, out_scalar, place] : tensors) {
    scaled.push_back({reinterpret_cast<const void*>(from), reinterpret_cast<void*>(out), size,
                      from_scalar, out_scalar, place});
  }
  scale(device, stream, scaled, factors, in_place);
}

}  // namespace
}  // namespace fsp

PYBIND11_MODULE(_cuda, module) {
  using namespace fsp;
  module.doc() = "The CUDA C++ kernels of fsp_kernels; see csrc/.";
  module.attr("architectures") = FSP_ARCHITECTURES;
  py::enum_<Scalar>(module, "Scalar", py::module_local())
      .value("fp32", Scalar::fp32)
      .value("fp16", Scalar::fp16)
      .value("bf16", Scalar::bf16);
  py::enum_<Pool>(module, "Pool", py::module_local())
      .value("none", Pool::none)
      .value("max", Pool::max)
      .value("avg", Pool::avg);
  py::enum_<Norm>(module, "Norm", py::module_local())
      .value("squares", Norm::squares)
      .value("column", Norm::column);
  py::enum_<Residual>(module, "Residual", py::module_local())
      .value("difference", Residual::difference)
      .value("apart", Residual::apart)
      .value("ready", Residual::ready)
      .value("plain", Residual::plain);

  py::class_<MapSpec>(module, "Map", py::module_local())
      .def(py::init(&map_spec), py::kw_only(), "slot"_a, "scalar"_a, "strides"_a, "rows"_a,
           "columns"_a, "window"_a, "pool"_a, "flat"_a, "channels_inner"_a, "unit"_a);
  py::class_<PairSpec>(module, "Pair", py::module_local())
      .def(py::init(&pair_spec), py::kw_only(), "maps"_a, "gradients"_a, "out"_a, "out_part"_a,
           "samples"_a, "first_sample"_a, "channels"_a, "positions"_a, "parts"_a,
           "residual"_a, "norm"_a, "split"_a, "finishes"_a, "index"_a, "factor"_a,
           "masks"_a = Slots{}, "counts"_a = Slots{});
  py::class_<ProductSpec>(module, "Product", py::module_local())
      .def(py::init(&product_spec), py::kw_only(), "own"_a, "gradient"_a, "other"_a, "slope"_a,
           "samples"_a, "first_sample"_a, "channels"_a, "positions"_a, "split"_a, "ratio"_a,
           "mask"_a = py::none(), "multiplier"_a = py::none(), "divisor"_a = py::none());
  py::class_<LaunchDescription>(module, "LaunchDescription", py::module_local())
      .def_readonly("kernel", &LaunchDescription::kernel)
      .def_readonly("operand", &LaunchDescription::operand)
      .def_readonly("tile", &LaunchDescription::tile)
      .def_readonly("threads", &LaunchDescription::threads)
      .def_readonly("stages", &LaunchDescription::stages)
      .def_readonly("shared_bytes", &LaunchDescription::shared_bytes)
      .def_readonly("blocks", &LaunchDescription::blocks);
  py::class_<LaunchSequence>(module, "LaunchSequence", py::module_local())
      .def(py::init<int, std::string, bool>(), "device"_a, "what"_a, "by_pair"_a = false)
      .def("add_one_pass", &LaunchSequence::add_one_pass, "operand"_a, "pairs"_a)
      .def("add_gram", &LaunchSequence::add_gram, "pairs"_a)
      .def("add_residual", &LaunchSequence::add_residual, "operand"_a, "pairs"_a)
      .def("add_combine", &LaunchSequence::add_combine, "pairs"_a)
      .def("add_gradients", &LaunchSequence::add_gradients, "operand"_a, "products"_a)
      .def("add_matrix_gradients", &LaunchSequence::add_matrix_gradients, "products"_a)
      .def_property_readonly("launches", &LaunchSequence::launches)
      .def_property_readonly("partials", &LaunchSequence::partials)
      .def("__call__", &LaunchSequence::run, "stream"_a, "addresses"_a, "weights"_a, WithoutGil());

  module.attr("most_pairs") = Pairs::most;
  module.attr("most_products") = Products::most;
  module.attr("most_sums") = Sums::most;
  module.def("why_not_on", &why_not_on, "device"_a, "stream"_a, WithoutGil(),
             "Load the kernels on a device. CUDA's reason if they do not run there, else empty.");
  module.def("shared_bytes", &shared_bytes,
             "For each kernel: name, operand, tile, bytes of a block with one stage and with two.");
  module.def("assume_chip", &assume_chip, "major"_a, "most_shared_bytes"_a,
             "Plan launches for such a chip; the device need not exist.");
  module.def("one_pass_tile", &one_pass_tile, "device"_a, "operand"_a, "channels"_a,
             "Channels of the smallest tile for one pass; 0 if there is none.");
  module.def("residual_tile", &residual_tile, "operand"_a, "Channels of a stored tile.");
  module.def("gram_fits", &gram_fits, "device"_a, "positions"_a);
  module.def("scale", &scale_tuples, "device"_a, "stream"_a, "tensors"_a, "factors"_a,
             "in_place"_a, WithoutGil());
}
