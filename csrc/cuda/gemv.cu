#include "gemv.h"
#include "launch.cuh"

namespace halfturn::cuda {

void gemv(const Cuda& device, const Matrix* matrices, const Output* outputs, int count, const Operand& x,
          const RowSource* source) {
  CHECK(count >= 1 && count <= kGemvMatrices && x.rows >= 1 && x.rows <= (source ? kOwnRows : kGemvRows),
        "a GEMV takes 1 to ", kGemvMatrices, " matrices and 1 to ", source ? kOwnRows : kGemvRows, " rows, not ", count,
        " and ", x.rows);
  CHECK(x.padded_steps % kPaddedSteps == 0 && x.padded_steps >= x.steps, "an operand of a GEMV has ", x.padded_steps,
        " steps, it must be a multiple of ", kPaddedSteps);
  int64_t tiles = 0;
  for (int i = 0; i < count; ++i) tiles += matrices[i].out_tiles;

  // Three blocks fit a multiprocessor; the fewest turns that the tiles take on all of them, shared out evenly.
  const int64_t most = 3 * device.multiprocessors(), turns = (tiles + most - 1) / most;
  GemvParts parts = {};
  int blocks = 0;
  for (int i = 0; i < count; ++i) {
    parts.matrix[i] = matrices[i];
    parts.output[i] = outputs[i];
    blocks += int((matrices[i].out_tiles + turns - 1) / turns);
    parts.end[i] = blocks;
  }
  for (int i = count; i < kGemvMatrices; ++i) parts.end[i] = blocks;

  const bool a8 = x.codes != nullptr;
  const size_t own = source ? 16 + size_t(x.rows * x.padded_steps * kStep * (a8 ? 1 : 2)) : 0;
  const GemvKernel kernel = x.rows <= 8    ? (a8 ? gemv_kernel<true, 1> : gemv_kernel<false, 1>)(source != nullptr)
                            : x.rows <= 16 ? (a8 ? gemv_kernel<true, 2> : gemv_kernel<false, 2>)(false)
                                           : (a8 ? gemv_kernel<true, 4> : gemv_kernel<false, 4>)(false);
  launch(device, "gemv", kernel, dim3(unsigned(blocks)), kGemvThreads, own, parts, x, source ? *source : RowSource{});
}

}  // namespace halfturn::cuda
