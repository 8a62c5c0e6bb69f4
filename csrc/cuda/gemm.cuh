// One block computes a tile of outputs x rows. Copies of the packed codes and of the activations run some steps of 64
// inputs ahead, through stages in shared memory. Each warp has 16 or 32 outputs and all rows of the tile, so that no
// code is decoded twice; while the tensor cores multiply one fragment, the next is decoded into registers.
//
// A row's sum runs over the steps in order within one accumulator, so it is the same for every tiling (in int8 any
// order would do, and small tiles share out the steps among warps).
#pragma once
#include <algorithm>
#include <type_traits>

#include "copies.cuh"
#include "decode.cuh"
#include "gemm.h"
#include "launch.cuh"

namespace halfturn::cuda {

struct GemmArguments {
  GemmParts parts;
  Operand x;
  int end[kGemmMatrices];  // blocks of outputs, counted through all matrices: one behind the last of each
  int row_blocks;
};

template <int kBits_, bool kHalf_, int kOutWarps_, int kTiles_, int kRows_, int kSplit_>
struct Tiling {
  static constexpr int kBits = kBits_, kOutWarps = kOutWarps_, kRows = kRows_;
  static constexpr bool kHalf = kHalf_;
  static constexpr int kTiles = kTiles_;  // of 16 outputs, of a warp
  static constexpr int kSplit = kSplit_;  // how many groups of warps take turns at the steps
  static_assert(kSplit == 1 || !kHalf, "the order of half's sums is fixed");
  static constexpr int kThreads = 32 * kOutWarps * kSplit, kRowTiles = kRows / 8, kOutTiles = kOutWarps * kTiles;

  // One step in shared memory: four runs of kOutTiles tiles, then rows of 64 inputs. The runs are shifted against each
  // other so that the four lanes of a group, each of which reads from another run, meet in no bank.
  static constexpr int kTileBytes = 32 * kBits, kRunBytes = kOutTiles * kTileBytes;
  static constexpr int kWeightBytes = 4 * kRunBytes + 128;
  static constexpr int kRowBytes = kHalf ? 128 : 64;
  static constexpr int kStepBytes = kWeightBytes + kRows * kRowBytes, kStageBytes = kSplit * kStepBytes;
  static_assert(kRunBytes % 128 == 0);
  __device__ static int run_at(int c) { return c * kRunBytes + (kBits == 8 ? (c & 1) * 16 + (c >> 1) * 64 : c * 32); }

  static constexpr int kTableBytes = 256;
  static constexpr int kMost = (99 << 10) - kTableBytes;  // what cards of 8.6 and 8.9 have
  static constexpr int kStages = kMost / kStageBytes < 4 ? kMost / kStageBytes : 4;
  static_assert(kStages >= 3);

  // The epilogue's buffers take the place of the stages: 16 rows of each warp, and the sums of warps that split.
  static constexpr int kPitch = 16 * kTiles + 4;  // floats; a fragment's four rows of one lane group meet in no bank
  static constexpr int kBufferBytes = kOutWarps * 16 * kPitch * 4;
  static constexpr int kSumBytes = (kSplit - 1) * kOutTiles * 16 * kRows * 4;
  static constexpr int kSharedBytes = kTableBytes + std::max(kStages * kStageBytes, kBufferBytes + kSumBytes);
};

template <bool kHalf>
using GemmSum = std::conditional_t<kHalf, float, int>;

// What one lane's mmas take of one tile: in int8 a step at a time, in half one pair of runs, half a step.
template <bool kHalf>
struct Fragment {
  Run runs[4];
  template <int kBits>
  __device__ void decode(const Table<kBits>& table, const Codes<kBits>& codes, int pair) {
    table.decode(codes, pair, runs[2 * pair], runs[2 * pair + 1]);
  }
};
template <>
struct Fragment<true> {
  HalfRun first = HalfRun(Run{0, 0}), second = HalfRun(Run{0, 0});
  template <int kBits>
  __device__ void decode(const Table<kBits>& table, const Codes<kBits>& codes, int pair) {
    Run a, b;
    table.decode(codes, pair, a, b);
    first = HalfRun(a), second = HalfRun(b);
  }
};

// Which matrix a block has, and which of its blocks of outputs and of rows.
struct GemmPlace {
  int part = 0, out_block, row_block;

  // Blocks that run together share both weights and activations: up to 16 row blocks of the same outputs, then the next
  // outputs, and only then further rows.
  __device__ explicit GemmPlace(const GemmArguments& a) {
    constexpr int kAcross = 16;
    const int slab_blocks = kAcross * a.end[kGemmMatrices - 1];
    const int slab = int(blockIdx.x) / slab_blocks, rest = int(blockIdx.x) % slab_blocks;
    const int width = min(kAcross, a.row_blocks - slab * kAcross);
    out_block = rest / width;
    row_block = slab * kAcross + rest % width;
    while (part + 1 < kGemmMatrices && out_block >= a.end[part]) ++part;
    if (part) out_block -= a.end[part - 1];
  }
};

// A block's tile, and its copies.
template <class T>
struct GemmBlock {
  const char* codes;  // the first tile of the block, of the first input tile
  const char* values;
  int64_t codes_stride, values_stride;  // bytes: one input tile on, one step on
  int part, first_tile, first_row, in_tiles, steps, code_chunks, value_chunks;

  __device__ explicit GemmBlock(const GemmArguments& a) {
    const GemmPlace place(a);
    const Matrix& matrix = a.parts.matrix[place.part];
    part = place.part;
    first_tile = place.out_block * T::kOutTiles;
    first_row = place.row_block * T::kRows;
    in_tiles = int(a.parts.matrix[0].in_tiles), steps = a.x.steps;
    codes_stride = matrix.out_tiles * T::kTileBytes;
    codes = reinterpret_cast<const char*>(matrix.codes) + int64_t(first_tile) * T::kTileBytes;
    code_chunks = min(T::kOutTiles, int(matrix.out_tiles) - first_tile) * (T::kTileBytes / 16);
    values_stride = int64_t(a.x.rows_padded) * T::kRowBytes;
    values = T::kHalf ? reinterpret_cast<const char*>(a.x.values) : reinterpret_cast<const char*>(a.x.codes);
    values += int64_t(first_row) * T::kRowBytes;
    value_chunks = min(T::kRows, a.x.rows_padded - first_row) * (T::kRowBytes / 16);
  }

  // What lies beyond the matrix or the rows is not copied: whatever is there instead, it meets inputs of zero, or goes
  // to outputs and rows that are not stored.
  __device__ void copy_codes(char* stage, int iteration) const {
    constexpr int kLanes = T::kThreads / 4;  // of one run
    const int c = int(threadIdx.x) / kLanes, lane = int(threadIdx.x) % kLanes;
#pragma unroll
    for (int s = 0; s < T::kSplit; ++s) {
      const int tile = 4 * (iteration * T::kSplit + s) + c;
      const char* from = codes + tile * codes_stride;
      char* to = stage + s * T::kStepBytes + T::run_at(c);
#pragma unroll
      for (int i = 0; i < (T::kRunBytes / 16 + kLanes - 1) / kLanes; ++i) {
        const int chunk = lane + i * kLanes;
        if (tile < in_tiles && chunk < code_chunks) copy_16(to + 16 * chunk, from + 16 * chunk);
      }
    }
  }
  // In half, the two 16-byte pieces of a lane change places in odd rows: eight lanes that read at once meet in no bank.
  __device__ void copy_values(char* stage, int iteration) const {
#pragma unroll
    for (int s = 0; s < T::kSplit; ++s) {
      const int step = iteration * T::kSplit + s;
      const char* from = values + step * values_stride;
      char* to = stage + s * T::kStepBytes + T::kWeightBytes;
      constexpr int kChunks = T::kRows * T::kRowBytes / 16;
#pragma unroll
      for (int i = 0; i < (kChunks + T::kThreads - 1) / T::kThreads; ++i) {
        const int chunk = int(threadIdx.x) + i * T::kThreads;
        const int place = T::kHalf ? chunk ^ ((chunk >> 3) & 1) : chunk;
        if (step < steps && chunk < value_chunks) copy_16(to + 16 * place, from + 16 * chunk);
      }
    }
  }
  __device__ void start_codes(char* stages) const {
#pragma unroll
    for (int i = 0; i < T::kStages - 1; ++i) copy_codes(stages + i * T::kStageBytes, i);
  }
  __device__ void start_values(char* stages) const {
#pragma unroll
    for (int i = 0; i < T::kStages - 1; ++i) {
      copy_values(stages + i * T::kStageBytes, i);
      commit_copies();
    }
  }
};

// Where a lane reads the activations of eight rows: 16 bytes, in int8 all of its tile, in half two runs.
template <class T>
__device__ inline const char* lane_values(const char* step, int g, int c, int pair) {
  return step + T::kWeightBytes + g * T::kRowBytes + (T::kHalf ? ((2 * c + pair) ^ (g & 1)) * 16 : c * 16);
}

// Writes 16 * kTiles outputs x kRows rows of one warp. Through shared memory: neighbouring lanes write neighbouring
// outputs. No multiplication is fused with an addition, as the GEMV must get the same.
template <class T, bool kGrouped, class Sum>
__device__ void store(const GemmArguments& a, const GemmBlock<T>& block, int out_warp, float* buffer,
                      const Sum (&sums)[T::kTiles][T::kRowTiles][4]) {
  const int lane = int(threadIdx.x) & 31, g = lane >> 2, c = lane & 3;
  const int in_warp = lane & (16 * T::kTiles - 1);
  const int output = 16 * (block.first_tile + out_warp * T::kTiles) + in_warp;
  const Matrix& matrix = a.parts.matrix[block.part];
  const Output& out = a.parts.output[block.part];
  const bool valid = output < int(matrix.out);
  const float scale = valid && !kGrouped ? __half2float(__ushort_as_half(matrix.scales[output])) : 1.0f;
  const bool has_bias = matrix.bias != nullptr, add = out.add;
  const float bias = valid && has_bias ? matrix.bias[output] : 0.0f;
  float* const y = out.y + output;
  const int64_t stride = out.stride;
#pragma unroll
  for (int n = 0; n < T::kRowTiles; n += 2) {
    const int first = block.first_row + 8 * n;
    if (first >= a.x.rows) return;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int t = 0; t < T::kTiles; ++t)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          float* at = buffer + (8 * i + 2 * c + (r & 1)) * T::kPitch + 16 * t + g + 8 * (r >> 1);
          if constexpr (std::is_same_v<Sum, int>) *at = __int2float_rn(sums[t][n + i][r]);
          else *at = sums[t][n + i][r];
        }
    __syncwarp();
    // Eight rows are read before the first is written: a write would hold up the reads behind it, as it might be to
    // where they read.
#pragma unroll
    for (int t = 0; t < T::kTiles; ++t) {
      // With 16 outputs a warp takes two rows at once, four apart: they meet in no bank.
      const auto row = [&](int j) { return T::kTiles == 2 ? 8 * t + j : (j & 3) + 8 * (j >> 2) + 4 * (lane >> 4); };
      const auto there = [&](int j) { return valid && first + row(j) < a.x.rows; };
      float factor[8], old[8] = {};
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        factor[j] = T::kHalf || !there(j) ? 1.0f : a.x.scales[first + row(j)];
        if (add && there(j)) old[j] = y[(first + row(j)) * stride];
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        float value = __fmul_rn(buffer[row(j) * T::kPitch + in_warp], __fmul_rn(factor[j], scale));
        if (has_bias) value = __fadd_rn(value, bias);
        if (there(j)) y[(first + row(j)) * stride] = add ? __fadd_rn(old[j], value) : value;
      }
    }
  }
}

template <class T, bool kStraight>
__global__ void __launch_bounds__(T::kThreads, T::kTiles == 2 ? 1 : 512 / T::kThreads)
    gemm_kernel(const __grid_constant__ GemmArguments a) {
  constexpr bool kHalf = T::kHalf;
  constexpr int kPhases = kHalf ? 2 : 1, kUnits = kHalf ? T::kTiles : 2 * T::kTiles;  // units of decoding in a phase
  HALFTURN_LAUNCHED_MEMORY(char, 128, shared);
  char* stages = shared + T::kTableBytes;
  let_next_start();
  const int lane = int(threadIdx.x) & 31, warp = int(threadIdx.x) >> 5;
  const int g = lane >> 2, c = lane & 3, out_warp = warp % T::kOutWarps, turn = warp / T::kOutWarps;
  const GemmBlock<T> block(a);
  block.start_codes(stages);
  Table<T::kBits> table;  // behind the copies, as it waits for its reads
  table.read(a.parts.matrix[block.part].levels, kHalf ? 0x80 : 0, reinterpret_cast<uint8_t*>(shared), kStraight);
  wait_for_previous();
  block.start_values(stages);

  const int code_offset = T::run_at(c) + out_warp * T::kTiles * T::kTileBytes;
  Codes<T::kBits> codes[T::kTiles];
  const auto read_codes = [&](const char* step) {
#pragma unroll
    for (int t = 0; t < T::kTiles; ++t)
      codes[t].load_shared(reinterpret_cast<const uint32_t*>(step + code_offset + t * T::kTileBytes), g);
  };
  Fragment<kHalf> now[T::kTiles], next[T::kTiles];
  const auto decode = [&](Fragment<kHalf>(&to)[T::kTiles], int unit, int pair) {
    if constexpr (kHalf) to[unit].decode(table, codes[unit], pair);
    else to[unit / 2].decode(table, codes[unit / 2], unit % 2);
  };

  wait_for_copies<T::kStages - 2>();
  __syncthreads();
  read_codes(stages + turn * T::kStepBytes);
#pragma unroll
  for (int u = 0; u < kUnits; ++u) decode(now, u, 0);

  GemmSum<kHalf> sums[T::kTiles][T::kRowTiles][4] = {};
  const int iterations = (block.steps + T::kSplit - 1) / T::kSplit;
  int slot = 0, free_slot = T::kStages - 1;
  for (int iteration = 0; iteration < iterations; ++iteration) {
    wait_for_copies<T::kStages - 3>();  // the next step's codes are there too
    __syncthreads();                    // everyone's; and everyone is done with the slot before this one
    block.copy_codes(stages + free_slot * T::kStageBytes, iteration + T::kStages - 1);
    block.copy_values(stages + free_slot * T::kStageBytes, iteration + T::kStages - 1);
    commit_copies();
    const char* step = stages + slot * T::kStageBytes + turn * T::kStepBytes;
    free_slot = slot;
    slot = slot + 1 == T::kStages ? 0 : slot + 1;
    const char* next_step = stages + slot * T::kStageBytes + turn * T::kStepBytes;  // behind the last: anything
    if (T::kSplit > 1 && iteration * T::kSplit + turn >= block.steps) break;

#pragma unroll
    for (int phase = 0; phase < kPhases; ++phase) {
      if (phase == kPhases - 1) read_codes(next_step);
      const char* values = lane_values<T>(step, g, c, phase);
#pragma unroll
      for (int n = 0; n < T::kRowTiles; n += 2) {
        uint4 b[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) b[i] = *reinterpret_cast<const uint4*>(values + (n + i) * 8 * T::kRowBytes);
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int t = 0; t < T::kTiles; ++t)
            if constexpr (kHalf) mma(sums[t][n + i], now[t].first, b[i].x, b[i].y);
            else mma(sums[t][n + i], now[t].runs[0], now[t].runs[1], b[i].x, b[i].y);
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int t = 0; t < T::kTiles; ++t)
            if constexpr (kHalf) mma(sums[t][n + i], now[t].second, b[i].z, b[i].w);
            else mma(sums[t][n + i], now[t].runs[2], now[t].runs[3], b[i].z, b[i].w);
        // A share of the next fragment's decoding.
#pragma unroll
        for (int u = n * kUnits / T::kRowTiles; u < (n + 2) * kUnits / T::kRowTiles; ++u)
          decode(next, u, (phase + 1) % kPhases);
      }
#pragma unroll
      for (int t = 0; t < T::kTiles; ++t) now[t] = next[t];
    }
  }
  wait_for_copies<0>();
  __syncthreads();

  if constexpr (T::kSplit > 1) {
    auto* others = reinterpret_cast<int*>(stages + T::kBufferBytes);  // [turn - 1][value][warp][lane]
    constexpr int kValues = T::kTiles * T::kRowTiles * 4;
    const auto at = [&](int from, int value) -> int& {
      return others[((from - 1) * kValues + value) * 32 * T::kOutWarps + out_warp * 32 + lane];
    };
    int* mine = &sums[0][0][0];
    if (turn > 0)
#pragma unroll
      for (int i = 0; i < kValues; ++i) at(turn, i) = mine[i];
    __syncthreads();
    if (turn > 0) return;
#pragma unroll
    for (int from = 1; from < T::kSplit; ++from)
#pragma unroll
      for (int i = 0; i < kValues; ++i) mine[i] += at(from, i);
  }
  store<T, false>(a, block, out_warp, reinterpret_cast<float*>(stages) + out_warp * 16 * T::kPitch, sums);
}

// Matrices of several groups along the input, of any number of tiles. Sums of one group become floats when it ends.
template <class T>
__global__ void __launch_bounds__(T::kThreads, 2) gemm_grouped_kernel(const __grid_constant__ GemmArguments a) {
  constexpr bool kHalf = T::kHalf;
  constexpr int kPairs = kHalf ? 2 : 1;
  static_assert(T::kSplit == 1);
  HALFTURN_LAUNCHED_MEMORY(char, 128, shared);
  char* stages = shared + T::kTableBytes;
  let_next_start();
  const int lane = int(threadIdx.x) & 31, out_warp = int(threadIdx.x) >> 5;
  const int g = lane >> 2, c = lane & 3;
  const GemmBlock<T> block(a);
  const Matrix& matrix = a.parts.matrix[block.part];
  block.start_codes(stages);
  Table<T::kBits> table;
  table.read(matrix.levels, kHalf ? 0x80 : 0, reinterpret_cast<uint8_t*>(shared), matrix.straight);
  wait_for_previous();
  block.start_values(stages);

  const int in_tiles = block.in_tiles, out_tiles = int(matrix.out_tiles);
  const int group_tiles = in_tiles / int(matrix.groups), warp_tile = block.first_tile + out_warp * T::kTiles;
  GemmSum<kHalf> sums[T::kTiles][T::kRowTiles][4] = {};
  float totals[T::kTiles][T::kRowTiles][4] = {};
  int slot = 0, free_slot = T::kStages - 1;
  for (int i = 0; i < block.steps; ++i) {
    wait_for_copies<T::kStages - 2>();
    __syncthreads();
    block.copy_codes(stages + free_slot * T::kStageBytes, i + T::kStages - 1);
    block.copy_values(stages + free_slot * T::kStageBytes, i + T::kStages - 1);
    commit_copies();
    const char* step = stages + slot * T::kStageBytes;
    free_slot = slot;
    slot = slot + 1 == T::kStages ? 0 : slot + 1;

    Codes<T::kBits> codes[T::kTiles];
    Fragment<kHalf> fragments[kPairs][T::kTiles];
#pragma unroll
    for (int t = 0; t < T::kTiles; ++t) {
      codes[t].load_shared(
          reinterpret_cast<const uint32_t*>(step + T::run_at(c) + (out_warp * T::kTiles + t) * T::kTileBytes), g);
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) fragments[pair % kPairs][t].decode(table, codes[t], pair);
    }
    const int end_tile = min(4 * i + 4, in_tiles);
    for (int group = 4 * i / group_tiles; group * group_tiles < end_tile; ++group) {
      const int tile = 4 * i + c, begin = group * group_tiles, end = begin + group_tiles;
      const uint32_t mask = tile >= begin && tile < end ? ~0u : 0u;
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair)
#pragma unroll
        for (int n = 0; n < T::kRowTiles; ++n) {
          const uint4 b = *reinterpret_cast<const uint4*>(lane_values<T>(step, g, c, pair) + n * 8 * T::kRowBytes);
#pragma unroll
          for (int t = 0; t < T::kTiles; ++t) {
            const Fragment<kHalf>& f = fragments[pair][t];
            if constexpr (kHalf) {
              mma(sums[t][n], f.first, b.x & mask, b.y & mask);
              mma(sums[t][n], f.second, b.z & mask, b.w & mask);
            } else {
              mma(sums[t][n], f.runs[0], f.runs[1], b.x & mask, b.y & mask);
              mma(sums[t][n], f.runs[2], f.runs[3], b.z & mask, b.w & mask);
            }
          }
        }
      if (end > end_tile) break;  // it goes on in the next step
#pragma unroll
      for (int t = 0; t < T::kTiles; ++t) {
        const uint16_t* scales = matrix.scales + (int64_t(group) * out_tiles + warp_tile + t) * 16 + g;
        const bool there = warp_tile + t < out_tiles;
        const float low = there ? __half2float(__ushort_as_half(scales[0])) : 0.0f;
        const float high = there ? __half2float(__ushort_as_half(scales[8])) : 0.0f;
#pragma unroll
        for (int n = 0; n < T::kRowTiles; ++n)
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            totals[t][n][r] = __fmaf_rn(float(sums[t][n][r]), r < 2 ? low : high, totals[t][n][r]);
            sums[t][n][r] = 0;
          }
      }
    }
  }
  wait_for_copies<0>();
  __syncthreads();
  store<T, true>(a, block, out_warp, reinterpret_cast<float*>(stages) + out_warp * 16 * T::kPitch, totals);
}

// --- Launching. ---

// Blocks of outputs that all matrices take together; `end` gets those up to each one's last.
template <class T>
int out_blocks(const GemmParts& parts, int* end = nullptr) {
  int blocks = 0;
  for (int i = 0; i < kGemmMatrices; ++i) {
    blocks += int((parts.matrix[i].out_tiles + T::kOutTiles - 1) / T::kOutTiles);
    if (end) end[i] = blocks;
  }
  return blocks;
}

// About how many cycles a step takes, summed over the blocks that a multiprocessor gets.
template <class T>
int64_t cost(const Cuda& device, const GemmParts& parts, const Operand& x) {
  const int64_t blocks = int64_t(out_blocks<T>(parts)) * ((x.rows + T::kRows - 1) / T::kRows);
  const int64_t mine = (blocks + device.multiprocessors() - 1) / device.multiprocessors();
  const int64_t resident = T::kTiles == 2 ? 1 : 512 / T::kThreads;
  const int64_t multiply = T::kOutTiles * T::kRowTiles * (T::kHalf ? 6 : 3);
  const int64_t busy = multiply + T::kOutTiles * (T::kBits <= 4 ? 7 : 14) + 40;
  const int64_t alone = std::max<int64_t>(busy, 250 / T::kSplit);  // what waiting for each other costs at least
  return std::max((mine + resident - 1) / resident * alone, mine * busy);
}

template <class T, class Kernel>
void launch_gemm(const Cuda& device, Kernel kernel, const GemmParts& parts, const Operand& x) {
  GemmArguments a = {parts, x, {}, (x.rows + T::kRows - 1) / T::kRows};
  const int64_t blocks = int64_t(out_blocks<T>(parts, a.end)) * a.row_blocks;
  if (blocks) launch(device, "gemm", kernel, dim3(unsigned(blocks)), T::kThreads, T::kSharedBytes, a);
}

template <int kBits, bool kHalf, bool kStraight>
void gemm_tilings(const Cuda& device, const GemmParts& parts, const Operand& x, int tiling) {
  constexpr int kSplit = kHalf ? 1 : 2;
  using A = Tiling<kBits, kHalf, 8, 2, 128, 1>;
  using B = Tiling<kBits, kHalf, 8, 2, 64, 1>;
  using C = Tiling<kBits, kHalf, 4, 1, 64, kSplit>;
  using D = Tiling<kBits, kHalf, 4, 1, 32, kSplit>;
  if (tiling < 0) {
    const int64_t costs[kGemmTilings] = {cost<A>(device, parts, x), cost<B>(device, parts, x),
                                         cost<C>(device, parts, x), cost<D>(device, parts, x)};
    tiling = int(std::min_element(costs, costs + kGemmTilings) - costs);
  }
  switch (tiling) {
    case 0: return launch_gemm<A>(device, gemm_kernel<A, kStraight>, parts, x);
    case 1: return launch_gemm<B>(device, gemm_kernel<B, kStraight>, parts, x);
    case 2: return launch_gemm<C>(device, gemm_kernel<C, kStraight>, parts, x);
    case 3: return launch_gemm<D>(device, gemm_kernel<D, kStraight>, parts, x);
  }
  CHECK(false, "tiling is ", tiling, ", expected 0 to ", kGemmTilings - 1);
}

template <int kBits, bool kHalf>
void gemm_mode(const Cuda& device, const GemmParts& parts, const Operand& x, int tiling) {
  if (parts.matrix[0].groups > 1) {
    using T = Tiling<kBits, kHalf, 4, 1, 64, 1>;
    return launch_gemm<T>(device, gemm_grouped_kernel<T>, parts, x);
  }
  if constexpr (kBits == 8) {
    if (parts.matrix[0].straight) return gemm_tilings<kBits, kHalf, true>(device, parts, x, tiling);
    using T = Tiling<kBits, kHalf, 4, 1, 64, kHalf ? 1 : 2>;  // rare: one tiling is enough
    launch_gemm<T>(device, gemm_kernel<T, false>, parts, x);
  } else {
    gemm_tilings<kBits, kHalf, false>(device, parts, x, tiling);
  }
}

template <int kBits>
void gemm_any(const Cuda& device, const GemmParts& parts, const Operand& x, int tiling) {
  if (x.codes) gemm_mode<kBits, false>(device, parts, x, tiling);
  else gemm_mode<kBits, true>(device, parts, x, tiling);
}

}  // namespace halfturn::cuda
