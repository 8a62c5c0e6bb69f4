// Products of many rows with matrices: bound by the tensor cores.
#pragma once
#include "cuda.h"
#include "operand.h"

namespace halfturn::cuda {

constexpr int kGemmMatrices = 3;   // the most matrices of one launch
constexpr int kGemmTilings = 4;    // block sizes of gemm.cuh: 256 x 128, 256 x 64, 64 x 64 and 64 x 32 outputs x rows
constexpr int kHopperTilings = 2;  // those of hopper/gemm_hopper.cuh, numbered behind them: 128 x 256 and 128 x 128
constexpr int kHopperRows = 256;   // from which on they are considered for all products

// outputs[m] = x W_m^T (+ bias) (+ what is there) for `count` matrices of the same input, of any widths: int8 where
// x.codes is set, half otherwise. Neighbours of one width share a launch, so that small matrices fill the card
// together. A row's results depend on nothing but the row: not on the other matrices, and not on the tiling either, but
// that in half the kernels of 9.0 add up in another order. `tiling` is for tests and measurements, -1 picks one.
void gemm(const Cuda& device, const Matrix* matrices, const Output* outputs, int count, const Operand& x,
          int tiling = -1);

// The matrices of one launch: of one width, all straight or none, all of one group or none. Behind the last: none.
struct GemmParts {
  Matrix matrix[kGemmMatrices];
  Output output[kGemmMatrices];
};
// Of gemm.cuh, one instance a width; tiling: 0 to kGemmTilings - 1, or -1.
template <int kBits>
void gemm_any(const Cuda& device, const GemmParts& parts, const Operand& x, int tiling);
// Of hopper/gemm_hopper.cuh, only where hopper_takes() says so; tiling: 0 or 1.
template <int kBits>
void gemm_hopper(const Cuda& device, const GemmParts& parts, const Operand& x, int tiling);

// Whether the kernels of compute capability 9.0 can multiply with this matrix.
bool hopper_takes(const Cuda& device, const Matrix& matrix);
// Their tiling for as many rows, 0 or 1; -1 where the others are better.
int hopper_tiling(const Cuda& device, const GemmParts& parts, const Operand& x);

}  // namespace halfturn::cuda
