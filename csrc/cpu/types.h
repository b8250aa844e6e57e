// The arguments of the CPU kernels. They use no PyTorch: Python passes addresses and strides.
#pragma once

#include <cstdint>

namespace fsp::cpu {

enum class Scalar : uint8_t { fp32, fp16, bf16 };
enum class Residual : uint8_t { difference, direct, apart };
enum class Norm : uint8_t { squares, column };
enum class Form : uint8_t { matrix, gram };

// A map (B, C, K) or its gradient. Strides count elements. Without an address there is none.
struct Tensor {
  char* address;
  int64_t sample, row, column;
  Scalar scalar;
};

// From the spatial axes of a map to those that it is pooled to.
struct Pooling {
  int64_t size[3], pooled[3];
  bool average;  // else the maximum

  bool pools() const { return pooled[0] != 0; }
};

// One pair of a loss. The maps are a, b of the student and c, d of the teacher. If the pair is
// symmetric, b is a and d is c, and the gradient of a holds that of b.
struct Pair {
  Tensor maps[4], gradients[4];
  Pooling pooling[4];
  int64_t batch, m, n;
  int64_t positions[2];     // of the student's maps, of the teacher's maps, pooled
  const uint8_t* masks[2];  // the same, (B, positions); not 0 where a position counts; null: all do
  Residual residual;
  Norm norm;
  Form form;
  bool symmetric;
  bool bf16_products;  // all maps are bf16 and are multiplied as such
  double factor;   // of the sum of the losses of all samples
  double* losses;  // (B,)

  int64_t channels(int map) const { return map % 2 ? n : m; }
};

// Temporary memory of one thread. It is kept from call to call.
class Scratch {
 public:
  ~Scratch();
  // Memory until the next `clear`, aligned for vectors. Throws std::bad_alloc.
  void* take(int64_t bytes);
  void clear();

 private:
  struct Block;
  Block* last_ = nullptr;
  int64_t used_ = 0;
};

// Write the loss and the gradients of one sample of a pair.
using Evaluate = void (*)(const Pair& pair, int64_t sample, Scratch& scratch);

// One for each instruction set; see variant.cpp.
namespace baseline {
void evaluate(const Pair& pair, int64_t sample, Scratch& scratch);
}
namespace avx2 {
void evaluate(const Pair& pair, int64_t sample, Scratch& scratch);
}
namespace avx512 {
void evaluate(const Pair& pair, int64_t sample, Scratch& scratch);
}
namespace avx512_bf16 {
void evaluate(const Pair& pair, int64_t sample, Scratch& scratch);
}

}  // namespace fsp::cpu
