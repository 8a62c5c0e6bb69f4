// From the codes of the file to the operands of tensor-core products, in registers.
//
// A lane (g, c) = (lane / 4, lane % 4) of a warp takes the outputs g and g + 8 of a tile, all 16 inputs: 32 codes,
// which are four runs of eight neighbouring elements in the file's order (FORMAT.md). Run i holds the inputs 2i, 2i+1,
// 2i+8, 2i+9 of output g and then the same of output g + 8. When the four lanes of a group take four neighbouring tiles
// along the input, run i of the lanes is one fragment of mma.m16n8k16, and two runs are one of m16n8k32: which input
// stands in which slot does not matter as long as the activations use the same order (operand.h).
#pragma once
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/ptx.cuh"

namespace halfturn::cuda {

// Byte i of a word, in one instruction.
__device__ inline uint32_t byte_of(uint32_t word, int i) {
  return i == 0 ? word & 255 : i == 3 ? word >> 24 : permute(word, 0, 0x4440 + i);
}

// The bits of one lane's 32 codes of one tile, plane by plane (FORMAT.md). They are read from global memory, or from a
// copy of the tile in shared memory.
template <int kBits>
struct Codes {
  static constexpr bool kFour = kBits >= 4 && kBits < 8;
  static constexpr int kSmall = kBits == 8 ? 0 : kBits % 4;  // bits in the planes of 2 and 1
  uint32_t eight[kBits == 8 ? 8 : 1];
  uint32_t four[kFour ? 4 : 1];        // word i: run i
  uint32_t two[(kSmall & 2) ? 2 : 1];  // word i: runs 2i and 2i+1
  uint32_t one;                        // byte i: run i

  template <class Read2, class Read4, class Read1>
  __device__ void read(const uint32_t* tile, int g, Read4 read4, Read2 read2, Read1 read1) {
    if constexpr (kBits == 8) {
      const uint4 a = read4(tile + 8 * g), b = read4(tile + 8 * g + 4);
      eight[0] = a.x, eight[1] = a.y, eight[2] = a.z, eight[3] = a.w;
      eight[4] = b.x, eight[5] = b.y, eight[6] = b.z, eight[7] = b.w;
    }
    if constexpr (kFour) {
      const uint4 a = read4(tile + 4 * g);
      four[0] = a.x, four[1] = a.y, four[2] = a.z, four[3] = a.w;
    }
    if constexpr (kSmall & 2) {
      const uint2 a = read2(tile + (kFour ? 32 : 0) + 2 * g);
      two[0] = a.x, two[1] = a.y;
    }
    if constexpr (kSmall & 1) one = read1(tile + (kFour ? 32 : 0) + (kSmall & 2 ? 16 : 0) + g);
  }
  __device__ void load(const uint32_t* tile, int g) {
    read(
        tile, g, [](const uint32_t* p) { return load_once(reinterpret_cast<const uint4*>(p)); },
        [](const uint32_t* p) { return load_once(reinterpret_cast<const uint2*>(p)); },
        [](const uint32_t* p) { return load_once(p); });
  }
  __device__ void load_shared(const uint32_t* tile, int g) {
    read(
        tile, g, [](const uint32_t* p) { return *reinterpret_cast<const uint4*>(p); },
        [](const uint32_t* p) { return *reinterpret_cast<const uint2*>(p); }, [](const uint32_t* p) { return *p; });
  }
};

// Eight nibbles each, of the elements 0 2 4 .. 14 and 1 3 5 .. 15 of two runs.
struct Nibbles {
  uint32_t even, odd;
};

// What the planes of 2 and 1 bits hold of the runs 2 * pair and 2 * pair + 1.
template <int kBits>
__device__ inline Nibbles small_planes(const Codes<kBits>& codes, int pair) {
  Nibbles n = {0, 0};
  if constexpr (Codes<kBits>::kSmall & 2) {
    n.even = codes.two[pair] & 0x33333333;
    n.odd = (codes.two[pair] >> 2) & 0x33333333;
  }
  if constexpr (Codes<kBits>::kSmall & 1) {
    uint32_t z = permute(codes.one, 0, pair ? 0x4342 : 0x4140);  // 16 bits, spread until element j is bit 2j
    z = (z | z << 4) & 0x0f0f0f0f;
    z = (z | z << 2) & 0x33333333;
    z = (z | z << 1) & 0x55555555;
    if constexpr (Codes<kBits>::kSmall & 2) {
      n.even |= (z << 2) & 0x44444444;
      n.odd |= z & 0x44444444;
    } else {
      n.even = z & 0x11111111;
      n.odd = (z >> 2) & 0x11111111;
    }
  }
  return n;
}

// Four nibbles in the low half of x, each to a byte's high half.
__device__ inline uint32_t to_high_nibbles(uint32_t x) {
  x = permute(x, 0, 0x4140);
  return ((x | x << 4) & 0x0f0f0f0f) << 4;
}

// Levels of one run: four of output g, four of output g + 8.
struct Run {
  uint32_t low, high;
};

// Looks codes up in a matrix's table of levels. Up to 4 bits the table lies in registers and bytes are picked from it;
// above, in shared memory, where 128 entries are 32 banks: no two lanes meet in a bank. At 5 bits it may lie in both.
template <int kBits>
struct Table {
  static constexpr bool kShared = kBits > 4;
  static constexpr int kPerSign = kBits == 5 ? 2 : 1;  // runs that decode_signs() makes of one, for each sign
  uint32_t entries[kBits == 5 ? 8 : kBits == 4 ? 4 : kBits == 3 ? 2 : 1];
  const uint8_t* shared;
  bool straight;  // 8 bits: the levels are min(code, 254) - 127
  uint32_t flip;

  // levels: 16-byte aligned. `flip` is xored into every level's byte (0x80 turns int8 into an unsigned byte, 128 more).
  // For kShared, `memory` has 256 bytes; the caller synchronizes the block afterwards.
  __device__ void read(const int8_t* levels, uint8_t flip_byte, uint8_t* memory, bool is_straight) {
    flip = flip_byte * 0x01010101u;
    straight = is_straight;
    shared = memory;
    const auto* words = reinterpret_cast<const uint32_t*>(levels);
    if constexpr (kShared) {
      if (threadIdx.x < 64) reinterpret_cast<uint32_t*>(memory)[threadIdx.x] = words[threadIdx.x] ^ flip;
    } else {
      for (int i = 0; i < int(sizeof entries / 4); ++i) entries[i] = words[i] ^ flip;
    }
  }
  // The same from a copy of the levels in shared memory, which stays there and is flipped already.
  __device__ void take(const uint8_t* copy, uint8_t flip_byte, bool is_straight) {
    flip = flip_byte * 0x01010101u;
    straight = is_straight;
    shared = copy;
    // Mixed with a zero of each lane's own, or they would be known to be the same in all lanes and kept in uniform
    // registers, from where each use would have to move them first.
    if constexpr (kBits <= 5) {
      const auto* words = reinterpret_cast<const uint32_t*>(copy);
      const uint32_t zero = words[32 + (threadIdx.x & 31)] ^ flip;
      for (int i = 0; i < int(sizeof entries / 4); ++i) entries[i] = words[i] ^ zero;
    }
  }

  // Put together by multiplications, as everything else here takes the units for logic.
  __device__ uint32_t look_up(uint32_t a, uint32_t b, uint32_t c, uint32_t d) const {
    return multiply_add(multiply_add(multiply_add(shared[d], 256, shared[c]), 256, shared[b]), 256, shared[a]);
  }
  // A run's codes, in bytes: elements 0 2 4 6 and 1 3 5 7.
  __device__ void look_up_run(uint32_t even, uint32_t odd, Run& run) const {
    run.low = look_up(byte_of(even, 0), byte_of(odd, 0), byte_of(even, 1), byte_of(odd, 1));
    run.high = look_up(byte_of(even, 2), byte_of(odd, 2), byte_of(even, 3), byte_of(odd, 3));
  }

  // The runs 2 * pair and 2 * pair + 1.
  __device__ void decode(const Codes<kBits>& codes, int pair, Run& first, Run& second) const {
    if constexpr (kBits == 8) {
      const uint32_t* w = codes.eight + 4 * pair;
      uint32_t* out[4] = {&first.low, &first.high, &second.low, &second.high};
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (straight) {  // min(code, 254) - 127 in every byte, without borrowing from the next
          const uint32_t is_255 = ((w[i] & 0x7f7f7f7f) + 0x01010101) & w[i] & 0x80808080;
          *out[i] = ((((w[i] | 0x80808080) - 0x7f7f7f7f) ^ (~w[i] & 0x80808080)) - (is_255 >> 7)) ^ flip;
        } else *out[i] = look_up(byte_of(w[i], 0), byte_of(w[i], 1), byte_of(w[i], 2), byte_of(w[i], 3));
    } else if constexpr (kBits == 4) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t w = codes.four[2 * pair + i];
        const uint32_t index = w & 0x77777777, half = ((w >> 1) & 0x44444444) | 0x32103210;
        Run& run = i ? second : first;
        run.low = permute(permute(entries[0], entries[1], index), permute(entries[2], entries[3], index), half);
        run.high = permute(permute(entries[0], entries[1], index >> 16), permute(entries[2], entries[3], index >> 16),
                           half >> 16);
      }
    } else if constexpr (kBits < 4) {
      const Nibbles n = small_planes<kBits>(codes, pair);
      const uint32_t top = entries[kBits == 3 ? 1 : 0];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t even = permute(entries[0], top, n.even >> (16 * i));
        const uint32_t odd = permute(entries[0], top, n.odd >> (16 * i));
        Run& run = i ? second : first;
        run.low = permute(even, odd, 0x5140);
        run.high = permute(even, odd, 0x7362);
      }
    } else if constexpr (kBits == 6) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t w = codes.four[2 * pair + i];
        // Bytes 0 0 1 1 of the run's 16 bits: bits 0-1 and 4-5 are of even elements, 2-3 and 6-7 of odd ones.
        const uint32_t p = permute(codes.two[pair], 0, i ? 0x3322 : 0x1100);
        const uint32_t high_even = ((p << 4) & 0x00ff00ff) | (p & 0xff00ff00);
        const uint32_t high_odd = ((p << 2) & 0x00ff00ff) | ((p >> 2) & 0xff00ff00);
        const uint32_t even = (w & 0x0f0f0f0f) | (high_even & 0x30303030);
        const uint32_t odd = ((w >> 4) & 0x0f0f0f0f) | (high_odd & 0x30303030);
        Run& run = i ? second : first;
        look_up_run(even, odd, run);
      }
    } else {
      const Nibbles n = small_planes<kBits>(codes, pair);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t w = codes.four[2 * pair + i];
        const uint32_t even = (w & 0x0f0f0f0f) | to_high_nibbles(n.even >> (16 * i));       // elements 0 2 4 6
        const uint32_t odd = ((w >> 4) & 0x0f0f0f0f) | to_high_nibbles(n.odd >> (16 * i));  // 1 3 5 7
        Run& run = i ? second : first;
        look_up_run(even, odd, run);
      }
    }
  }

  // 2 and 3 bits: the same two runs with their even elements in the first and their odd ones in the second result,
  // which takes less than putting them in order. Of each output, first run 2 * pair, then the next.
  __device__ void decode_parted(const Codes<kBits>& codes, int pair, Run& evens, Run& odds) const {
    static_assert(kBits < 4);
    const uint32_t two = permute(codes.two[pair], 0, 0x3120);  // bytes: output g of both runs, output g + 8 of both
    uint32_t even = two & 0x33333333, odd = (two >> 2) & 0x33333333;
    if constexpr (kBits == 3) {
      // Four bits to each byte in the order of `two`, which products then spread: bits 0 and 2, or 1 and 3, come to be
      // bits 2 and 6, behind those of the other plane. What else the products leave, in bits 4 and 5, is not chosen.
      const uint32_t one = permute(codes.one, 0, pair ? 0x3232 : 0x1010);
      const uint32_t four = choose(0x0000ffff, one, one >> 4);
      even = choose(0x33333333, two, (four & 0x05050505) * 0x14);
      odd = choose(0x33333333, two >> 2, (four & 0x0a0a0a0a) * 0x0a);
    }
    const uint32_t top = entries[kBits == 3 ? 1 : 0];
    evens = {permute(entries[0], top, even), permute(entries[0], top, even >> 16)};
    odds = {permute(entries[0], top, odd), permute(entries[0], top, odd >> 16)};
  }

  // 4 and 5 bits: whether the lower half of the levels is negative or zero and the upper one positive or zero.
  __device__ bool splits_at_zero() const {
    static_assert(kBits == 4 || kBits == 5);
    uint32_t wrong = 0;
#pragma unroll
    for (int i = 0; i < 2 * kPerSign; ++i) wrong |= __vneg4(entries[i]) | entries[2 * kPerSign + i];
    return (wrong & 0x80808080) == 0;
  }
  // Then each run is the sum of kPerSign runs less that of as many others, of which only one is not zero at each
  // element: where the highest bit of its nibble is set, a permutation gives a byte's sign, and these are all zero.
  __device__ void decode_signs(const Codes<kBits>& codes, int pair, Run (&above)[kPerSign][2],
                               Run (&below)[kPerSign][2]) const {
    static_assert(kBits == 4 || kBits == 5);
    constexpr uint32_t kHighest = 0x88888888;
    const uint32_t one = kBits == 5 ? codes.one : 0, ones[2] = {one & 0x55555555, one & 0xaaaaaaaa};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t w = codes.four[2 * pair + i];
      uint32_t top = w, low = 0;  // in each nibble's highest bit: the code's highest, and at 5 bits the next one
      if constexpr (kBits == 5) {
        // Bit j of a run's eight goes to bit 4j + 3: products put copies of those with even and with odd j 6 bits
        // apart, of which one each is kept. Where copies meet they carry into bits that are not kept.
        const uint32_t even = permute(ones[0], 0, 0x4440 + 2 * pair + i);
        const uint32_t odd = permute(ones[1], 0, 0x4440 + 2 * pair + i);
        top = (even * 0x00208208 & 0x08080808) | (odd * 0x01041040 & 0x80808080);
        low = w;
      }
#pragma unroll
      for (int part = 0; part < kPerSign; ++part)
#pragma unroll
        for (int sign = 0; sign < 2; ++sign) {
          const uint32_t pick = (part ? low ^ kHighest : low) | (sign ? top ^ kHighest : top);
          const int at = 2 * (kPerSign * sign + part);
          const uint32_t first = sign ? entries[at] : __vneg4(entries[at]);
          const uint32_t second = sign ? entries[at + 1] : __vneg4(entries[at + 1]);
          (sign ? above : below)[part][i] = Run{permute(first, second, pick), permute(first, second, pick >> 16)};
        }
    }
  }
};

// Four unsigned bytes, each 128 above a level, to two pairs of halves: exact.
__device__ inline void to_halves(uint32_t bytes, uint32_t& first, uint32_t& second) {
  const __half2 offset = __halves2half2(__ushort_as_half(0x6480), __ushort_as_half(0x6480));      // 1024 + 128
  const uint32_t a = permute(bytes, 0x64646464, 0x4140), b = permute(bytes, 0x64646464, 0x4342);  // 1024 + byte
  const __half2 x = __hsub2(*reinterpret_cast<const __half2*>(&a), offset);
  const __half2 y = __hsub2(*reinterpret_cast<const __half2*>(&b), offset);
  first = *reinterpret_cast<const uint32_t*>(&x);
  second = *reinterpret_cast<const uint32_t*>(&y);
}

// acc [16 outputs x 8 rows] += weights [16 x 32] * activations [32 x 8], int8.
__device__ inline void mma(int (&acc)[4], const Run& first, const Run& second, uint32_t b0, uint32_t b1) {
  multiply(acc, {first.low, first.high, second.low, second.high}, b0, b1);
}

// A run as the halves of a fragment of mma.m16n8k16.
struct HalfRun {
  uint32_t a[4];
  __device__ explicit HalfRun(const Run& run) {
    to_halves(run.low, a[0], a[2]);
    to_halves(run.high, a[1], a[3]);
  }
};

// acc [16 x 8] += weights [16 x 16] * activations [16 x 8], half with float32 sums.
__device__ inline void mma(float (&acc)[4], const HalfRun& run, uint32_t b0, uint32_t b1) {
  multiply_in_place(acc, run.a, b0, b1);
}

}  // namespace halfturn::cuda
