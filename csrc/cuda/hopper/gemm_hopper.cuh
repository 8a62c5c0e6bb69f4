// The GEMM of compute capability 9.0 (H100 and H200), whose tensor cores reach their full rate only by instructions of
// a whole warpgroup: see wgmma.cuh.
//
// A block of two warpgroups computes 128 outputs x 256 or 128 rows, each warpgroup 64 of the outputs. Copies of the
// codes and of the activations run some steps of 64 inputs ahead, through stages in shared memory. A lane (g, c) takes
// the codes of outputs g and g + 8 and decodes them right into A's registers: two sets of them, so that one is decoded
// while the tensor cores read the other.
//
// The activations are those that every product reads (operand.h), where a tile's 16 inputs stand in four words, the
// codes' runs (decode.cuh). In int8 one piece of 16 bytes is a tile, and lane c meets word c of it: run c of the tile.
// In half a piece is half a tile, the four words of it being the two halves of run 0 and the two of run 1 (or of 2 and
// 3): lane c meets half c % 2 of the runs c / 2 and c / 2 + 2.
#pragma once
#include "../gemm.cuh"
#include "wgmma.cuh"

namespace halfturn::cuda {

template <int kBits_, bool kHalf_, int kRows_>
struct HopperTiling {
  static constexpr int kBits = kBits_, kRows = kRows_;
  static constexpr bool kHalf = kHalf_;
  static constexpr int kThreads = 256, kOutTiles = 8, kRowTiles = kRows / 8;
  static constexpr int kResident = kRows == 256 ? 1 : 2;  // blocks on a multiprocessor

  // A stage is one step: kRows rows of 64 inputs, then four runs of kOutTiles tiles.
  static constexpr int kTileBytes = 32 * kBits, kRowBytes = kHalf ? 128 : 64;
  static constexpr int kValueBytes = kRows * kRowBytes, kCodeBytes = 4 * kOutTiles * kTileBytes;
  static constexpr int kStageBytes = kValueBytes + kCodeBytes;
  static_assert(kStageBytes % 1024 == 0);  // what wgmma.cuh's patterns need

  static constexpr int kTableBytes = 256;
  static constexpr int kMost = (kResident == 1 ? 227 << 10 : 113 << 10) - kTableBytes;
  static constexpr int kStages = kMost / kStageBytes < 8 ? kMost / kStageBytes : 8;
  static_assert(kStages >= 4);
  static constexpr int kSharedBytes = kStages * kStageBytes + kTableBytes;

  // The epilogue's buffers take the place of the stages: the rows' scales, and 32 rows of each warpgroup.
  static constexpr int kPitch = 68;  // floats; a fragment's four rows of one lane group meet in no bank
  static_assert(4 * (kRows + 2 * 32 * kPitch) <= kStages * kStageBytes);
};

// What a lane multiplies of the two tiles at `tiles` and `tiles` + kApart, as two runs.
template <int kBits, bool kHalf>
__device__ inline Codes<kBits> read_runs(const char* tiles, int apart, int lane) {
  using C = Codes<kBits>;
  // In int8 the lane's own run, in half two runs of which it takes the halves `odd`.
  const int first = kHalf ? (lane & ~3) + ((lane >> 1) & 1) : lane, odd = lane & 1;
  C codes;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const char* tile = tiles + i * apart;
    if constexpr (kBits == 8) {
      const auto* at = reinterpret_cast<const uint2*>(tile) + first;
      uint2 v = at[0];
      if constexpr (kHalf) {
        const uint2 w = at[2];
        v = {permute(v.x, w.x, odd ? 0x7632 : 0x5410), permute(v.y, w.y, odd ? 0x7632 : 0x5410)};
      }
      codes.eight[2 * i] = v.x, codes.eight[2 * i + 1] = v.y;
    }
    if constexpr (C::kFour) {
      const auto* at = reinterpret_cast<const uint32_t*>(tile) + first;
      codes.four[i] = kHalf ? permute(at[0], at[2], odd ? 0x7351 : 0x6240) : at[0];
    }
    if constexpr (C::kSmall & 2) {
      const auto* at = reinterpret_cast<const uint16_t*>(tile + (C::kFour ? 128 : 0)) + first;
      uint32_t v = at[0];
      if constexpr (kHalf) v = ((v >> (4 * odd)) & 0x0f0f) | ((uint32_t(at[2]) >> (4 * odd)) & 0x0f0f) << 4;
      codes.two[0] = i ? codes.two[0] | v << 16 : v;
    }
    if constexpr (C::kSmall & 1) {
      const auto* at = reinterpret_cast<const uint8_t*>(tile + (C::kFour ? 128 : 0) + (C::kSmall & 2 ? 64 : 0)) + first;
      uint32_t v = at[0];
      if constexpr (kHalf) v = ((v >> (2 * odd)) & 0x33) | ((uint32_t(at[2]) >> (2 * odd)) & 0x33) << 2;
      codes.one = i ? codes.one | v << 8 : v;
    }
  }
  return codes;
}

// A's registers for half a step: in int8 one product of 32 inputs, in half two of 16.
template <bool kHalf>
struct HalfStep {
  uint32_t a[kHalf ? 8 : 4];
  template <int kBits>
  __device__ void decode(const Table<kBits>& table, const Codes<kBits>& codes) {
    Run first, second;
    table.decode(codes, 0, first, second);
    if constexpr (kHalf) {
      const HalfRun x(first), y(second);
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = x.a[i], a[4 + i] = y.a[i];
    } else {
      a[0] = first.low, a[1] = first.high, a[2] = second.low, a[3] = second.high;
    }
  }
};

__device__ inline void synchronize_warpgroup(int group) {
  if (group) asm volatile("bar.sync 2, 128;" ::: "memory");  // constants: only these barriers are taken
  else asm volatile("bar.sync 1, 128;" ::: "memory");
}

// Through shared memory, 32 rows at a time: neighbouring lanes write neighbouring outputs. The operations are those of
// the other products, so that in int8 all give the same bits.
template <class T, class Sum>
__device__ void store_hopper(const GemmArguments& a, const GemmBlock<T>& block, float* memory,
                             const Sum (&sums)[4 * T::kRowTiles]) {
  const int lane = int(threadIdx.x) & 31, g = lane >> 2, c = lane & 3;
  const int group = int(threadIdx.x) >> 7, warp = (int(threadIdx.x) >> 5) & 3;
  float* row_scales = memory;
  float* buffer = memory + T::kRows + group * 32 * T::kPitch;
  if constexpr (!T::kHalf)
    if (int(threadIdx.x) < T::kRows && block.first_row + int(threadIdx.x) < a.x.rows)
      row_scales[threadIdx.x] = a.x.scales[block.first_row + int(threadIdx.x)];
  const Matrix& matrix = a.parts.matrix[block.part];
  const Output& out = a.parts.output[block.part];
  const int stride = int(out.stride);  // rows of one warp lie no more than 2^31 floats apart
  const int output = 16 * block.first_tile + 64 * group + lane;
  bool valid[2];
  float scale[2], bias[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    valid[h] = output + 32 * h < int(matrix.out);
    scale[h] = valid[h] ? __half2float(__ushort_as_half(matrix.scales[output + 32 * h])) : 0.0f;
    bias[h] = valid[h] && matrix.bias ? matrix.bias[output + 32 * h] : 0.0f;
  }
  constexpr bool kEarly = T::kResident == 1;  // where there are the registers, and no other block to wait with
  float old[2][8][2] = {};                    // what is there
  const auto read_old = [&](int n) {
    const int first = 8 * (n + warp), rows = a.x.rows - block.first_row - first;
    const float* y = out.y + int64_t(block.first_row + first) * out.stride + output;
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        if (out.add && valid[h] && j < rows) old[n / 4 % 2][j][h] = y[j * stride + 32 * h];
  };
  read_old(0);
  __syncthreads();
#pragma unroll
  for (int n = 0; n < T::kRowTiles; n += 4) {
    if (block.first_row + 8 * n >= a.x.rows) return;
    if (n && !kEarly) read_old(n);
    if (n) synchronize_warpgroup(group);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        float* at = buffer + (8 * i + 2 * c + (r & 1)) * T::kPitch + 16 * warp + g + 8 * (r >> 1);
        if constexpr (T::kHalf) *at = sums[4 * (n + i) + r];
        else *at = __int2float_rn(sums[4 * (n + i) + r]);
      }
    synchronize_warpgroup(group);
    const int first = 8 * (n + warp);  // of this warp's eight rows in the block
    const int rows = a.x.rows - block.first_row - first;
    float* y = out.y + int64_t(block.first_row + first) * out.stride + output;
    float value[8][2];
    if (kEarly && n + 4 < T::kRowTiles) read_old(n + 4);
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float factor = T::kHalf ? scale[h] : __fmul_rn(row_scales[first + j], scale[h]);
        float v = __fmul_rn(buffer[(8 * warp + j) * T::kPitch + 32 * h + lane], factor);
        if (matrix.bias) v = __fadd_rn(v, bias[h]);
        value[j][h] = out.add ? __fadd_rn(old[n / 4 % 2][j][h], v) : v;
      }
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        if (valid[h] && j < rows) y[j * stride + 32 * h] = value[j][h];
  }
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, T::kResident)
    gemm_hopper_kernel(const __grid_constant__ GemmArguments a) {
  constexpr bool kHalf = T::kHalf;
  constexpr int kAhead = T::kStages - 2;  // steps; the slots of the last two are still being read
  extern __shared__ __align__(1024) char stages[];
  let_next_start();
  const int thread = int(threadIdx.x), lane = thread & 31, warp = thread >> 5;
  const GemmBlock<T> block(a);
  // Each copies step after step. What lies beyond the matrix or the rows is not copied, see gemm.cuh.
  constexpr int kLanes = T::kThreads / 4, kRunBytes = T::kOutTiles * T::kTileBytes;  // of one input tile
  const int run = thread / kLanes, in_run = thread % kLanes;
  const char* next_codes = block.codes + run * block.codes_stride + 16 * in_run;
  const auto copy_codes = [&](int slot, int step) {
    char* to = stages + slot * T::kStageBytes + T::kValueBytes + run * kRunBytes + 16 * in_run;
#pragma unroll
    for (int i = 0; i < (kRunBytes / 16 + kLanes - 1) / kLanes; ++i)
      if (4 * step + run < block.in_tiles && in_run + i * kLanes < block.code_chunks)
        copy_16(to + i * 16 * kLanes, next_codes + i * 16 * kLanes);
    next_codes += 4 * block.codes_stride;
  };
  constexpr int kPieces = T::kRowBytes / 16;  // of a row
  const int place = thread / kPieces * T::kRowBytes + swizzled<T::kRowBytes>(thread / kPieces, thread % kPieces);
  const char* next_values = block.values + 16 * thread;
  const auto copy_values = [&](int slot, int step) {
#pragma unroll
    for (int i = 0; i < T::kValueBytes / 16 / T::kThreads; ++i)  // the pattern repeats long before 256 pieces
      if (step < block.steps && thread + i * T::kThreads < block.value_chunks)
        copy_16(stages + slot * T::kStageBytes + place + i * 16 * T::kThreads, next_values + i * 16 * T::kThreads);
    next_values += block.values_stride;
  };
#pragma unroll
  for (int i = 0; i < kAhead; ++i) copy_codes(i, i);
  Table<T::kBits> table;  // behind the copies, as it waits for its reads
  table.read(a.parts.matrix[block.part].levels, kHalf ? 0x80 : 0,
             reinterpret_cast<uint8_t*>(stages + T::kStages * T::kStageBytes), T::kBits == 8);
  wait_for_previous();
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    copy_values(i, i);
    commit_copies();
  }

  GemmSum<kHalf> sums[4 * T::kRowTiles] = {};
  const uint64_t described = describe<T::kRowBytes>(uint32_t(__cvta_generic_to_shared(stages)));
  const auto multiply = [&](const HalfStep<kHalf>& weights, int slot, int half) {
    const uint64_t values = described + uint64_t(slot * (T::kStageBytes / 16) + half * (T::kRowBytes / 32));
    wgmma_fence();
    wgmma(sums, weights.a, values);
    if constexpr (kHalf) wgmma(sums, weights.a + 4, values + 2);
    wgmma_commit();
  };
  const auto read = [&](int slot, int half) {
    constexpr int kApart = T::kOutTiles * T::kTileBytes;
    const char* tiles = stages + slot * T::kStageBytes + T::kValueBytes + 2 * half * kApart + warp * T::kTileBytes;
    return read_runs<T::kBits, kHalf>(tiles, kApart, lane);
  };

  HalfStep<kHalf> even, odd;
  wait_for_copies<kAhead - 1>();
  __syncthreads();
  even.decode(table, read(0, 0));
  int slot = 0, free_slot = kAhead;
  for (int step = 0; step < block.steps; ++step) {
    wait_for_copies<kAhead - 2>();  // the next step's codes are there too
    fence_for_products();
    __syncthreads();  // everyone's; and everyone's products of the step before the last are complete
    multiply(even, slot, 0);
    Codes<T::kBits> codes = read(slot, 1);
    copy_codes(free_slot, step + kAhead);
    copy_values(free_slot, step + kAhead);
    commit_copies();
    free_slot = free_slot + 1 == T::kStages ? 0 : free_slot + 1;
    wgmma_wait<1>();  // the last step's product of `odd`
    odd.decode(table, codes);
    multiply(odd, slot, 1);
    slot = slot + 1 == T::kStages ? 0 : slot + 1;
    codes = read(slot, 0);  // behind the last step: anything
    wgmma_wait<1>();
    even.decode(table, codes);
  }
  wgmma_wait<0>();
  settled(sums);
  wait_for_copies<0>();
  __syncthreads();
  store_hopper<T>(a, block, reinterpret_cast<float*>(stages), sums);
}

template <int kBits, bool kHalf>
void hopper_tilings(const Cuda& device, const GemmParts& parts, const Operand& x, int tiling) {
  using A = HopperTiling<kBits, kHalf, 256>;
  using B = HopperTiling<kBits, kHalf, 128>;
  if (tiling == 0) launch_gemm<A>(device, gemm_hopper_kernel<A>, parts, x);
  else launch_gemm<B>(device, gemm_hopper_kernel<B>, parts, x);
}

template <int kBits>
void gemm_hopper(const Cuda& device, const GemmParts& parts, const Operand& x, int tiling) {
  if (x.codes) hopper_tilings<kBits, false>(device, parts, x, tiling);
  else hopper_tilings<kBits, true>(device, parts, x, tiling);
}

}  // namespace halfturn::cuda
