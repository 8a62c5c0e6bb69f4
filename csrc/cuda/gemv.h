// Products of few rows with matrices: bound by reading the weights.
#pragma once
#include "cuda.h"
#include "operand.h"

namespace halfturn::cuda {

constexpr int kGemvRows = 32;     // the most rows
constexpr int kGemvMatrices = 3;  // the most matrices of one launch
constexpr int kGemvThreads = 256;
constexpr int kOwnRows = 2;  // the most rows of which every block makes an operand of its own

// Rows that are to become an operand: RMSNorm(x) * weight, or x where there is no weight.
struct RowSource {
  const float* x = nullptr;  // [rows, stride]
  int64_t stride = 0;
  const uint16_t* weight = nullptr;  // half
  int size = 0;
  float epsilon = 0;
};

// outputs[m] = x W_m^T (+ bias) (+ what is there) for `count` matrices of the same input, of any widths, in one launch.
// int8 where x.codes is set, half otherwise. The order of a row's sums depends on the matrices alone. With a `source`
// (of at most kOwnRows rows) x has only its sizes, and every block makes the operand itself: one launch less, and
// weights are on their way meanwhile. The result is the same to the bit.
void gemv(const Cuda& device, const Matrix* matrices, const Output* outputs, int count, const Operand& x,
          const RowSource* source = nullptr);

struct GemvParts {
  Matrix matrix[kGemvMatrices];
  Output output[kGemvMatrices];
  int end[kGemvMatrices];  // one behind the last block of each
};
// Of gemv.cuh, one instance per mode and number of rows (8, 16, 32).
using GemvKernel = void (*)(GemvParts, Operand, RowSource);
template <bool kInt8, int kRowTiles>
GemvKernel gemv_kernel(bool own);

}  // namespace halfturn::cuda
