#include <algorithm>

#include "../check.h"
#include "gemm.h"

namespace halfturn::cuda {

bool hopper_takes([[maybe_unused]] const Cuda& device, [[maybe_unused]] const Matrix& matrix) {
#ifdef HALFTURN_NO_HOPPER
  return false;  // they are not built in
#else
  return device.capability() == 90 && matrix.groups == 1 && (matrix.bits < 8 || matrix.straight);
#endif
}

int hopper_tiling(const Cuda& device, const GemmParts& parts, const Operand& x) {
  int64_t across = 0;
  for (const Matrix& matrix : parts.matrix) across += (matrix.out_tiles + 7) / 8;
  const int64_t processors = device.multiprocessors();
  const int64_t large = across * ((x.rows + 255) / 256), small = across * ((x.rows + 127) / 128);
  // Fewer rows only in int8, where any order of sums gives the same, and with a block for every multiprocessor.
  if (x.rows < kHopperRows) return x.codes && small >= processors ? 1 : -1;
  if (4 * small < processors) return -1;
  // A small block alone on a multiprocessor takes as long as a large one; of two that share it, each takes longer.
  const int64_t turns = (large + processors - 1) / processors, mine = (small + processors - 1) / processors;
  const int64_t large_time = 16 * turns, small_time = std::max(17 * ((mine + 1) / 2), 10 * mine);
  return large_time <= small_time ? 0 : 1;
}

namespace {

bool share_a_launch(const Matrix& a, const Matrix& b) {
  return a.bits == b.bits && a.straight == b.straight && (a.groups == 1) == (b.groups == 1);
}

template <int kBits>
void gemm_of(const Cuda& device, const GemmParts& parts, const Operand& x, int tiling) {
#ifndef HALFTURN_NO_HOPPER
  if (hopper_takes(device, parts.matrix[0])) {
    const int hopper = tiling < 0 ? hopper_tiling(device, parts, x) : tiling - kGemmTilings;
    if (hopper >= 0 && hopper < kHopperTilings) return gemm_hopper<kBits>(device, parts, x, hopper);
  }
#endif
  gemm_any<kBits>(device, parts, x, tiling);
}

void gemm_parts(const Cuda& device, const GemmParts& parts, const Operand& x, int tiling) {
  switch (parts.matrix[0].bits) {
    case 2: return gemm_of<2>(device, parts, x, tiling);
    case 3: return gemm_of<3>(device, parts, x, tiling);
    case 4: return gemm_of<4>(device, parts, x, tiling);
    case 5: return gemm_of<5>(device, parts, x, tiling);
    case 6: return gemm_of<6>(device, parts, x, tiling);
    case 7: return gemm_of<7>(device, parts, x, tiling);
    case 8: return gemm_of<8>(device, parts, x, tiling);
  }
}

}  // namespace

void gemm(const Cuda& device, const Matrix* matrices, const Output* outputs, int count, const Operand& x, int tiling) {
  for (int first = 0; first < count;) {
    GemmParts parts;
    int taken = 0;
    while (taken < kGemmMatrices && first + taken < count && share_a_launch(matrices[first], matrices[first + taken])) {
      parts.matrix[taken] = matrices[first + taken];
      parts.output[taken] = outputs[first + taken];
      ++taken;
    }
    gemm_parts(device, parts, x, tiling);
    first += taken;
  }
}

}  // namespace halfturn::cuda
