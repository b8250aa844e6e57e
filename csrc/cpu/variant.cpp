// The kernels for one instruction set. CMake compiles this file once for each, with FSP_VARIANT and
// FSP_VECTOR_BYTES.
#include "loss.h"
#include "sample.h"

namespace fsp::cpu::FSP_VARIANT {

void evaluate(const Pair& pair, int64_t sample, Scratch& scratch) {
  const Sample own(pair, sample, scratch);
  const View maps[4] = {view_of(own.pair, 0, 0), view_of(own.pair, 1, 0), view_of(own.pair, 2, 0),
                        view_of(own.pair, 3, 0)};
  const bool gram = pair.form == Form::gram;
  auto* evaluate_form = gram ? gram_form<float, double> : matrix_form<float>;
#ifdef __AVX512BF16__
  if (pair.bf16_products) evaluate_form = gram ? gram_form<TwoBf16, TwoBf16> : matrix_form<TwoBf16>;
#endif
  evaluate_form(own.pair, maps, 0, scratch);
  own.finish_gradients(pair, sample, scratch);
}

}  // namespace fsp::cpu::FSP_VARIANT
