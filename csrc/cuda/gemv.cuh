// A block takes turns at pairs of tiles (32 outputs), for up to 8, 16 or 32 rows. Its warps share out the steps of 64
// inputs; each has a ring of steps on their way from memory to shared memory, which runs on across the borders of
// pairs, and is full before the kernel waits for the one ahead of it: a launch then costs the memory hardly a pause.
// Tensor cores multiply, as decoding is what costs: it happens once for all rows. Partial sums meet in shared memory,
// in the order of the warps.
#pragma once
#include "decode.cuh"
#include "gemv.h"
#include "kv_codes.cuh"
#include "launch.cuh"
#include "row_operand.cuh"

namespace halfturn::cuda {

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
  // In the order of PartedRuns: the even elements of two runs, then the odd ones.
  __device__ void part() {
#pragma unroll
    for (int i = 0; i < (kInt8 ? 4 : 8); i += kInt8 ? 2 : 4) {
      if constexpr (kInt8) {
        const uint32_t even = permute(w[i], w[i + 1], 0x6420), odd = permute(w[i], w[i + 1], 0x7531);
        w[i] = even, w[i + 1] = odd;
      } else {
        const uint32_t a = permute(w[i], w[i + 1], 0x5410), b = permute(w[i + 2], w[i + 3], 0x5410);
        const uint32_t c = permute(w[i], w[i + 1], 0x7632), d = permute(w[i + 2], w[i + 3], 0x7632);
        w[i] = a, w[i + 1] = b, w[i + 2] = c, w[i + 3] = d;
      }
    }
  }
  __device__ void keep(bool yes) {
    for (uint32_t& v : w) v = yes ? v : 0;
  }
};

// A step of a pair of tiles: four rows of two tiles, one row for each c of the lanes (g, c).
template <int kBits>
struct Pair {
  static constexpr int kRow = 64 * kBits, kPitch = kRow + 32;  // bytes; lanes that read together meet no bank twice
  static constexpr int kBytes = 4 * kPitch;
  static constexpr int kRowPieces = kRow / 16, kPieces = (4 * kRowPieces + 31) / 32;  // of 16 bytes; of a lane
  static constexpr bool kParted = kBits < 4;
  Codes<kBits> codes[2];

  // row: in shared memory. Of small widths a lane reads 16 bytes of one tile, which are of two neighbouring outputs;
  // otherwise the same place of both tiles.
  __device__ void load(const uint8_t* row, int g) {
    if constexpr (kParted) {
      const uint8_t* tile = row + (g >> 2) * (32 * kBits);
      const uint4 two = reinterpret_cast<const uint4*>(tile)[g & 3];
      codes[0].two[0] = two.x, codes[0].two[1] = two.y, codes[1].two[0] = two.z, codes[1].two[1] = two.w;
      if constexpr (kBits == 3) {
        const uint2 one = reinterpret_cast<const uint2*>(tile + 64)[g & 3];
        codes[0].one = one.x, codes[1].one = one.y;
      }
    } else {
#pragma unroll
      for (int q = 0; q < 2; ++q) codes[q].load_shared(reinterpret_cast<const uint32_t*>(row + q * (32 * kBits)), g);
    }
  }
  // Of the pair's 32 outputs, the lower one that lane (g, c) has in codes[q]; the other is 8 behind.
  __device__ static int output(int q, int g) {
    return kParted ? 16 * (g >> 2) + 2 * (g & 3) + q : 16 * q + g;
  }
};

template <bool kInt8>
using Sum = std::conditional_t<kInt8, int, float>;

// sums[n] += one step of one of the two tiles.
template <int kBits, bool kInt8, int kRowTiles>
__device__ inline void multiply(const Table<kBits>& table, const Codes<kBits>& codes,
                                const Inputs<kInt8> (&x)[kRowTiles], Sum<kInt8> (&sums)[kRowTiles][4]) {
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    Run first, second;
    if constexpr (Pair<kBits>::kParted) table.decode_parted(codes, pair, first, second);
    else table.decode(codes, pair, first, second);
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

// The block's own operand in shared memory, [steps, rows, 64], and the scales of its rows. Where there is a norm, rows
// have up to 32 chunks of 256 inputs: their sums are added in the order of rows.cu.
template <bool kInt8, bool kNorm>
__device__ inline void make_operand(const RowSource& source, const Operand& x, uint8_t* memory, float* scales,
                                    float2 (*parts)[32]) {
  constexpr int kBatch = kNorm ? 2 : 4;  // chunks of a warp whose loads are under way together
  const int lane = int(threadIdx.x) & 31, warp = int(threadIdx.x) >> 5, warps = int(blockDim.x) >> 5;
  const int inputs = x.padded_steps * kStep, all = (inputs + 255) / 256;
  float4 v[kBatch][2];
  const auto compute = [&](const float* from, int first, float(&squares)[kBatch]) {
    uint2 weight[kBatch][2];
#pragma unroll
    for (int b = 0; b < kBatch; ++b)
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        const int e = 256 * (first + b * warps) + (32 * q + lane) * 4;
        v[b][q] = {0, 0, 0, 0};
        weight[b][q] = {0, 0};
        if (e >= source.size) continue;
        v[b][q] = *reinterpret_cast<const float4*>(from + e);
        if constexpr (kNorm) weight[b][q] = *reinterpret_cast<const uint2*>(source.weight + e);
      }
    if constexpr (kNorm) {
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        squares[b] = 0;
#pragma unroll
        for (int q = 0; q < 2; ++q) v[b][q] = weighted(v[b][q], weight[b][q], squares[b]);
      }
    }
  };
  const bool once = warp + kBatch * warps >= all;
  for (int row = 0; row < x.rows; ++row) {
    const float* const from = source.x + (source.chosen ? source.chosen[row] : row) * source.stride;
    float largest = 0, squares[kBatch];
    if (warp == 0) parts[row][lane] = {0, 0};
    __syncthreads();
    for (int first = warp; first < all; first += kBatch * warps) {
      compute(from, first, squares);
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
#pragma unroll
        for (int q = 0; q < 2; ++q)
          largest = fmaxf(fmaxf(fmaxf(largest, fabsf(v[b][q].x)), fmaxf(fabsf(v[b][q].y), fabsf(v[b][q].z))),
                          fabsf(v[b][q].w));
        if constexpr (kNorm) {
          const float sum = shuffle_sum(squares[b]);
          if (lane == 0 && first + b * warps < 32) parts[row][first + b * warps].x = sum;
        }
      }
    }
    largest = shuffle_max(largest);
    if (lane == 0) parts[row][warp].y = largest;
    __syncthreads();
    const float2 part = parts[row][lane];
    const RowScale scale = row_scale(part.x, part.y, kNorm, source.size, source.epsilon);
    if (threadIdx.x == 0) scales[row] = scale.scale;
    for (int first = warp; first < all; first += kBatch * warps) {
      if (!once) compute(from, first, squares);
#pragma unroll
      for (int b = 0; b < kBatch; ++b)
#pragma unroll
        for (int q = 0; q < 2; ++q) {
          const int e = 256 * (first + b * warps) + (32 * q + lane) * 4;
          if (e >= inputs) continue;
          const int64_t at = operand_at(e, row, x.rows);
          if constexpr (kInt8) put_codes(reinterpret_cast<int8_t*>(memory) + at, v[b][q], scale.inverse);
          else put_halves(reinterpret_cast<uint16_t*>(memory) + at, v[b][q], scale.factor);
        }
    }
  }
}

template <bool kInt8, int kRowTiles, bool kOwn>
struct GemvSizes {
  static constexpr int kInputs = kOwn ? 0 : input_bytes(kInt8, kRowTiles), kRing = ring_bytes(kInputs);
};

// Codes on their way from memory to a warp's ring, step by step, and inputs with them where the block has no operand of
// its own. A lane copies pieces of 16 bytes of one of a step's four rows of tiles, 128 bytes apart. Tiles behind the
// last input are left out: their inputs are zero, so whatever is in the ring does in their place.
template <int kBits, int kInputBytes>
struct Ring {
  using Step = Pair<kBits>;
  static constexpr int kRing = ring_bytes(kInputBytes), kBytes = Step::kBytes + kInputBytes, kStages = kRing / kBytes;
  static_assert(kStages >= 2);

  uint8_t* memory;
  int slot = 0, warp, warps, lane;

  __device__ Ring(const Matrix& m, int steps, uint8_t* start, int block, int all_blocks)
      // Through a shuffle, so that the compiler knows it to be the same in all lanes and keeps it out of their registers.
      : warp(__shfl_sync(~0u, int(threadIdx.x) >> 5, 0)),
        warps(int(blockDim.x) >> 5),
        lane(int(threadIdx.x) & 31),
        codes_(reinterpret_cast<const uint8_t*>(m.codes)),
        out_tiles_(int(m.out_tiles)),
        next_pair_(block),
        blocks_(all_blocks),
        row_bytes_(uint32_t(m.out_tiles) * (32 * kBits)),
        limit_(int(m.in_tiles) - (lane >> 3)),
        bytes_(Step::kRow - (lane & 7) * 16) {
    memory = start + warp * kRing;
    end_tile_ = 4 * (warp + turns(steps) * warps);
    begin_pair();
  }
  // Of every warp at one pair; inputs behind the last step are zero.
  __device__ int turns(int steps) const { return (steps + warps - 1) / warps; }

  __device__ void start_codes() const {  // into the slot
    const uint32_t to = uint32_t(__cvta_generic_to_shared(memory)) + uint32_t((lane >> 3) * Step::kPitch + (lane & 7) * 16);
    const bool inside = tile_ < limit_;
#pragma unroll
    for (int i = 0; i < (kBits + 1) / 2; ++i)
      if (inside && 128 * i < bytes_)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + uint32_t(slot + 128 * i)), "l"(from_ + 128 * i)
                     : "memory");
  }
  // x: of this lane, step_bytes: of all rows.
  __device__ void start_inputs(const uint8_t* x, uint32_t step_bytes) const {
    const uint32_t to = uint32_t(__cvta_generic_to_shared(memory)) + uint32_t(Step::kBytes + lane * 16);
    const uint8_t* const from = x + uint32_t(tile_) / 4 * step_bytes;
#pragma unroll
    for (int i = 0; i < kInputBytes / 512; ++i)
      if (tile_ < end_tile_ && uint32_t(512 * i + lane * 16) < step_bytes)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + uint32_t(slot + 512 * i)), "l"(from + 512 * i)
                     : "memory");
  }
  __device__ void advance() {
    from_ += int64_t(4 * warps) * row_bytes_;
    tile_ += 4 * warps;
    if (tile_ == end_tile_) begin_pair();
    slot = slot == (kStages - 1) * kBytes ? 0 : slot + kBytes;
  }

 private:
  __device__ void begin_pair() {
    tile_ = 2 * next_pair_ < out_tiles_ ? 4 * warp : 1 << 30;
    from_ = codes_ + int64_t(4 * warp + (lane >> 3)) * row_bytes_ + int64_t(next_pair_) * Step::kRow + (lane & 7) * 16;
    if (2 * next_pair_ + 1 == out_tiles_) bytes_ = 32 * kBits - (lane & 7) * 16;  // there is no second tile
    next_pair_ += blocks_;
  }

  const uint8_t *codes_, *from_;
  int out_tiles_, next_pair_, blocks_, tile_, end_tile_;
  uint32_t row_bytes_;
  int limit_, bytes_;
};

template <int kBits, bool kInt8, int kRowTiles, bool kOwn>
__device__ void multiply_pairs(const GemvParts& parts, const Matrix& m, const Output& out, const Operand& x, int block,
                               int blocks, uint8_t* memory, const uint8_t* levels, const float* row_scales,
                               const uint8_t* own) {
  using Step = Pair<kBits>;
  using Ring = cuda::Ring<kBits, GemvSizes<kInt8, kRowTiles, kOwn>::kInputs>;
  // Where the matrix allows it, and few rows leave the registers: Table::decode_signs.
  constexpr bool kSigns = kBits == 4 && kInt8 && kRowTiles == 1;
  constexpr int kOf = kInt8 ? 64 : 128;  // bytes of a row in a step
  Ring ring(m, x.steps, memory, block, blocks);
  const int lane = ring.lane, g = lane >> 2, c = lane & 3;
  const int in_tiles = int(m.in_tiles), out_tiles = int(m.out_tiles), pairs = (out_tiles + 1) / 2;
  const int row_pairs = parts.row_pairs, warp = ring.warp, warps = ring.warps, turns = ring.turns(x.steps);
  auto* const partial = reinterpret_cast<float*>(memory + warps * Ring::kRing);
  const uint32_t step_bytes = uint32_t(x.rows_padded) * kOf;
  const auto* const all_inputs =
      (kInt8 ? reinterpret_cast<const uint8_t*>(x.codes) : reinterpret_cast<const uint8_t*>(x.values)) + lane * 16;
#pragma unroll 1
  for (int i = 0; i < Ring::kStages; ++i) {  // whose codes are on their way already
    if constexpr (!kOwn) ring.start_inputs(all_inputs, step_bytes);
    ring.advance();
  }
  if constexpr (!kOwn) {
    end_group();
    wait_for_groups<0>();
  }
  Table<kBits> table;
  table.take(levels, kInt8 ? 0 : 0x80, m.straight);
  [[maybe_unused]] bool signs = false;
  if constexpr (kSigns) signs = m.groups == 1 && table.splits_at_zero();

  // The sum that this thread adds up at the end of a pair: value [q, i, g, c] of the warps' partial sums.
  const int values = 64 * row_pairs, value = int(threadIdx.x);
  const int value_c = value % row_pairs, value_g = value / row_pairs % 8, value_i = value / (8 * row_pairs) % 4;
  const int value_output = Step::output(value / (32 * row_pairs), value_g) + 8 * (value_i >> 1);
  const int value_row = 2 * value_c + (value_i & 1);

  Step step;
  Inputs<kInt8> inputs[kRowTiles];
  const uint8_t* const own_inputs = own + (warp * x.rows + min(g, x.rows - 1)) * kOf + c * (kOf / 4);
  const auto take_step = [&](int turn) {  // and start another one in its place
    wait_for_groups<Ring::kStages - 1>();
    __syncwarp();
    const uint8_t* const here = ring.memory + ring.slot;
    step.load(here + c * Step::kPitch, g);
#pragma unroll
    for (int n = 0; n < kRowTiles; ++n) {
      const uint8_t* from = kOwn ? own_inputs + turn * (warps * x.rows * kOf)
                                 : here + Step::kBytes + (8 * n + g) * kOf + c * (kOf / 4);
      inputs[n].load(reinterpret_cast<const uint4*>(from));
      if constexpr (Step::kParted) inputs[n].part();
    }
    __syncwarp();
    ring.start_codes();
    if constexpr (!kOwn) ring.start_inputs(all_inputs, step_bytes);
    end_group();
    ring.advance();
  };

  int place = 0;
  for (int pair = block; pair < pairs; pair += blocks) {
    const int output = 32 * pair + value_output;
    const bool adds = value < values && output < int(m.out);
    float scale = 1.0f;
    if (adds && m.groups == 1) scale = __half2float(__ushort_as_half(m.scales[output]));

    Sum<kInt8> sums[2][kRowTiles][4] = {};
    if (m.groups > 1) {  // group by group: sums of one group in `mine`, scaled sums as floats
      const int group_tiles = in_tiles / int(m.groups);
      float scaled[2][kRowTiles][4] = {};
#pragma unroll 1
      for (int turn = 0; turn < turns; ++turn) {
        take_step(turn);
        const int tile = 4 * (warp + turn * warps), last = min(tile + 3, in_tiles - 1) / group_tiles;
#pragma unroll 1
        for (int group = tile / group_tiles; group <= last; ++group) {
          Inputs<kInt8> kept[kRowTiles];
#pragma unroll
          for (int n = 0; n < kRowTiles; ++n) {
            kept[n] = inputs[n];
            kept[n].keep((tile + c) / group_tiles == group);
          }
#pragma unroll
          for (int q = 0; q < 2; ++q) {
            Sum<kInt8> mine[kRowTiles][4] = {};
            multiply<kBits, kInt8, kRowTiles>(table, step.codes[q], kept, mine);
            const int at = min(32 * pair + Step::output(q, g), 16 * out_tiles - 9);  // no second tile: any scale does
            const uint16_t* scales = m.scales + int64_t(group) * 16 * out_tiles + at;
            const float low = __half2float(__ushort_as_half(scales[0]));
            const float high = __half2float(__ushort_as_half(scales[8]));
#pragma unroll
            for (int n = 0; n < kRowTiles; ++n)
#pragma unroll
              for (int i = 0; i < 4; ++i) scaled[q][n][i] += float(mine[n][i]) * (i < 2 ? low : high);
          }
        }
      }
#pragma unroll
      for (int q = 0; q < 2; ++q)
#pragma unroll
        for (int n = 0; n < kRowTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if constexpr (kInt8) sums[q][n][i] = __float_as_int(scaled[q][n][i]);
            else sums[q][n][i] = scaled[q][n][i];
    } else if (signs) {
      if constexpr (kSigns) {
        int negative[2][4] = {};
#pragma unroll 1
        for (int turn = 0; turn < turns; ++turn) {
          take_step(turn);
#pragma unroll
          for (int q = 0; q < 2; ++q)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              Run above[2], below[2];
              table.decode_signs(step.codes[q], half, above, below);
              mma(sums[q][0], above[0], above[1], inputs[0].w[2 * half], inputs[0].w[2 * half + 1]);
              mma(negative[q], below[0], below[1], inputs[0].w[2 * half], inputs[0].w[2 * half + 1]);
            }
        }
#pragma unroll
        for (int q = 0; q < 2; ++q)
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[q][0][i] -= negative[q][i];
      }
    } else {
#pragma unroll 1
      for (int turn = 0; turn < turns; ++turn) {
        take_step(turn);
#pragma unroll
        for (int q = 0; q < 2; ++q) multiply<kBits, kInt8, kRowTiles>(table, step.codes[q], inputs, sums[q]);
      }
    }

#pragma unroll
    for (int n = 0; n < kRowTiles; ++n) {
      if (8 * n >= x.rows) break;
      float* const here = partial + place * (warps * values);
      place ^= 1;
      if (c < row_pairs)
#pragma unroll
        for (int q = 0; q < 2; ++q)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float& to = here[warp * values + ((4 * q + i) * 8 + g) * row_pairs + c];
            if constexpr (kInt8) to = __int_as_float(sums[q][n][i]);
            else to = sums[q][n][i];
          }
      __syncthreads();
      const int row = 8 * n + value_row;
      if (!adds || row >= x.rows) continue;
      float total = 0;
      int sum = 0;
      for (int w = 0; w < warps; ++w)
        if (kInt8 && m.groups == 1) sum += __float_as_int(here[w * values + value]);
        else total += here[w * values + value];
      if (kInt8 && m.groups == 1) total = float(sum);
      // Each rounding is its own, as in the GEMM: a row's result must not depend on how many rows there are.
      total = __fmul_rn(total, kInt8 ? __fmul_rn(row_scales[row], scale) : scale);
      if (m.bias) total = __fadd_rn(total, m.bias[output]);
      float* y = out.y + row * out.stride + output;
      *y = out.add ? __fadd_rn(*y, total) : total;
    }
  }
}

template <bool kInt8, int kRowTiles, bool kOwn>
__global__ void __launch_bounds__(kGemvThreads, kRowTiles == 1 ? 2 : 1)
    gemv_any(const __grid_constant__ GemvParts parts, const __grid_constant__ Operand x,
             const __grid_constant__ RowSource source) {
  using Sizes = GemvSizes<kInt8, kRowTiles, kOwn>;
  __shared__ __align__(16) uint8_t levels[256];
  __shared__ float scales[kOwnRows];  // of the block's own operand
  extern __shared__ __align__(16) uint8_t memory[];
  let_next_start();
  int part = 0;
  while (part + 1 < kGemvMatrices && int(blockIdx.x) >= parts.end[part]) ++part;
  const Matrix& m = parts.matrix[part];
  const int first = part ? parts.end[part - 1] : 0, block = int(blockIdx.x) - first, blocks = parts.end[part] - first;

#define HALFTURN_EACH_WIDTH(what) \
  switch (m.bits) {               \
    case 2: what(2); break;       \
    case 3: what(3); break;       \
    case 4: what(4); break;       \
    case 5: what(5); break;       \
    case 6: what(6); break;       \
    case 7: what(7); break;       \
    case 8: what(8); break;       \
  }
#define HALFTURN_FILL(bits)                                                         \
  {                                                                                 \
    Ring<bits, Sizes::kInputs> ring(m, x.steps, memory, block, blocks);             \
    for (int i = 0; i < Ring<bits, Sizes::kInputs>::kStages; ++i, ring.advance()) { \
      ring.start_codes();                                                           \
      end_group();                                                                  \
    }                                                                               \
  }
  HALFTURN_EACH_WIDTH(HALFTURN_FILL)
  if (threadIdx.x < 64)
    reinterpret_cast<uint32_t*>(levels)[threadIdx.x] = reinterpret_cast<const uint32_t*>(m.levels)[threadIdx.x];
  wait_for_previous();

  const int warps = int(blockDim.x) >> 5;
  uint8_t* const sums = memory + warps * Sizes::kRing;
  uint8_t* const own = sums + warps * 2 * kPartial * parts.row_pairs;
  if constexpr (kOwn) {
    auto* const scratch = reinterpret_cast<float2(*)[32]>(sums);
    if (source.weight) make_operand<kInt8, true>(source, x, own, scales, scratch);
    else make_operand<kInt8, false>(source, x, own, scales, scratch);
  }
  __syncthreads();
  const float* const row_scales = kOwn ? scales : x.scales;
#define HALFTURN_MULTIPLY(bits)                                                                                     \
  multiply_pairs<bits, kInt8, kRowTiles, kOwn>(parts, m, parts.output[part], x, block, blocks, memory, levels, row_scales, \
                                               own)
  HALFTURN_EACH_WIDTH(HALFTURN_MULTIPLY)
#undef HALFTURN_EACH_WIDTH
#undef HALFTURN_FILL
#undef HALFTURN_MULTIPLY
}

}  // namespace halfturn::cuda
