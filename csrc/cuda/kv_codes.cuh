// Reading the KV cache in kernels: addresses, codes to numbers.
#pragma once
#include <cuda_fp16.h>

#include <cstdint>

#include "copies.cuh"
#include "halves.cuh"
#include "kv.h"

namespace halfturn::cuda {

constexpr int kPage = int(kPageSize);

__device__ inline uint8_t* kv_block(const KvView& view, int layer, int32_t page, int head) {
  return view.data + int64_t(page) * view.page_bytes + int64_t(layer * view.kv_heads + head) * view.block_bytes;
}

// Bytes of one position's codes: a multiple of 16.
__host__ __device__ inline int kv_row_bytes(int groups, int bits) { return groups * 4 * bits; }

__device__ inline uint32_t scaled(uint32_t codes, __half2 scale) {
  const uint32_t most_bits = 0x7bff7bffu, least_bits = 0xfbfffbffu;  // 65504, -65504
  const __half2 value = __hmul2(*reinterpret_cast<const __half2*>(&codes), scale);
  const __half2 bounded = __hmax2(__hmin2(value, *reinterpret_cast<const __half2*>(&most_bits)),
                                  *reinterpret_cast<const __half2*>(&least_bits));
  return *reinterpret_cast<const uint32_t*>(&bounded);
}

// Eight codes, the `piece`th of a row, as four pairs of halves times the scale of their group.
template <int kBits>
__device__ inline uint4 load_halves(const uint8_t* row, int piece, const __half* scales) {
  if constexpr (kBits == 16) return *reinterpret_cast<const uint4*>(row + piece * 16);
  const __half2 scale = __half2half2(scales[piece / 4]);
  uint32_t pairs[4];
  if constexpr (kBits == 8) {
    const uint2 words = *reinterpret_cast<const uint2*>(row + piece * 8);
    const uint32_t w[2] = {words.x ^ 0x80808080u, words.y ^ 0x80808080u};
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = scaled(bytes_to_halves(w[i / 2], i % 2), scale);
  } else {
    const uint32_t word = *reinterpret_cast<const uint32_t*>(row + piece * 4) ^ 0x88888888u;
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // byte i: its low half, then its high half
      const uint32_t byte = word >> (8 * i);
      pairs[i] = scaled(subtract((byte & 15) | ((byte & 0xf0) << 12) | kThousands, kNibbleBias), scale);
    }
  }
  return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

}  // namespace halfturn::cuda
