// The sums that a lane of the GEMV's warps has of a pair of tiles: all of a member's steps, decoded and multiplied.
// `take_steps(turn)` fills `steps` and `inputs`, kAtOnce of them from turn on.
#pragma once
#include "cuda.h"
#include "gemv_step.cuh"

namespace halfturn::cuda {

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

// Of a matrix with several groups of scales: scaled sums, floats in both modes (in int8 mode by their bits).
template <int kMembers, int kBits, bool kInt8, int kRowTiles, int kAtOnce, class Step, class Take>
__device__ inline void sum_groups(const Table<kBits>& table, const Matrix& m, int pair, int member, int turns,
                                  const Take& take_steps, const Step (&steps)[kAtOnce],
                                  const Inputs<kInt8> (&inputs)[kAtOnce][kRowTiles],
                                  Sum<kInt8> (&sums)[2][kRowTiles][4]) {
  const int in_tiles = int(m.in_tiles), out_tiles = int(m.out_tiles), group_tiles = in_tiles / int(m.groups);
  float scaled[2][kRowTiles][4] = {};
#pragma unroll 1
  for (int turn = 0; turn < turns; turn += kAtOnce) {
    take_steps(turn);
#pragma unroll
    for (int s = 0; s < kAtOnce; ++s) {
      const int c = int(threadIdx.x) & 3, g = (int(threadIdx.x) & 31) >> 2;
      const int tile = 4 * (member + (turn + s) * kMembers), last = min(tile + 3, in_tiles - 1) / group_tiles;
#pragma unroll 1
      for (int group = tile / group_tiles; group <= last; ++group) {
        Inputs<kInt8> kept[kRowTiles];
#pragma unroll
        for (int n = 0; n < kRowTiles; ++n) {
          kept[n] = inputs[s][n];
          kept[n].keep((tile + c) / group_tiles == group);
        }
#pragma unroll
        for (int q = 0; q < 2; ++q) {
          Sum<kInt8> mine[kRowTiles][4] = {};
          multiply<kBits, kInt8, kRowTiles>(table, steps[s].codes[q], kept, mine);
          const int at = min(32 * pair + Step::output(q, g), 16 * out_tiles - 9);  // no second tile: any does
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
  }
#pragma unroll
  for (int q = 0; q < 2; ++q)
#pragma unroll
    for (int n = 0; n < kRowTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if constexpr (kInt8) sums[q][n][i] = __float_as_int(scaled[q][n][i]);
        else sums[q][n][i] = scaled[q][n][i];
}

// Where Table::decode_signs serves: levels of either sign are summed apart.
template <int kBits, int kRowTiles, class Step, class Take>
__device__ inline void sum_signs(const Table<kBits>& table, int turns, const Take& take_steps, const Step& step,
                                 const Inputs<true> (&inputs)[kRowTiles], int (&sums)[2][kRowTiles][4]) {
  constexpr int kPerSign = Table<kBits>::kPerSign;
  int negative[2][kRowTiles][4] = {};
#pragma unroll 1
  for (int turn = 0; turn < turns; ++turn) {
    take_steps(turn);
#pragma unroll
    for (int q = 0; q < 2; ++q)
#pragma unroll
      for (int runs = 0; runs < 2; ++runs) {
        Run above[kPerSign][2], below[kPerSign][2];
        table.decode_signs(step.codes[q], runs, above, below);
#pragma unroll
        for (int part = 0; part < kPerSign; ++part)
#pragma unroll
          for (int n = 0; n < kRowTiles; ++n) {
            const uint32_t first = inputs[n].w[2 * runs], second = inputs[n].w[2 * runs + 1];
            mma(sums[q][n], above[part][0], above[part][1], first, second);
            mma(negative[q][n], below[part][0], below[part][1], first, second);
          }
      }
  }
#pragma unroll
  for (int q = 0; q < 2; ++q)
#pragma unroll
    for (int n = 0; n < kRowTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[q][n][i] -= negative[q][n][i];
}

// All others: of one group of scales, decoded value by value.
template <bool kUsual, int kBits, bool kInt8, int kRowTiles, int kAtOnce, class Step, class Take>
__device__ inline void sum_products(const Table<kBits>& table, int turns, const Take& take_steps,
                                    const Step (&steps)[kAtOnce], const Inputs<kInt8> (&inputs)[kAtOnce][kRowTiles],
                                    Sum<kInt8> (&sums)[2][kRowTiles][4]) {
  const auto all_turns = [&](bool straight) {
    Table<kBits> known = table;  // outside the loop, how 8 bits are decoded
    known.straight = straight;
#pragma unroll 1
    for (int turn = 0; turn < turns; turn += kAtOnce) {
      take_steps(turn);
#pragma unroll
      for (int s = 0; s < kAtOnce; ++s)
#pragma unroll
        for (int q = 0; q < 2; ++q) multiply<kBits, kInt8, kRowTiles>(known, steps[s].codes[q], inputs[s], sums[q]);
    }
  };
  if (kBits == 8 && (kUsual || table.straight)) all_turns(true);
  else all_turns(false);
}

}  // namespace halfturn::cuda
