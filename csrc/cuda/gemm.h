// Products of many rows with matrices: bound by the tensor cores.
#pragma once
#include "cuda.h"
#include "operand.h"

namespace halfturn::cuda {

constexpr int kGemmTilings = 4;    // block sizes of gemm.cuh: 256 x 128, 256 x 64, 64 x 64 and 64 x 32 outputs x rows
constexpr int kHopperTilings = 2;  // those of hopper/gemm_hopper.cuh, numbered behind them: 128 x 256 and 128 x 128
constexpr int kHopperRows = 256;   // from which on they are considered

// y = x W^T (+ bias) (+ y if out.add), for x.rows rows: int8 where x.codes is set, half otherwise. A row's results
// depend on nothing but the row, and not on the tiling either, but that in half the two files add up in another order:
// `tiling` is for tests and measurements, -1 picks one.
template <int kBits>
void gemm(const Cuda& device, const Matrix& matrix, const Operand& x, const Output& out, int tiling = -1);
extern template void gemm<2>(const Cuda&, const Matrix&, const Operand&, const Output&, int);
extern template void gemm<3>(const Cuda&, const Matrix&, const Operand&, const Output&, int);
extern template void gemm<4>(const Cuda&, const Matrix&, const Operand&, const Output&, int);
extern template void gemm<5>(const Cuda&, const Matrix&, const Operand&, const Output&, int);
extern template void gemm<6>(const Cuda&, const Matrix&, const Operand&, const Output&, int);
extern template void gemm<7>(const Cuda&, const Matrix&, const Operand&, const Output&, int);
extern template void gemm<8>(const Cuda&, const Matrix&, const Operand&, const Output&, int);

inline void gemm(const Cuda& device, const Matrix& matrix, const Operand& x, const Output& out, int tiling = -1) {
  switch (matrix.bits) {
    case 2: return gemm<2>(device, matrix, x, out, tiling);
    case 3: return gemm<3>(device, matrix, x, out, tiling);
    case 4: return gemm<4>(device, matrix, x, out, tiling);
    case 5: return gemm<5>(device, matrix, x, out, tiling);
    case 6: return gemm<6>(device, matrix, x, out, tiling);
    case 7: return gemm<7>(device, matrix, x, out, tiling);
    case 8: return gemm<8>(device, matrix, x, out, tiling);
  }
}

// Whether the kernels of compute capability 9.0 can multiply with this matrix.
inline bool hopper_takes([[maybe_unused]] const Cuda& device, [[maybe_unused]] const Matrix& matrix) {
#ifdef HALFTURN_NO_HOPPER
  return false;  // they are not built in
#else
  return device.capability() == 90 && matrix.groups == 1 && (matrix.bits < 8 || matrix.straight);
#endif
}
// Their tiling for as many rows, 0 or 1; -1 where the others are better.
inline int hopper_tiling(const Cuda& device, const Matrix& matrix, const Operand& x) {
  const int64_t processors = device.multiprocessors(), across = (matrix.out_tiles + 7) / 8;
  const int64_t large = across * ((x.rows + 255) / 256), small = across * ((x.rows + 127) / 128);
  if (x.rows < kHopperRows || 4 * small < processors) return -1;
  // Small blocks read and decode twice as much for a product.
  const int64_t large_time = 16 * ((large + processors - 1) / processors);
  const int64_t small_time = 10 * ((small + processors - 1) / processors);
  return large_time <= small_time ? 0 : 1;
}
// Only where hopper_takes() says so. tiling: 0 or 1.
template <int kBits>
void gemm_hopper(const Cuda& device, const Matrix& matrix, const Operand& x, const Output& out, int tiling);

}  // namespace halfturn::cuda
