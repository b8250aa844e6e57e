// The kernels for one instruction set. CMake compiles this file once for each, with FSP_VARIANT and
// FSP_VECTOR_BYTES.
#include "loss.h"
#include "mask.h"

namespace fsp::cpu::FSP_VARIANT {

void evaluate(const Pair& pair, int64_t sample, Scratch& scratch) {
  const CountedSample own(pair, sample, scratch);
  const View maps[4] = {view_of(own.pair, 0, 0), view_of(own.pair, 1, 0), view_of(own.pair, 2, 0),
                        view_of(own.pair, 3, 0)};
  (pair.form == Form::gram ? gram_form : matrix_form)(own.pair, maps, 0, scratch);
  own.finish_gradients(pair, sample, scratch);
}

}  // namespace fsp::cpu::FSP_VARIANT
