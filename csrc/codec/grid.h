// The grid codec: how the 256 codes of a tile lie in its 8*bits words (FORMAT.md, Tiles). The plain version that
// every backend's decode is compared with, and the row lookup of the embedding.
//
// A tile holds 16 outputs x 16 inputs in the order of the tensor-core fragment m16n8k16: lane l = 0..31 has the
// elements 8l..8l+7. A width is a sum of planes, widest first, the low bits of a code in the first plane. A plane of p
// bits is a little-endian stream of 256*p bits, element t at bit t*p.
#pragma once
#include <cstdint>

#include "../model.h"
#include "half.h"

#ifdef __CUDACC__
#define HALFTURN_HOST_DEVICE __host__ __device__
#else
#define HALFTURN_HOST_DEVICE
#endif

namespace halfturn::grid {

constexpr int kCodes = 256;  // of one tile

// Width of the plane whose lowest bit is bit `shift` of a code: 7 bits are planes of 4 (shift 0), 2 (4) and 1 (6).
HALFTURN_HOST_DEVICE constexpr int plane_width(int bits, int shift) {
  const int left = bits - shift;
  return left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

// Where element t stands in its tile, and the inverse.
HALFTURN_HOST_DEVICE constexpr int output_of(int t) { return (t >> 5) + 8 * ((t >> 2) & 1); }
HALFTURN_HOST_DEVICE constexpr int input_of(int t) { return 2 * ((t >> 3) & 3) + (t & 1) + 8 * ((t >> 1) & 1); }
HALFTURN_HOST_DEVICE constexpr int element_at(int output, int input) {
  return 8 * (4 * (output & 7) + ((input >> 1) & 3)) + 4 * (output >> 3) + 2 * (input >> 3) + (input & 1);
}

// `count` neighbouring codes of one plane from element t on, packed: count * width <= 32 bits that lie in one word.
HALFTURN_HOST_DEVICE inline uint32_t plane_bits(const uint32_t* plane, int width, int t, int count) {
  const int bit = t * width;
  return (plane[bit >> 5] >> (bit & 31)) & uint32_t((uint64_t(1) << (count * width)) - 1);
}

HALFTURN_HOST_DEVICE inline uint32_t code_at(const uint32_t* tile, int bits, int t) {
  uint32_t code = 0;
  for (int shift = 0; shift < bits;) {
    const int width = plane_width(bits, shift);
    code |= plane_bits(tile + 8 * shift, width, t, 1) << shift;
    shift += width;
  }
  return code;
}

// One tile to codes[16 outputs][16 inputs].
HALFTURN_HOST_DEVICE inline void unpack_tile(const uint32_t* tile, int bits, uint8_t* codes) {
  for (int t = 0; t < kCodes; ++t) codes[16 * output_of(t) + input_of(t)] = uint8_t(code_at(tile, bits, t));
}

// codes[16 outputs][16 inputs], each below 2^bits, to the 8*bits words of one tile.
HALFTURN_HOST_DEVICE inline void pack_tile(const uint8_t* codes, int bits, uint32_t* tile) {
  for (int i = 0; i < 8 * bits; ++i) tile[i] = 0;
  for (int t = 0; t < kCodes; ++t) {
    const uint32_t code = codes[16 * output_of(t) + input_of(t)];
    for (int shift = 0; shift < bits;) {
      const int width = plane_width(bits, shift), bit = t * width;
      tile[8 * shift + (bit >> 5)] |= ((code >> shift) & ((1u << width) - 1)) << (bit & 31);
      shift += width;
    }
  }
}

// The 16 codes of one output of a tile, by input. They are four runs of four neighbouring elements.
template <int kBits>
inline void unpack_row(const uint32_t* tile, int output, uint8_t* codes) {
  for (int c = 0; c < 4; ++c) {
    const int t = element_at(output, 2 * c);  // inputs 2c, 2c+1, 2c+8, 2c+9
    uint32_t run[4] = {0, 0, 0, 0};
    for (int shift = 0; shift < kBits;) {
      const int width = plane_width(kBits, shift);
      const uint32_t bits = plane_bits(tile + 8 * shift, width, t, 4);
      for (int i = 0; i < 4; ++i) run[i] |= ((bits >> (i * width)) & ((1u << width) - 1)) << shift;
      shift += width;
    }
    codes[2 * c] = uint8_t(run[0]);
    codes[2 * c + 1] = uint8_t(run[1]);
    codes[2 * c + 8] = uint8_t(run[2]);
    codes[2 * c + 9] = uint8_t(run[3]);
  }
}

template <int kBits>
void decode_row_of(const Linear& linear, int64_t output, float* row) {
  const int64_t out_tiles = linear.out_padded / kTile;
  const int64_t group_size = linear.in_padded / linear.groups;
  const auto* tiles = linear.codes.as<uint32_t>() + output / kTile * 8 * kBits;
  const auto* scales = linear.scales.as<uint16_t>() + output;
  const auto* levels = linear.levels.as<int8_t>();
  uint8_t codes[kTile];
  for (int64_t begin = 0; begin < linear.in; begin += kTile) {
    unpack_row<kBits>(tiles + begin / kTile * out_tiles * 8 * kBits, int(output % kTile), codes);
    const float scale = half_to_float(scales[begin / group_size * linear.out_padded]);
    const int64_t count = linear.in - begin < kTile ? linear.in - begin : kTile;
    for (int64_t i = 0; i < count; ++i) row[begin + i] = float(levels[codes[i]]) * scale;
  }
}

// One output's weights, row[0..in): a token's embedding. Exact: a level times a half-precision scale fits a float.
inline void decode_row(const Linear& linear, int64_t output, float* row) {
  switch (linear.bits) {
    case 2: return decode_row_of<2>(linear, output, row);
    case 3: return decode_row_of<3>(linear, output, row);
    case 4: return decode_row_of<4>(linear, output, row);
    case 5: return decode_row_of<5>(linear, output, row);
    case 6: return decode_row_of<6>(linear, output, row);
    case 7: return decode_row_of<7>(linear, output, row);
    case 8: return decode_row_of<8>(linear, output, row);
  }
}

}  // namespace halfturn::grid
