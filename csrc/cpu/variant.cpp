// The kernels for one instruction set. CMake compiles this file once for each, with FSP_VARIANT and
// FSP_VECTOR_BYTES.
#include "loss.h"

namespace fsp::cpu::FSP_VARIANT {

void evaluate(const Pair& pair, int64_t sample, Scratch& scratch) {
  const View maps[4] = {view_of(pair, 0, sample), view_of(pair, 1, sample),
                        view_of(pair, 2, sample), view_of(pair, 3, sample)};
  (pair.form == Form::gram ? gram_form : matrix_form)(pair, maps, sample, scratch);
}

}  // namespace fsp::cpu::FSP_VARIANT
