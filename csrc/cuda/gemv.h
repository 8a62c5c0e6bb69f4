// Products of few rows with matrices: bound by reading the weights.
#pragma once
#include "cuda.h"
#include "operand.h"

namespace halfturn::cuda {

constexpr int kGemvRows = 64;     // the most rows
constexpr int kGemvTurn = 32;     // of these at a time, each time reading all weights
constexpr int kGemvMatrices = 3;  // the most matrices of one launch
constexpr int kTeam = 8;          // warps that share a pair of tiles
constexpr int kMostTeams = 2;     // of a block; more leave a warp too few registers, and each has its preparations
constexpr int kLargeTeam = 16;    // warps that share a pair where a block has one only, of at least
constexpr int kLargeTeamSteps = 96;
constexpr int kOwnRows = 2;    // the most rows of which every block makes an operand of its own
constexpr int kCopyTiles = 2;  // the most tiles of rows of which a block copies the operand

// Where a step's inputs come from: a ring that holds them beside its codes; an operand that the block makes of rows, or
// of rows that it norms; or a copy of the operand in the block's memory, where there is room for it and several pairs
// of tiles read it.
enum class From { kRing, kRows, kNormed, kCopy };

// Bytes of the inputs that a warp's ring has beside the codes of a step of 64 inputs, and of the ring: two steps of 8
// bits at least, three or four of 4 bits. Two teams with an operand of 16 KiB of their own fit 99 KiB; others fit it
// with one team, but for 32 rows of halves, which take two turns there.
constexpr int input_bytes(bool int8, int row_tiles) { return 8 * row_tiles * (int8 ? 64 : 128); }
constexpr int ring_bytes(int input_bytes) {
  return input_bytes == 0      ? 4608
         : input_bytes == 512  ? 6656
         : input_bytes == 1024 ? 8704
         : input_bytes == 2048 ? 9600
                               : 12544;
}

// Pairs of rows whose sums a team adds up together, and the bytes that a warp takes for them.
constexpr int row_pairs(From from) { return from == From::kRows || from == From::kNormed ? 1 : 4; }
constexpr int partial_bytes(From from) { return row_pairs(from) == 1 ? 2 * 256 : 4 * 256; }

// Chunks of 256 inputs of a row that one warp makes an operand of, where the row is normed and where not.
constexpr int kNormedChunks = 2, kRowChunks = 4;
constexpr int own_chunks(bool norm) { return norm ? kNormedChunks : kRowChunks; }

// Rows that are to become an operand: RMSNorm(x) * weight - mean, or x.
struct RowSource {
  const float* x = nullptr;  // [rows, stride]
  int64_t stride = 0;
  bool norm = false;
  const uint16_t* weight = nullptr;  // half; null for ones
  const uint16_t* mean = nullptr;    // half; null for zeros, as in f16 mode
  int size = 0;
  float epsilon = 0;
  const int32_t* chosen = nullptr;  // which rows of x, where not the first
  const float* maxima = nullptr;  // without a norm: largest magnitudes [rows, maxima_count] of parts of rows, if known
  int maxima_count = 0;
};

// outputs[m] = x W_m^T (+ bias) (+ what is there) for `count` matrices of the same input, of any widths, in one launch.
// int8 where x.codes is set, half otherwise. The order of a row's sums depends on the matrices alone. With a `source`
// (of at most kOwnRows rows) x has only its sizes, and every block makes the operand itself: one launch less, and
// weights are on their way meanwhile. The result is the same to the bit. `spare` multiprocessors are left to the blocks
// of the next kernel, which then start, and fetch what they need, before this one ends.
void gemv(const Cuda& device, const Matrix* matrices, const Output* outputs, int count, const Operand& x,
          const RowSource* source = nullptr, int spare = 0);
// Whether a block can make an operand of `rows` rows of `size` inputs, as a `source` asks for.
bool gemv_takes_rows(const Cuda& device, int64_t rows, int64_t size, bool norm, bool a8);

struct GemvParts {
  Matrix matrix[kGemvMatrices];
  Output output[kGemvMatrices];
  int end[kGemvMatrices];  // one behind the last block of each
};
// Of gemv.cuh, one instance per mode and number of rows (8, 16, 32), for all matrices (kGeneral). Those of int8 also
// for usual matrices (Matrix::usual) of one group: of any widths (kMixed), or of the width that kKind is. Less code
// does the same sooner: instructions that are far from a kernel's beginning, or from each other, come late in every
// launch. On an H100 a step of an 8B model gets 6% faster at 4 bits, 9% at 3 bits.
struct GemvForm {
  From from;
  // kLargeTeam warps share a pair: only kernels of usual matrices that have rows or a ring, for up to 16 rows.
  bool large_team;
  // Without decoding (planes.cuh): only for one row of which the blocks make an operand, and matrices of 2 bits alone.
  // In the kernel of any widths it made 3, 4 and 5 bits in a model 6% slower.
  bool counts;
};
using GemvKernel = void (*)(GemvParts, Operand, RowSource);
constexpr int kGeneral = 0, kMixed = 1;
template <bool kInt8, int kRowTiles, int kKind = kGeneral>
GemvKernel gemv_kernel(const GemvForm& form);

}  // namespace halfturn::cuda
