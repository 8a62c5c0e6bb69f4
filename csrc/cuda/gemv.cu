#include "gemv.h"

#include <algorithm>

#include "../check.h"
#include "launch.cuh"

namespace halfturn::cuda {

void gemv(const Cuda& device, const Matrix* matrices, const Output* outputs, int count, const Operand& x,
          const RowSource* source) {
  CHECK(count >= 1 && count <= kGemvMatrices && x.rows >= 1 && x.rows <= (source ? kOwnRows : kGemvRows),
        "a GEMV takes 1 to ", kGemvMatrices, " matrices and 1 to ", source ? kOwnRows : kGemvRows, " rows, not ", count,
        " and ", x.rows);
  CHECK(x.padded_steps % kPaddedSteps == 0 && x.padded_steps >= x.steps, "an operand of a GEMV has ", x.padded_steps,
        " steps, it must be a multiple of ", kPaddedSteps);
  const auto pairs = [](const Matrix& m) { return (m.out_tiles + 1) / 2; };
  int64_t all = 0;
  for (int i = 0; i < count; ++i) all += pairs(matrices[i]);
  const int row_pairs = x.rows >= 8 ? 4 : (x.rows + 1) / 2, row_tiles = x.rows <= 8 ? 1 : x.rows <= 16 ? 2 : 4;
  const bool a8 = x.codes != nullptr;
  const auto memory = [&](int warps) {
    return warps * (ring_bytes(source ? 0 : input_bytes(a8, row_tiles)) + 2 * kPartial * row_pairs) +
           (source ? x.rows * x.padded_steps * kStep * (a8 ? 1 : 2) : 0);
  };
  if (memory(8) > device.shared_memory()) {  // cards with less of it take 32 rows of halves in two turns
    CHECK(x.rows > 16 && !a8, "a GEMV needs ", memory(8), " bytes of shared memory, the card has ",
          device.shared_memory());
    Operand part = x;
    Output part_outputs[kGemvMatrices];
    std::copy_n(outputs, count, part_outputs);
    part.rows = 16;
    gemv(device, matrices, part_outputs, count, part);
    part.rows = x.rows - 16;
    part.values += 16 * kStep;
    for (Output& output : part_outputs) output.y += 16 * output.stride;
    return gemv(device, matrices, part_outputs, count, part);
  }

  // Blocks are of 16 warps where the card has room for that many a pair, otherwise of 8, which share out the pairs in
  // the fewest turns, evenly.
  const auto room = [&](int warps) {
    const int by_registers = (row_tiles == 1 ? 32 : 16) / warps;
    const int by_memory = (device.shared_memory() + 1024) / (memory(warps) + 256 + 1024);
    return int64_t(device.multiprocessors()) * std::min(by_registers, by_memory);
  };
  const int warps = all <= room(16) ? 16 : 8;
  const int64_t turns = (all + room(warps) - 1) / room(warps);
  GemvParts parts = {};
  parts.row_pairs = row_pairs;
  int blocks = 0;
  for (int i = 0; i < count; ++i) {
    parts.matrix[i] = matrices[i];
    parts.output[i] = outputs[i];
    blocks += int((pairs(matrices[i]) + turns - 1) / turns);
    parts.end[i] = blocks;
  }
  for (int i = count; i < kGemvMatrices; ++i) parts.end[i] = blocks;

  const GemvKernel kernel = x.rows <= 8    ? (a8 ? gemv_kernel<true, 1> : gemv_kernel<false, 1>)(source != nullptr)
                            : x.rows <= 16 ? (a8 ? gemv_kernel<true, 2> : gemv_kernel<false, 2>)(false)
                                           : (a8 ? gemv_kernel<true, 4> : gemv_kernel<false, 4>)(false);
  launch(device, "gemv", kernel, dim3(unsigned(blocks)), 32 * warps, size_t(memory(warps)), parts, x, source ? *source : RowSource{});
}

}  // namespace halfturn::cuda
