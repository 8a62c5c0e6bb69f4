// Teams of a block's warps take turns at pairs of tiles (32 outputs), for up to 8, 16 or 32 rows. The members of a team
// share out the steps of 64 inputs; each has a ring of steps on their way from memory to shared memory, which runs on
// across the borders of pairs, and is full before the kernel waits for the one ahead of it: a launch then costs the
// memory hardly a pause. Tensor cores multiply, as decoding is what costs: it happens once for all rows. Partial sums
// meet in shared memory, in the order of the members.
#pragma once
#include "copies.cuh"
#include "gemv.h"
#include "gemv_sums.cuh"
#include "launch.cuh"
#include "planes.cuh"
#include "row_operand.cuh"

namespace halfturn::cuda {

// The block's own operand in shared memory, [steps, rows, 64], kParted as put_codes() has it or kPlanes as in
// planes.cuh, the scales of its rows and, of planes, the sums of their codes. A warp holds all of a row that it deals
// with: up to kNormedChunks or kRowChunks of 256 inputs. Sums of squares are added in the order of rows.cu.
// start_rest() is called once, when the first row is on its way. Waits for the kernel before, which made these rows.
template <bool kInt8, bool kNorm, bool kParted, bool kPlanes, class Start>
__device__ inline void make_operand(const RowSource& source, const Operand& x, uint8_t* memory, float* scales,
                                    int* total_of_row, float2 (*parts)[32], const Start& start_rest) {
  constexpr int kChunks = kNorm ? kNormedChunks : kRowChunks, kPieces = 2 * kChunks;  // a lane's pieces of four inputs
  // Through a shuffle, so that the compiler knows it to be the same in all lanes, as the loop for planes needs.
  const int lane = int(threadIdx.x) & 31, warp = __shfl_sync(~0u, int(threadIdx.x) >> 5, 0);
  const int warps = int(blockDim.x) >> 5;
  const int inputs = x.padded_steps * kStep, chunks = (inputs + 255) / 256;
  const auto first_of = [&](int piece) { return 256 * (warp + piece / 2 * warps) + (32 * (piece & 1) + lane) * 4; };
  const bool weighs = kNorm && source.weight, shifts = kInt8 && kNorm && source.mean;
  uint2 mean[kNorm ? kPieces : 1];
  if (shifts)
#pragma unroll
    for (int i = 0; i < (kNorm ? kPieces : 0); ++i)
      mean[i] = first_of(i) < source.size ? *reinterpret_cast<const uint2*>(source.mean + first_of(i)) : uint2{0, 0};
  wait_for_previous();
#pragma unroll 1
  for (int row = 0; row < x.rows; ++row) {
    const float* const from = source.x + (source.chosen ? source.chosen[row] : row) * source.stride;
    float4 v[kPieces];
    uint2 weight[kNorm ? kPieces : 1];
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const bool inside = first_of(i) < source.size;
      v[i] = inside ? *reinterpret_cast<const float4*>(from + first_of(i)) : float4{0, 0, 0, 0};
      if (weighs) weight[i] = inside ? *reinterpret_cast<const uint2*>(source.weight + first_of(i)) : uint2{0, 0};
    }
    float known = 0;
    if (!kNorm && source.maxima)
      for (int i = lane; i < source.maxima_count; i += 32)
        known = fmaxf(known, source.maxima[row * source.maxima_count + i]);
    if (row == 0) start_rest();
    const auto largest_here = [&] {
      float largest = 0;
#pragma unroll
      for (int i = 0; i < kPieces; ++i) largest = fmaxf(largest, magnitude(v[i]));
      return warp_max(largest);
    };

    RowScale scale;
    if (!kNorm && source.maxima) {
      scale = row_scale(known);
    } else {
      if constexpr (kNorm) {
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk) {
          float squares = 0;
          add_squares(v[2 * chunk], squares);
          add_squares(v[2 * chunk + 1], squares);
          squares = shuffle_sum(squares);
          if (lane == 0) parts[row][warp + chunk * warps].x = squares;
        }
        if (weighs)
#pragma unroll
          for (int i = 0; i < kPieces; ++i) v[i] = weighted(v[i], weight[i]);
      }
      if (!shifts) {
        const float largest = largest_here();
        if (lane == 0) parts[row][warp].y = largest;
      }
      __syncthreads();
      float factor = 1.0f;
      if constexpr (kNorm) factor = norm_factor(lane < chunks ? parts[row][lane].x : 0.0f, source.size, source.epsilon);
      float2* all = parts[row];
      if (shifts) {  // the largest magnitude is known once the norm's factor is
#pragma unroll
        for (int i = 0; i < (kNorm ? kPieces : 0); ++i) v[i] = shifted(v[i], factor, mean[i]);
        factor = 1.0f;
        all = parts[kOwnRows + row];
        const float largest = largest_here();
        if (lane == 0) all[warp].y = largest;
        __syncthreads();
      }
      scale = row_scale(lane < warps ? all[lane].y : 0.0f, factor);
    }
    if (threadIdx.x == 0) scales[row] = scale.scale;
    [[maybe_unused]] int total = 0;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int e = first_of(i);
      if constexpr (kPlanes) {
        if (256 * (warp + i / 2 * warps) >= inputs) break;
        const uint32_t word = to_planes(v[i], scale.inverse, total);
        reinterpret_cast<uint32_t*>(memory)[e / (2 * kStep) * 32 + plane_word(lane)] = word;
        continue;
      }
      if (e >= inputs) continue;
      const int at = int(operand_at<kParted>(e, row, x.rows));
      if constexpr (kInt8) put_codes<kParted>(reinterpret_cast<int8_t*>(memory) + at, v[i], scale.inverse);
      else put_halves(reinterpret_cast<uint16_t*>(memory) + at, v[i], scale.factor);
    }
    if constexpr (kPlanes) {
      total = __reduce_add_sync(~0u, total);
      if (lane == 0) atomicAdd(total_of_row, total);
    }
  }
}

// A warp starts copying the inputs of a step, of which all rows have step_bytes, but kBytes at most.
template <int kBytes>
__device__ inline void start_inputs(const uint8_t* x, int step, uint32_t step_bytes, uint32_t to) {
  const uint32_t at = (threadIdx.x & 31) * 16;
  const uint8_t* const from = x + uint32_t(step) * step_bytes + at;
#pragma unroll
  for (int i = 0; i < kBytes / 512; ++i)
    if (512 * i + at < step_bytes) copy_16(to + at + uint32_t(512 * i), from + 512 * i);
}

// Codes on their way from memory to a warp's ring, kAtOnce steps at a time, and inputs with them where the block has no
// operand of its own. A lane copies pieces of 16 bytes of one of a step's four rows of tiles, 128 bytes apart. Tiles
// behind the last input are left out: their inputs are zero, so whatever is in the ring does in their place.
template <int kBits, int kInputBytes, int kMembers, int kAtOnce, bool kTurned>
struct Ring {
  using Step = Pair<kBits, kTurned>;
  static constexpr int kRing = ring_bytes(kInputBytes), kBytes = kAtOnce * (Step::kBytes + kInputBytes);
  static constexpr int kStages = kRing / kBytes;
  static_assert(kStages >= 2 && kPaddedSteps % (kMembers * kAtOnce) == 0);

  uint8_t* memory;  // of this warp
  int slot = 0;

  // Of a team's warp `member`, whose pairs are first, first + apart, ..
  __device__ Ring(const Matrix& m, uint8_t* start, int member, int turns, int first, int apart)
      : memory(start),
        codes_(reinterpret_cast<const uint8_t*>(m.codes)),
        out_tiles_(int(m.out_tiles)),
        next_pair_(first),
        apart_(apart),
        first_tile_(4 * member),
        end_tile_(4 * (member + turns * kMembers)),
        row_bytes_(uint32_t(m.out_tiles) * (32 * kBits)),
        limit_(int(m.in_tiles) - row()),
        bytes_(Step::kRow - column()),
        // Through a shuffle, so that no part of it is known to be the same in all lanes: copy_16_once().
        to_(__shfl_sync(~0u, shared() + uint32_t(row() * Step::kPitch + 16 * Step::place(lane() & 7, row())),
                        int(lane()))) {
    begin_pair();
  }

  // Starts copying the next steps' codes into the slot, and goes on to the steps and slot behind them.
  __device__ void start_codes() {
#pragma unroll
    for (int s = 0; s < kAtOnce; ++s) {
      const bool inside = tile_ < limit_;
#pragma unroll
      for (int i = 0; i < (kBits + 1) / 2; ++i)
        if (inside && 128 * i < bytes_) copy_16_once(to_ + uint32_t(s * Step::kBytes + 128 * i), from_ + 128 * i);
      from_ += uint64_t(4 * kMembers) * row_bytes_;
      tile_ += 4 * kMembers;
    }
    if (tile_ == end_tile_) begin_pair();
    const int next = slot == (kStages - 1) * kBytes ? -slot : kBytes;
    slot += next;
    to_ += uint32_t(next);
  }
  // The inputs of a step into a slot, where it is of one step.
  __device__ void start_inputs(const uint8_t* x, int step, uint32_t step_bytes, int to_slot) const {
    cuda::start_inputs<kInputBytes>(x, step, step_bytes, shared() + uint32_t(Step::kBytes + to_slot));
  }
  __device__ int next_step() const { return tile_ / 4; }  // whose codes are next; kNone or more: none are left
  static constexpr int kNone = 1 << 28;

 private:
  __device__ static uint32_t lane() { return threadIdx.x & 31; }
  __device__ static int row() { return int(lane() >> 3); }
  __device__ static int column() { return int(lane() & 7) * 16; }
  __device__ uint32_t shared() const { return uint32_t(__cvta_generic_to_shared(memory)); }
  __device__ void begin_pair() {
    tile_ = 2 * next_pair_ < out_tiles_ ? first_tile_ : 4 * kNone;
    from_ = codes_ + int64_t(first_tile_ + row()) * row_bytes_ + int64_t(next_pair_) * Step::kRow + column();
    if (2 * next_pair_ + 1 == out_tiles_) bytes_ = 32 * kBits - column();  // there is no second tile
    next_pair_ += apart_;
  }

  const uint8_t *codes_, *from_;
  int out_tiles_, next_pair_, apart_, first_tile_, end_tile_, tile_;
  uint32_t row_bytes_;
  int limit_, bytes_;
  uint32_t to_;  // the slot's address, where this lane copies to
};

template <bool kInt8, int kRowTiles, From kFrom>
struct GemvSizes {  // functions of the host, at compile time
  static constexpr int kInputs = kFrom == From::kRing ? input_bytes(kInt8, kRowTiles) : 0, kRowPairs = row_pairs(kFrom);
};

template <int kBits, bool kInt8, int kRowTiles, From kFrom, bool kUsual, int kMembers, bool kCounts>
__device__ void gemv_block(const Matrix& m, const Output& out, const Operand& x, const RowSource& source, int block,
                           int blocks, uint8_t* memory, uint8_t* levels, float* scales, int* total_of_row) {
  constexpr bool kPlanes = kCounts && kBits == 2;
  using Step = Pair<kBits, kPlanes>;
  constexpr bool kNorm = kFrom == From::kNormed, kOwn = kNorm || kFrom == From::kRows;
  // Steps of 2 bits are taken in twos, as what is around them would else cost as much as decoding.
  constexpr int kAtOnce = kInt8 && kBits == 2 && kFrom != From::kRing && kMembers == kTeam ? 2 : 1;
  using Ring = cuda::Ring<kBits, GemvSizes<kInt8, kRowTiles, kFrom>::kInputs, kMembers, kAtOnce, kPlanes>;
  const auto one_group = [&] { return kUsual || m.groups == 1; };
  // Where the matrix allows it, and few rows leave the registers: Table::decode_signs.
  constexpr bool kSigns = kInt8 && ((kBits == 4 && kRowTiles == 1) || (kBits == 5 && kRowTiles <= 2));
  constexpr int kOf = kInt8 ? 64 : 128;  // bytes of a row in a step
  constexpr int kRowPairs = GemvSizes<kInt8, kRowTiles, kFrom>::kRowPairs, kValues = 64 * kRowPairs;
  constexpr int kPlaces = kOwn ? 2 : 1;
  constexpr bool kParted = kInt8 && kOwn && Step::kParted;  // the block's operand is, or else its inputs at each step
  // Through a shuffle, so that the compiler knows it to be the same in all lanes and keeps it out of their registers.
  const int warp = __shfl_sync(~0u, int(threadIdx.x) >> 5, 0), warps = int(blockDim.x) >> 5;
  const int team = warp / kMembers, member = warp % kMembers, apart = blocks * (warps / kMembers);
  const int lane = int(threadIdx.x) & 31, g = lane >> 2, c = lane & 3;
  const int out_tiles = int(m.out_tiles), pairs = (out_tiles + 1) / 2;
  const int first_pair = block + blocks * team;
  // At one pair; inputs behind the last step are zero.
  const int turns = (x.steps + kMembers * kAtOnce - 1) / (kMembers * kAtOnce) * kAtOnce;
  // Asked for ahead of the codes: behind them, these few bytes would arrive last.
  uint32_t level = 0;
  if (threadIdx.x < 64) level = reinterpret_cast<const uint32_t*>(m.levels)[threadIdx.x];
  if (kNorm && source.weight)
    for (int e = 64 * int(threadIdx.x); e < source.size; e += 64 * int(blockDim.x)) prefetch_to_l2(source.weight + e);
  Ring ring(m, memory + warp * Ring::kRing, member, turns, first_pair, apart);
  const auto start = [&](int first, int last) {
#pragma unroll 1
    for (int i = first; i < last; ++i) {
      ring.start_codes();
      commit_copies();
    }
  };
  // Rows that become the block's own operand go ahead of the rest, as a block that starts late would wait for its codes
  // before it sees them. How many are best was measured (rows to be normed, 2 bits: 1 of 7, 4 bits: 1 or 2 of 4).
  constexpr int kHalf = (Ring::kStages + 1) / 2;
  constexpr int kBefore = !kOwn ? Ring::kStages : kPlanes ? 2 : kBits == 2 ? (kNorm || kAtOnce == 2 ? 1 : 2) : kHalf;
  start(0, kBefore);

  auto* const partials = reinterpret_cast<float*>(memory + warps * Ring::kRing);
  float* const partial = partials + team * kMembers * (kPlaces * kValues);
  uint8_t* const own = reinterpret_cast<uint8_t*>(partials + warps * (kPlaces * kValues));
  const auto meet = [&] { meet_at<32 * kMembers>(team + 1); };

  if (threadIdx.x < 64) reinterpret_cast<uint32_t*>(levels)[threadIdx.x] = level ^ (kInt8 ? 0 : 0x80808080);
  if (kPlanes && threadIdx.x == 0) *total_of_row = 0;
  __syncthreads();
  Table<kBits> table;
  table.take(levels, kInt8 ? 0 : 0x80, m.straight);
  [[maybe_unused]] bool signs = false;
  if constexpr (kSigns) signs = kUsual || (m.groups == 1 && table.splits_at_zero());
  if constexpr (!kOwn) wait_for_previous();  // make_operand() does

  const uint32_t step_bytes = uint32_t(x.rows_padded) * kOf;
  const auto* const all_inputs =
      kInt8 ? reinterpret_cast<const uint8_t*>(x.codes) : reinterpret_cast<const uint8_t*>(x.values);
  if constexpr (kOwn) {
    auto* const scratch = reinterpret_cast<float2(*)[32]>(partials);
    make_operand<kInt8, kNorm, kParted, kPlanes>(source, x, own, scales, total_of_row, scratch,
                                                 [&] { start(kBefore, Ring::kStages); });
  } else {
    if constexpr (kFrom == From::kCopy) {
      constexpr int kBytes = 8 * kRowTiles * kOf;  // of a step
      const uint32_t to = uint32_t(__cvta_generic_to_shared(own));
      for (int step = warp; step < turns * kMembers; step += warps)
        start_inputs<kBytes>(all_inputs, step, step_bytes, to + uint32_t(step * kBytes));
    } else {  // of the steps whose codes are on their way already
      for (int i = 0, turn = 0, pair = first_pair; i < Ring::kStages && pair < pairs; ++i) {
        ring.start_inputs(all_inputs, member + turn * kMembers, step_bytes, i * Ring::kBytes);
        if (++turn == turns) turn = 0, pair += apart;
      }
    }
    commit_copies();
    if (kInt8 && int(threadIdx.x) < x.rows) scales[threadIdx.x] = x.scales[threadIdx.x];
    wait_for_copies<0>();
  }
  __syncthreads();

  [[maybe_unused]] const PlaneLevels plane_levels(levels);
  constexpr int kWordsApart = kMembers / 2 * 32;  // of planes, from a warp's step to its next one
  [[maybe_unused]] const auto* const plane_words = reinterpret_cast<const uint32_t*>(own) + member / 2 * 32 + 8 * c + g;
  Step steps[kAtOnce];
  Inputs<kInt8> inputs[kAtOnce][kRowTiles];
  const int rows_here = kOwn ? x.rows : 8 * kRowTiles;
  const uint8_t* const inputs_here = own + (member * rows_here + (kOwn ? min(g, x.rows - 1) : g)) * kOf + c * (kOf / 4);
  const auto take_steps = [&](int turn) {  // and start others in their place
    wait_for_copies<Ring::kStages - 1>();
    __syncwarp();
    const int slot = ring.slot;
    const uint8_t* const here = ring.memory + slot;
#pragma unroll
    for (int s = 0; s < kAtOnce; ++s) {
      steps[s].load(here + s * Step::kBytes + c * Step::kPitch, g, c);
#pragma unroll
      for (int n = 0; n < (kPlanes ? 0 : kRowTiles); ++n) {
        const uint8_t* from = kFrom == From::kRing ? here + Step::kBytes + (8 * n + g) * kOf + c * (kOf / 4)
                                                   : inputs_here + ((turn + s) * (kMembers * rows_here) + 8 * n) * kOf;
        inputs[s][n].load(reinterpret_cast<const uint4*>(from));
        if constexpr (Step::kParted && !kParted) inputs[s][n].part();
      }
    }
    __syncwarp();
    if constexpr (kFrom == From::kRing)
      if (ring.next_step() < Ring::kNone) ring.start_inputs(all_inputs, ring.next_step(), step_bytes, slot);
    ring.start_codes();
    commit_copies();
  };

  int place = 0, adding = member;  // the team's members add up its sums in turn: those before kValues / 32
  for (int pair = first_pair; pair < pairs; pair += apart) {
    // The sum that this thread adds up at the end: value [q, i, g, c] of the team's partial sums.
    const int value = adding * 32 + lane, value_g = value / kRowPairs % 8, value_i = value / (8 * kRowPairs) % 4;
    const int value_row = 2 * (value % kRowPairs) + (value_i & 1);
    const int output = 32 * pair + Step::output(value / (32 * kRowPairs), value_g) + 8 * (value_i >> 1);
    const bool adds = value < kValues && (kRowTiles > 1 || value_row < x.rows) && output < int(m.out);
    adding = (adding + 1) % kMembers;
    // Not to be converted before it is needed: that would wait for it.
    uint16_t scale_bits = 0;
    float before = 0.0f;  // what the sum is added to: what is there, else the bias
    if (adds && one_group()) scale_bits = m.scales[output];
    if (kRowTiles == 1 && adds && out.add) before = out.y[value_row * out.stride + output];
    if (adds && !out.add && m.bias) before = m.bias[output];

    Sum<kInt8> sums[2][kRowTiles][4] = {};
    [[maybe_unused]] int sum_of_planes = 0;  // instead
    if (!kUsual && m.groups > 1) {
      sum_groups<kMembers>(table, m, pair, member, turns, take_steps, steps, inputs, sums);
    } else if ((kSigns && kUsual) || signs) {
      if constexpr (kSigns) sum_signs(table, turns, take_steps, steps[0], inputs[0], sums);
    } else if constexpr (kPlanes) {
      PlaneSums ones;
      const uint32_t* words = plane_words;
#pragma unroll 1
      for (int turn = 0; turn < turns; turn += kAtOnce, words += kAtOnce * kWordsApart) {
        take_steps(turn);
        const PlaneCodes codes(steps[0].codes), next(steps[kAtOnce - 1].codes);
        const PlaneInputs here(words[0], member & 1);
        if constexpr (kAtOnce == 1) count(ones, codes, here);
        else count(ones, codes, next, here, PlaneInputs(words[kWordsApart], member & 1));
      }
      sum_of_planes = plane_levels.sum(ones);
    } else {
      sum_products<kUsual>(table, turns, take_steps, steps, inputs, sums);
    }

#pragma unroll
    for (int n = 0; n < kRowTiles; ++n) {
      if (8 * n >= x.rows) break;
      float* const here = partial + place * (kMembers * kValues);
      if (kPlaces > 1) place ^= 1;
      else meet();  // everyone has added up what was there
      if constexpr (kPlanes) here[member * kValues + 16 * c + g] = __int_as_float(sum_of_planes);
      else if (c < kRowPairs)
#pragma unroll
        for (int q = 0; q < 2; ++q)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float& to = here[member * kValues + ((4 * q + i) * 8 + g) * kRowPairs + c];
            if constexpr (kInt8) to = __int_as_float(sums[q][n][i]);
            else to = sums[q][n][i];
          }
      meet();
      const int row = 8 * n + value_row;
      if (!adds || row >= x.rows) continue;
      float total = 0;
      int sum = 0;
#pragma unroll
      for (int w = 0; w < kMembers; ++w)
        if (kInt8 && one_group()) sum += __float_as_int(here[w * kValues + value]);
        else total += here[w * kValues + value];
      if constexpr (kPlanes) sum -= plane_levels.less * *total_of_row;
      if (kInt8 && one_group()) total = float(sum);
      const float scale = one_group() ? __half2float(__ushort_as_half(scale_bits)) : 1.0f;
      // Each rounding is its own, as in the GEMM: a row's result must not depend on how many rows there are.
      total = __fmul_rn(total, kInt8 ? __fmul_rn(scales[row], scale) : scale);
      if (m.bias && out.add) total = __fadd_rn(total, m.bias[output]);
      float* y = out.y + row * out.stride + output;
      if (kRowTiles > 1 && out.add) before = *y;
      *y = __fadd_rn(before, total);
    }
  }
}

template <bool kInt8, int kRowTiles, From kFrom, int kKind, int kMembers, bool kCounts = false>
__global__ void __launch_bounds__(32 * kTeam * kMostTeams, 1)
    gemv_any(const __grid_constant__ GemvParts parts, const __grid_constant__ Operand x,
             const __grid_constant__ RowSource source) {
  __shared__ __align__(16) uint8_t levels[256];
  __shared__ float scales[8 * kRowTiles];  // of the rows
  __shared__ int total_of_row;             // of its codes, where they are planes
  HALFTURN_LAUNCHED_MEMORY(uint8_t, 16, memory);
  let_next_start();
  int part = 0;
  while (part + 1 < kGemvMatrices && int(blockIdx.x) >= parts.end[part]) ++part;
  const Matrix& m = parts.matrix[part];
  const Output& out = parts.output[part];
  const int first = part ? parts.end[part - 1] : 0, block = int(blockIdx.x) - first, blocks = parts.end[part] - first;
#define HALFTURN_WIDTH(bits)                                                              \
  return gemv_block<bits, kInt8, kRowTiles, kFrom, kKind != kGeneral, kMembers, kCounts>( \
      m, out, x, source, block, blocks, memory, levels, scales, &total_of_row);
  if constexpr (kKind > kMixed) {
    HALFTURN_WIDTH(kKind)
  } else {
    switch (m.bits) {
      case 2: HALFTURN_WIDTH(2)
      case 3: HALFTURN_WIDTH(3)
      case 4: HALFTURN_WIDTH(4)
      case 5: HALFTURN_WIDTH(5)
      case 6: HALFTURN_WIDTH(6)
      case 7: HALFTURN_WIDTH(7)
      case 8: HALFTURN_WIDTH(8)
    }
  }
#undef HALFTURN_WIDTH
}

template <bool kInt8, int kRowTiles, int kKind>
GemvKernel gemv_kernel(const GemvForm& form) {
  const From from = form.from;
  static_assert(kOwnRows <= 8);
  if constexpr (kRowTiles == 1 && kKind == 2) {
    if (form.counts && form.large_team && from == From::kRows)
      return gemv_any<kInt8, kRowTiles, From::kRows, kKind, kLargeTeam, true>;
    if (form.counts && from == From::kRows) return gemv_any<kInt8, kRowTiles, From::kRows, kKind, kTeam, true>;
    if (form.counts && from == From::kNormed) return gemv_any<kInt8, kRowTiles, From::kNormed, kKind, kTeam, true>;
  }
  if constexpr (kRowTiles == 1) {
    if constexpr (kKind != kGeneral)
      if (form.large_team && from == From::kRows) return gemv_any<kInt8, kRowTiles, From::kRows, kKind, kLargeTeam>;
    if (from == From::kRows) return gemv_any<kInt8, kRowTiles, From::kRows, kKind, kTeam>;
    if (from == From::kNormed) return gemv_any<kInt8, kRowTiles, From::kNormed, kKind, kTeam>;
  }
  if constexpr (kInt8 && kRowTiles <= kCopyTiles) {
    if constexpr (kKind != kGeneral)
      if (form.large_team) return gemv_any<kInt8, kRowTiles, From::kRing, kKind, kLargeTeam>;
    if (from == From::kCopy) return gemv_any<kInt8, kRowTiles, From::kCopy, kKind, kTeam>;
  }
  return gemv_any<kInt8, kRowTiles, From::kRing, kKind, kTeam>;
}

}  // namespace halfturn::cuda
