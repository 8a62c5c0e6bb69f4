// Products of 2 bits without decoding. Levels -b -a a b are (a + b) h + (b - a) l - b of a code's bits h and l, and an
// int8 activation x is the sum of its bits x_p times 2^p (of the last, -2^7). So sum(level * x) takes no more than how
// often h and x_p, and l and x_p, are both 1: tensor cores count that, and the codes need not leave the words that they
// lie in. All sums are integers, hence the same as those of decoded levels. Of a row the eight x_p are the eight
// columns of a product, so that a second row would take a product of its own: this pays for one.
//
// Codes stand two bits to an element in words of 16 (FORMAT.md); activations as words of planes: [pairs of steps, tiles
// 4, planes 8], a word's bit 2i + s the bit of element i of step s of the two. Shifted and masked they meet the codes'
// low or their high bits.
#pragma once
#include "decode.cuh"
#include "row_operand.cuh"

namespace halfturn::cuda {

// Four neighbouring inputs of each lane, a pair of steps of a warp, become the word of planes that lane l stores as
// word plane_word(l) of the pair. Their sum is added to `sum`.
__device__ inline uint32_t to_planes(const float4& v, float inverse, int& sum) {
  const int lane = int(threadIdx.x) & 31;
  // A lane has s, the tile, n1 and n0 of its inputs' number, bits of which the last two count the inputs, b1 and b0. A
  // word's bits are numbered b0 b1 p2 p1 p0 at first, where p is the plane. They are to be n0 b1 n1 b0 s (run n0 b1,
  // element n1 b0), so these change places: in the word, then with other lanes.
  uint32_t w = __byte_perm(__byte_perm(code_of(v.x, inverse), code_of(v.z, inverse), 0x0040),
                           __byte_perm(code_of(v.y, inverse), code_of(v.w, inverse), 0x0040), 0x5410);
  sum = add_bytes(w, sum);
  const uint32_t other = (w ^ w >> 14) & 0x0000cccc;
  w ^= other ^ other << 14;
  const auto exchange = [&](int lanes, uint32_t low, int distance) {
    const bool upper = lane & lanes;
    const uint32_t theirs = __shfl_xor_sync(~0u, w, lanes);
    w = choose(upper ? ~low : low, w, __funnelshift_l(theirs, theirs, upper ? 32 - distance : distance));
  };
  exchange(1, 0x0000ffff, 16);
  exchange(2, 0x0f0f0f0f, 4);
  exchange(16, 0x55555555, 1);
  return w;
}
__device__ inline int plane_word(int lane) {
  return 8 * (lane >> 2 & 3) + 4 * (lane >> 1 & 1) + 2 * (lane & 1) + (lane >> 4);
}

// How often both bits were 1 in a step or several: of the codes' high and low bits, of two tiles of outputs.
struct PlaneSums {
  int high[2][4] = {}, low[2][4] = {};
};

// A word of activations for the codes of one step, the first (0) or second (1) of its pair.
struct PlaneInputs {
  uint32_t low, high;
  __device__ PlaneInputs(uint32_t word, int step) : low((word >> step) & 0x55555555), high(low << 1) {}
};

// A lane's codes of one step: words of output g and g + 8, of two tiles.
struct PlaneCodes {
  uint32_t word[2][2];
  __device__ explicit PlaneCodes(const Codes<2> (&codes)[2]) {
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      word[q][0] = permute(codes[q].two[0], codes[q].two[1], 0x6420);
      word[q][1] = permute(codes[q].two[0], codes[q].two[1], 0x7531);
    }
  }
};
__device__ inline void count(PlaneSums& sums, const PlaneCodes& codes, const PlaneInputs& x) {
#pragma unroll
  for (int q = 0; q < 2; ++q) {
    count_common(sums.high[q], codes.word[q][0], codes.word[q][1], x.high);
    count_common(sums.low[q], codes.word[q][0], codes.word[q][1], x.low);
  }
}
__device__ inline void count(PlaneSums& sums, const PlaneCodes& codes, const PlaneCodes& next, const PlaneInputs& x,
                             const PlaneInputs& y) {
#pragma unroll
  for (int q = 0; q < 2; ++q) {
    const uint32_t words[4] = {codes.word[q][0], codes.word[q][1], next.word[q][0], next.word[q][1]};
    count_common(sums.high[q], words, x.high, y.high);
    count_common(sums.low[q], words, x.low, y.low);
  }
}

// What a lane (g, c) multiplies its sums of the planes 2c and 2c + 1 by, and what all sums of a row are less by, times
// the sum of its activations.
struct PlaneLevels {
  int high[2], low[2], less;
  __device__ explicit PlaneLevels(const uint8_t* levels) {
    const int a = int8_t(levels[2]), b = int8_t(levels[3]), c = int(threadIdx.x) & 3;
    const int first = 1 << (2 * c), second = c == 3 ? -128 : 2 << (2 * c);
    high[0] = (a + b) * first, high[1] = (a + b) * second, low[0] = (b - a) * first, low[1] = (b - a) * second;
    less = b;
  }
  // Of all planes: output g (c 0 and 2) or g + 8 (1 and 3) of the first (0 and 1) or the second tile.
  __device__ int sum(const PlaneSums& sums) const {
    const int c = int(threadIdx.x) & 3;
    int of[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int *ones = sums.high[i / 2] + i % 2 * 2, *others = sums.low[i / 2] + i % 2 * 2;
      of[i] = ones[0] * high[0] + ones[1] * high[1] + others[0] * low[0] + others[1] * low[1];
    }
    // Each lane of the four keeps what it is to have, and hands on the rest.
    const int first = (c & 1 ? of[1] : of[0]) + __shfl_xor_sync(~0u, c & 1 ? of[0] : of[1], 1);
    const int second = (c & 1 ? of[3] : of[2]) + __shfl_xor_sync(~0u, c & 1 ? of[2] : of[3], 1);
    return (c & 2 ? second : first) + __shfl_xor_sync(~0u, c & 2 ? first : second, 2);
  }
};

}  // namespace halfturn::cuda
