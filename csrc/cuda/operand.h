// Activations as products read them, and where products write.
#pragma once
#include <cstdint>

namespace halfturn::cuda {

constexpr int kStep = 64;         // inputs of one step along a product: four tiles
constexpr int kPaddedSteps = 16;  // few rows are filled up with zeros to a multiple of this many steps
constexpr int pad_steps(int64_t steps) { return int((steps + kPaddedSteps - 1) / kPaddedSteps * kPaddedSteps); }

// Rows of inputs, cut into steps of 64 that stand one after the other: [steps, rows_padded, 64]. Within a step, the 16
// inputs of each of its four tiles are in the order 0 1 8 9, 2 3 10 11, 4 5 12 13, 6 7 14 15, so that the codes of one
// lane of a tensor-core fragment (FORMAT.md) meet the word beside it. Inputs of padding are zero; rows of padding hold
// anything, as no other row depends on them.
struct Operand {
  int8_t* codes = nullptr;        // a8
  float* scales = nullptr;        // a8: [rows_padded], value = code * scale
  uint16_t* values = nullptr;     // f16: half
  int rows = 0, rows_padded = 0;  // a multiple of 8
  int steps = 0;
  int padded_steps = 0;  // with those of zeros: a multiple of kPaddedSteps for a GEMV, `steps` otherwise
};

// y[row * stride + output], float32; `add` adds to what is there.
struct Output {
  float* y = nullptr;
  int64_t stride = 0;
  bool add = false;
};

}  // namespace halfturn::cuda
