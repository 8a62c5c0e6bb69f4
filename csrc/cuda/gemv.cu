#include <algorithm>

#include "../check.h"
#include "gemv.h"
#include "launch.cuh"

namespace halfturn::cuda {

namespace {

int64_t pairs_of(const Matrix& m) { return (m.out_tiles + 1) / 2; }

// Pairs of tiles a multiprocessor from which on its block copies the operand, once and not again for each pair.
constexpr int kCopyPairs = 2;

// Clocks that a multiprocessor takes for a step of 64 inputs of a pair: to read it, or to decode it and multiply up to
// 8 rows, whichever is longer. Decoding was measured on an H100 (bench_kernels.py, at 4 and 8 bits only bounded by it).
double step_clocks(const Cuda& device, int bits, int row_tiles) {
  constexpr double kDecoding[] = {42, 71, 80, 139, 142, 173, 140}, kMoreRows[] = {0, 0, 8, 0, 45};
  return std::max(256 * bits / (0.9 * device.bytes_per_clock()), kDecoding[bits - 2] + kMoreRows[row_tiles]);
}

// Shares out `most` blocks among the matrices, at least one and at most one a pair each, so that the longest block is
// short: a block with one pair less is what counts. What is left goes where blocks have most to do on average.
void share_blocks(const Cuda& device, const Matrix* matrices, int count, int most, int row_tiles,
                  int (&blocks)[kGemvMatrices]) {
  double clocks[kGemvMatrices];  // of a pair, which all have as many steps
  for (int i = 0; i < count; ++i) clocks[i] = step_clocks(device, matrices[i].bits, row_tiles);
  std::fill_n(blocks, count, 1);
  int left = most - count;
  const auto longest = [&](auto pairs_of_block) {
    int found = 0;
    for (int i = 1; i < count; ++i)
      if (clocks[i] * pairs_of_block(i) > clocks[found] * pairs_of_block(found)) found = i;
    return found;
  };
  const auto most_pairs = [&](int i) { return (pairs_of(matrices[i]) + blocks[i] - 1) / blocks[i]; };
  const auto mean_pairs = [&](int i) {
    return blocks[i] < pairs_of(matrices[i]) ? double(pairs_of(matrices[i])) / blocks[i] : 0.0;
  };
  while (true) {
    const int i = longest(most_pairs);
    const int64_t fewer = most_pairs(i) - 1;
    if (fewer == 0) break;
    const int more = int((pairs_of(matrices[i]) + fewer - 1) / fewer) - blocks[i];
    if (more > left) break;
    blocks[i] += more, left -= more;
  }
  for (; left > 0; --left) {
    const int i = longest(mean_pairs);
    if (mean_pairs(i) == 0) break;
    ++blocks[i];
  }
}

// Bytes of shared memory that a block needs.
int block_bytes(From from, int teams, int row_tiles, bool a8, int rows, int padded_steps) {
  const int rows_there = from == From::kRing ? 0 : from == From::kCopy ? 8 * row_tiles : rows;
  return teams * kTeam * (ring_bytes(from == From::kRing ? input_bytes(a8, row_tiles) : 0) + partial_bytes(from)) +
         rows_there * padded_steps * kStep * (a8 ? 1 : 2);
}
int bytes_of_room(const Cuda& device) { return device.shared_memory() - 1024; }  // the rest is of fixed size

// Teams whose warps hold a row of so many steps.
int teams_of_row(int padded_steps, bool norm) {
  const int inputs_of_team = own_chunks(norm) * 256 * kTeam;
  return (padded_steps * kStep + inputs_of_team - 1) / inputs_of_team;
}

template <int kRowTiles>
GemvKernel usual_kernel(const Matrix* matrices, int count, const GemvForm& form) {
  constexpr GemvKernel (*kOfWidth[])(const GemvForm&) = {
      gemv_kernel<true, kRowTiles, 2>, gemv_kernel<true, kRowTiles, 3>, gemv_kernel<true, kRowTiles, 4>,
      gemv_kernel<true, kRowTiles, 5>, gemv_kernel<true, kRowTiles, 6>, gemv_kernel<true, kRowTiles, 7>,
      gemv_kernel<true, kRowTiles, 8>};
  const int bits = matrices[0].bits;
  const bool alike = std::all_of(matrices, matrices + count, [&](const Matrix& m) { return m.bits == bits; });
  return (alike ? kOfWidth[bits - 2] : gemv_kernel<true, kRowTiles, kMixed>)(form);
}

template <int kRowTiles>
GemvKernel kernel_of(bool a8, bool usual, const Matrix* matrices, int count, const GemvForm& form) {
  // The rows of several tiles are 2 to 4% faster at 2 and 3 bits in the kernel of all widths, as the compiler has it.
  const bool better = kRowTiles == 1 || form.large_team ||
                      std::any_of(matrices, matrices + count, [](const Matrix& m) { return m.bits > 3; });
  if (usual && better) return usual_kernel<kRowTiles>(matrices, count, form);
  return (a8 ? gemv_kernel<true, kRowTiles> : gemv_kernel<false, kRowTiles>)({form.from, false, false});
}

}  // namespace

bool gemv_takes_rows(const Cuda& device, int64_t rows, int64_t size, bool norm, bool a8) {
  const int steps = pad_steps((size + kStep - 1) / kStep), teams = teams_of_row(steps, norm);
  return rows <= kOwnRows && teams <= kMostTeams &&
         block_bytes(norm ? From::kNormed : From::kRows, teams, 1, a8, int(rows), steps) <= bytes_of_room(device);
}

void gemv(const Cuda& device, const Matrix* matrices, const Output* outputs, int count, const Operand& x,
          const RowSource* source, int spare) {
  CHECK(count >= 1 && count <= kGemvMatrices && x.rows >= 1 && x.rows <= (source ? kOwnRows : kGemvRows),
        "a GEMV takes 1 to ", kGemvMatrices, " matrices and 1 to ", source ? kOwnRows : kGemvRows, " rows, not ", count,
        " and ", x.rows);
  CHECK(x.padded_steps % kPaddedSteps == 0 && x.padded_steps >= x.steps, "an operand of a GEMV has ", x.padded_steps,
        " steps, it must be a multiple of ", kPaddedSteps);
  const bool a8 = x.codes != nullptr;
  const auto tiles_of = [](int rows) { return rows <= 8 ? 1 : rows <= 16 ? 2 : 4; };  // of 8 rows
  const int room = bytes_of_room(device);
  const auto memory = [&](From from, int teams, int row_tiles) {
    return block_bytes(from, teams, row_tiles, a8, x.rows, x.padded_steps);
  };
  const From without_copy = !source ? From::kRing : source->norm ? From::kNormed : From::kRows;
  int turn = std::min(x.rows, kGemvTurn);
  if (turn > 16 && memory(without_copy, 1, tiles_of(turn)) > room) turn = 16;  // of halves, on cards with less of it
  if (turn < x.rows) {
    for (int first = 0; first < x.rows; first += turn) {
      Operand part = x;
      Output part_outputs[kGemvMatrices];
      std::copy_n(outputs, count, part_outputs);
      part.rows = std::min(turn, x.rows - first);
      if (a8) part.codes += first * kStep, part.scales += first;
      else part.values += first * kStep;
      for (Output& output : part_outputs) output.y += first * output.stride;
      gemv(device, matrices, part_outputs, count, part, nullptr, spare);
    }
    return;
  }
  const int row_tiles = tiles_of(x.rows);
  const int least_teams = source ? teams_of_row(x.padded_steps, source->norm) : 1;
  CHECK(least_teams <= kMostTeams, "a GEMV can't make an operand of a row of ", source->size, " values");
  const int least = memory(without_copy, least_teams, row_tiles);
  CHECK(least <= room, "a GEMV needs ", least, " bytes of shared memory, the card has ", room);

  // One block a multiprocessor at most. It has a team for each pair, as far as there is room, and as many as hold a row
  // to be made an operand of. Of a single pair of many steps all warps are one team: a row's sums of integers don't
  // depend on it.
  int64_t pairs = 0;
  for (int i = 0; i < count; ++i) pairs += pairs_of(matrices[i]);
  const int processors = std::max(1, device.multiprocessors() - spare);
  int teams = int(std::clamp<int64_t>((pairs + processors - 1) / processors, least_teams, kMostTeams));
  const bool usual =
      a8 && std::all_of(matrices, matrices + count, [](const Matrix& m) { return m.usual && m.groups == 1; });
  const bool large = usual && row_tiles <= kCopyTiles && without_copy != From::kNormed && pairs <= processors &&
                     x.steps >= kLargeTeamSteps && memory(without_copy, kLargeTeam / kTeam, row_tiles) <= room;
  if (large) teams = kLargeTeam / kTeam;
  const bool copies = !source && a8 && row_tiles <= kCopyTiles && pairs >= kCopyPairs * processors &&
                      memory(From::kCopy, teams, row_tiles) <= room;
  const From from = copies ? From::kCopy : without_copy;
  while (teams > least_teams && memory(from, teams, row_tiles) > room) --teams;
  const int shared = memory(from, teams, row_tiles);

  GemvParts parts = {};
  int blocks[kGemvMatrices] = {}, all = 0;
  share_blocks(device, matrices, count, processors, row_tiles, blocks);
  for (int i = 0; i < kGemvMatrices; ++i) {
    if (i < count) parts.matrix[i] = matrices[i], parts.output[i] = outputs[i];
    parts.end[i] = all += blocks[i];
  }

  // Tensor cores of compute capability 10.0 and up don't count.
  const bool counts =
      source && x.rows == 1 && device.capability() < 100 &&
      std::all_of(matrices, matrices + count, [](const Matrix& m) { return m.bits != 2 || m.mirrored; });
  const auto choose = row_tiles == 1 ? kernel_of<1> : row_tiles == 2 ? kernel_of<2> : kernel_of<4>;
  const GemvKernel kernel = choose(a8, usual, matrices, count, {from, large, counts});
  launch(device, "gemv", kernel, dim3(unsigned(all)), 32 * kTeam * teams, size_t(shared), parts, x,
         source ? *source : RowSource{});
}

}  // namespace halfturn::cuda
