// Blocks take turns at the tiles of 16 outputs, for up to 8, 16 or 32 rows. A block's warps share out the steps of 64
// inputs and keep the codes of several steps in flight, across the borders of tiles too, read straight into registers.
// Tensor cores multiply, as decoding is what costs: it happens once for all rows, in stretches without a branch, since
// only then are there enough independent instructions. Partial sums meet in shared memory, in the order of the warps.
#pragma once
#include "decode.cuh"
#include "gemv.h"
#include "launch.cuh"
#include "row_operand.cuh"

namespace halfturn::cuda {

constexpr int kWarps = kGemvThreads / 32;

// One lane's activations of one step and eight rows: words i of its tile, in half two words each.
template <bool kInt8>
struct Inputs {
  uint32_t w[kInt8 ? 4 : 8];
  __device__ void load(const uint4* p) {
    const uint4 a = p[0];
    w[0] = a.x, w[1] = a.y, w[2] = a.z, w[3] = a.w;
    if constexpr (!kInt8) {
      const uint4 b = p[1];
      w[4] = b.x, w[5] = b.y, w[6] = b.z, w[7] = b.w;
    }
  }
  __device__ void keep(bool yes) {
    for (uint32_t& v : w) v = yes ? v : 0;
  }
};

template <bool kInt8>
using Sum = std::conditional_t<kInt8, int, float>;

// sums[n] += one step.
template <int kBits, bool kInt8, int kRowTiles>
__device__ inline void multiply(const Table<kBits>& table, const Codes<kBits>& codes,
                                const Inputs<kInt8> (&x)[kRowTiles], Sum<kInt8> (&sums)[kRowTiles][4]) {
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    Run first, second;
    table.decode(codes, pair, first, second);
    if constexpr (kInt8) {
#pragma unroll
      for (int n = 0; n < kRowTiles; ++n) mma(sums[n], first, second, x[n].w[2 * pair], x[n].w[2 * pair + 1]);
    } else {
      const HalfRun a(first), b(second);
#pragma unroll
      for (int n = 0; n < kRowTiles; ++n) {
        mma(sums[n], a, x[n].w[4 * pair], x[n].w[4 * pair + 1]);
        mma(sums[n], b, x[n].w[4 * pair + 2], x[n].w[4 * pair + 3]);
      }
    }
  }
}

// The block's own operand in shared memory, [steps, rows, 64], and the scales of its rows.
template <bool kInt8>
__device__ inline void make_operand(const RowSource& source, const Operand& x, uint8_t* memory, float* scales,
                                    float2 (*parts)[32]) {
  const int lane = int(threadIdx.x) & 31, warp = int(threadIdx.x) >> 5;
  const int chunks = (source.size + 255) / 256, all = (x.padded_steps * kStep + 255) / 256;
  if (threadIdx.x < 32 * x.rows) parts[threadIdx.x / 32][lane] = {0, 0};
  __syncthreads();
  // Values are kept in registers between the two passes where a warp has one chunk, and read again otherwise.
  float v[8];
  const auto compute = [&](int row, int chunk, float& squares) {
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const int e = 256 * chunk + (32 * q + lane) * 4;
      float4 a = {0, 0, 0, 0};
      if (e < source.size) {
        a = *reinterpret_cast<const float4*>(source.x + row * source.stride + e);
        if (source.weight) a = weighted(a, source.weight + e, squares);
      }
      v[4 * q] = a.x, v[4 * q + 1] = a.y, v[4 * q + 2] = a.z, v[4 * q + 3] = a.w;
    }
  };
  for (int row = 0; row < x.rows; ++row)
    for (int slot = warp; slot < 32; slot += kWarps) {  // chunk c belongs to slot c % 32, as in rows.cu
      float squares = 0, largest = 0;
      for (int chunk = slot; chunk < chunks; chunk += 32) {
        compute(row, chunk, squares);
#pragma unroll
        for (int i = 0; i < 8; ++i) largest = fmaxf(largest, fabsf(v[i]));
      }
      squares = shuffle_sum(squares);
      largest = shuffle_max(largest);
      if (lane == 0) parts[row][slot] = {squares, largest};
    }
  __syncthreads();
  for (int row = 0; row < x.rows; ++row) {
    const float2 part = parts[row][lane];
    const RowScale scale = row_scale(part.x, part.y, source.weight != nullptr, source.size, source.epsilon);
    if (threadIdx.x == 0) scales[row] = scale.scale;
    for (int chunk = warp; chunk < all; chunk += kWarps) {
      float unused = 0;
      if (chunks > kWarps || x.rows > 1 || chunk >= chunks) compute(row, chunk, unused);
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        const int e = 256 * chunk + (32 * q + lane) * 4;
        if (e >= x.padded_steps * kStep) break;
        const int64_t at = operand_at(e, row, x.rows);
        if constexpr (kInt8) put_codes(reinterpret_cast<int8_t*>(memory) + at, v + 4 * q, scale.inverse);
        else put_halves(reinterpret_cast<uint16_t*>(memory) + at, v + 4 * q, scale.factor);
      }
    }
  }
  __syncthreads();
}

template <int kBits, bool kInt8, int kRowTiles, bool kOwn>
__device__ void gemv_block(const Matrix& m, const Output& out, const Operand& x, const RowSource& source, int block,
                           int blocks, float* partial, uint8_t* memory, uint8_t* own) {
  // Turns of a warp that are decoded without a branch, and how many such stretches are in registers.
  constexpr int kTurns = kBits <= 4 ? 2 : 1;
  constexpr int kSets = kRowTiles > 1 ? 2 : kBits == 2 ? 4 : kBits == 3 ? 3 : kBits == 4 ? 2 : kBits == 8 ? 2 : 3;
  static_assert(kPaddedSteps % (kWarps * kTurns) == 0);
  constexpr uint32_t kTileBytes = 32 * kBits;
  constexpr int kPieces = kInt8 ? 4 : 8;  // of 16 bytes in a row of one step
  const int lane = int(threadIdx.x) & 31, warp = int(threadIdx.x) >> 5;
  const int g = lane >> 2, c = lane & 3;
  const int in_tiles = int(m.in_tiles), out_tiles = int(m.out_tiles), steps = x.steps;
  const int stretches = x.padded_steps / (kWarps * kTurns);  // of a warp at one tile; inputs behind `steps` are zero
  const uint32_t row_bytes = uint32_t(out_tiles) * kTileBytes;
  const auto* const bytes = reinterpret_cast<const uint8_t*>(m.codes);

  // The place of the next codes to load. What lies behind the last input tile is not read: its inputs are zero, so any
  // other tile does in its place.
  Codes<kBits> codes[kSets][kTurns];
  int next = 0, next_tile = block;
  const auto load_next = [&](Codes<kBits>(&to)[kTurns]) {
    if (next_tile >= out_tiles) return;  // the same for all threads of the block
    const int k = 4 * (warp + next * (kWarps * kTurns)) + c;
    const uint8_t* const tile = bytes + uint32_t(next_tile) * kTileBytes;
#pragma unroll
    for (int a = 0; a < kTurns; ++a)
      to[a].load(reinterpret_cast<const uint32_t*>(tile + uint32_t(min(k + 4 * kWarps * a, in_tiles - 1)) * row_bytes),
                 g);
    if (++next == stretches) next = 0, next_tile += blocks;
  };
#pragma unroll
  for (int i = 0; i < kSets; ++i) load_next(codes[i]);
  Table<kBits> table;
  table.read(m.levels, kInt8 ? 0 : 0x80, memory, m.straight);
  wait_for_previous();

  // Rows that don't exist repeat the last one: nobody reads their sums.
  const uint4* rows[kRowTiles];
  const float* row_scales = x.scales;
  int step_pieces;  // from one step to the next
  if constexpr (kOwn) {
    auto* const scales = reinterpret_cast<float*>(own);
    make_operand<kInt8>(source, x, own + 16, scales, reinterpret_cast<float2(*)[32]>(partial));
    row_scales = scales;
    step_pieces = x.rows * kPieces;
    rows[0] = reinterpret_cast<const uint4*>(own + 16) + min(g, x.rows - 1) * kPieces + c * (kPieces / 4);
  } else {
    if constexpr (Table<kBits>::kShared) __syncthreads();
    step_pieces = x.rows_padded * kPieces;
    const auto* all = kInt8 ? reinterpret_cast<const uint4*>(x.codes) : reinterpret_cast<const uint4*>(x.values);
#pragma unroll
    for (int n = 0; n < kRowTiles; ++n) rows[n] = all + min(8 * n + g, x.rows - 1) * kPieces + c * (kPieces / 4);
  }
  Inputs<kInt8> inputs[kTurns][kRowTiles];
  const auto load_inputs = [&](Inputs<kInt8>(&to)[kRowTiles], int step) {
#pragma unroll
    for (int n = 0; n < kRowTiles; ++n) to[n].load(rows[n] + step * step_pieces);
  };

  // partial [2][kWarps][4][32 lanes]: eight rows of one tile at a time, in two places by turns.
  int place = 0, set = 0;
  for (int tile = block; tile < out_tiles; tile += blocks) {
    float scale = 1.0f;  // of the output that this thread adds up below
    if (const int output = 16 * tile + g + 8 * (int(threadIdx.x) >> 6); m.groups == 1 && output < int(m.out))
      if (threadIdx.x < 128) scale = __half2float(__ushort_as_half(m.scales[output]));

    Sum<kInt8> sums[kRowTiles][4] = {};
    if (m.groups == 1) {
      for (int stretch = 0; stretch < stretches; ++stretch) {
#pragma unroll
        for (int a = 0; a < kTurns; ++a) load_inputs(inputs[a], warp + (stretch * kTurns + a) * kWarps);
#pragma unroll
        for (int i = 0; i < kSets; ++i)
          if (set == i) {  // the same for all threads; registers can't be chosen at run time
#pragma unroll
            for (int a = 0; a < kTurns; ++a) multiply<kBits, kInt8, kRowTiles>(table, codes[i][a], inputs[a], sums);
            load_next(codes[i]);
          }
        set = set == kSets - 1 ? 0 : set + 1;
      }
    } else {  // group by group: sums of one group in `mine`, scaled sums as floats
      const int group_tiles = in_tiles / int(m.groups);
      float scaled[kRowTiles][4] = {};
#pragma unroll 1
      for (int step = warp; step < steps; step += kWarps) {
        const uint8_t* const tiles = bytes + uint32_t(tile) * kTileBytes;
        codes[0][0].load(
            reinterpret_cast<const uint32_t*>(tiles + uint32_t(min(4 * step + c, in_tiles - 1)) * row_bytes), g);
        const int last = min(4 * step + 3, in_tiles - 1) / group_tiles;
#pragma unroll 1
        for (int group = 4 * step / group_tiles; group <= last; ++group) {
          load_inputs(inputs[0], step);
#pragma unroll
          for (int n = 0; n < kRowTiles; ++n) inputs[0][n].keep((4 * step + c) / group_tiles == group);
          Sum<kInt8> mine[kRowTiles][4] = {};
          multiply<kBits, kInt8, kRowTiles>(table, codes[0][0], inputs[0], mine);
          const uint16_t* scales = m.scales + int64_t(group) * 16 * out_tiles + 16 * tile + g;
          const float low = __half2float(__ushort_as_half(scales[0])), high = __half2float(__ushort_as_half(scales[8]));
#pragma unroll
          for (int n = 0; n < kRowTiles; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) scaled[n][i] += float(mine[n][i]) * (i < 2 ? low : high);
        }
      }
#pragma unroll
      for (int n = 0; n < kRowTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if constexpr (kInt8) sums[n][i] = __float_as_int(scaled[n][i]);
          else sums[n][i] = scaled[n][i];
    }

#pragma unroll
    for (int n = 0; n < kRowTiles; ++n) {
      if (8 * n >= x.rows) break;
      float* const here = partial + place * (kWarps * 128);
      place ^= 1;
      if (8 * n + 2 * c < x.rows)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if constexpr (kInt8) here[warp * 128 + 32 * i + lane] = __int_as_float(sums[n][i]);
          else here[warp * 128 + 32 * i + lane] = sums[n][i];
        }
      __syncthreads();
      const int i = int(threadIdx.x), row = 8 * n + 2 * c + ((i >> 5) & 1), output = 16 * tile + g + 8 * (i >> 6);
      if (i >= 128 || row >= x.rows || output >= int(m.out)) continue;
      float value = 0;
      int sum = 0;
      for (int w = 0; w < kWarps; ++w)
        if (kInt8 && m.groups == 1) sum += __float_as_int(here[w * 128 + i]);
        else value += here[w * 128 + i];
      if (kInt8 && m.groups == 1) value = float(sum);
      // Each rounding is its own, as in the GEMM: a row's result must not depend on how many rows there are.
      value = __fmul_rn(value, kInt8 ? __fmul_rn(row_scales[row], scale) : scale);
      if (m.bias) value = __fadd_rn(value, m.bias[output]);
      float* y = out.y + row * out.stride + output;
      *y = out.add ? __fadd_rn(*y, value) : value;
    }
  }
}

template <bool kInt8, int kRowTiles, bool kOwn>
__global__ void __launch_bounds__(32 * kWarps, kRowTiles == 1 ? 3 : 2)
    gemv_any(const __grid_constant__ GemvParts parts, const __grid_constant__ Operand x,
             const __grid_constant__ RowSource source) {
  __shared__ __align__(16) float partial[2 * kWarps * 128];
  __shared__ __align__(16) uint8_t memory[256];
  extern __shared__ __align__(16) uint8_t own[];
  let_next_start();
  int part = 0;
  while (part + 1 < kGemvMatrices && int(blockIdx.x) >= parts.end[part]) ++part;
  const Matrix& m = parts.matrix[part];
  const Output& out = parts.output[part];
  const int first = part ? parts.end[part - 1] : 0, block = int(blockIdx.x) - first, blocks = parts.end[part] - first;
#define HALFTURN_WIDTH(bits) \
  case bits: return gemv_block<bits, kInt8, kRowTiles, kOwn>(m, out, x, source, block, blocks, partial, memory, own);
  switch (m.bits) {
    HALFTURN_WIDTH(2)
    HALFTURN_WIDTH(3)
    HALFTURN_WIDTH(4)
    HALFTURN_WIDTH(5)
    HALFTURN_WIDTH(6)
    HALFTURN_WIDTH(7)
    HALFTURN_WIDTH(8)
  }
#undef HALFTURN_WIDTH
}

}  // namespace halfturn::cuda
