// Reading the KV cache in kernels: addresses, codes to numbers.
#pragma once
#include <cuda_fp16.h>

#include <cstdint>

#include "copies.cuh"
#include "kv.h"

namespace halfturn::cuda {

constexpr int kPage = int(kPageSize);

__device__ inline uint8_t* kv_block(const KvView& view, int layer, int32_t page, int head) {
  return view.data + int64_t(page) * view.page_bytes + int64_t(layer * view.kv_heads + head) * view.block_bytes;
}

// Bytes of one position's codes: a multiple of 16.
__host__ __device__ inline int kv_row_bytes(int groups, int bits) { return groups * 4 * bits; }

// 2^x, relative error under 2^-22; results below 2^-126 are 0.
__device__ inline float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- Eight codes, the `piece`th of a row, as numbers that the scale is still missing from ----
// Integers become floats or halves by putting them into the low bits of 2^23 or 1024 and subtracting that: conversion
// instructions run at a quarter of the rate.

__device__ inline float from_low_bits(uint32_t word, uint32_t byte) {
  return __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7540u | byte));
}

template <int kBits>
__device__ inline void load_codes(const uint8_t* row, int piece, float (&x)[8]) {
  if constexpr (kBits == 16) {
    const uint4 words = *reinterpret_cast<const uint4*>(row + piece * 16);
    const uint32_t w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&w[i]));
      x[2 * i] = pair.x;
      x[2 * i + 1] = pair.y;
    }
  } else if constexpr (kBits == 8) {
    const uint2 words = *reinterpret_cast<const uint2*>(row + piece * 8);
    const uint32_t low = words.x ^ 0x80808080u, high = words.y ^ 0x80808080u;  // code + 128
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      x[i] = from_low_bits(low, i) - 8388736.0f;
      x[i + 4] = from_low_bits(high, i) - 8388736.0f;
    }
  } else {
    const uint32_t word = *reinterpret_cast<const uint32_t*>(row + piece * 4) ^ 0x88888888u;  // code + 8
    const uint32_t even = word & 0x0f0f0f0fu, odd = (word >> 4) & 0x0f0f0f0fu;
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      x[2 * i] = from_low_bits(even, i) - 8388616.0f;
      x[2 * i + 1] = from_low_bits(odd, i) - 8388616.0f;
    }
  }
}

// The same as four pairs of halves, times the scale.
__device__ inline __half2 scaled_pair(uint32_t bits, uint32_t offset, __half2 scale) {
  const uint32_t most_bits = 0x7bff7bffu, least_bits = 0xfbfffbffu;  // 65504, -65504
  const __half2 code = __hsub2(*reinterpret_cast<__half2*>(&bits), *reinterpret_cast<__half2*>(&offset));
  const __half2 value = __hmin2(__hmul2(code, scale), *reinterpret_cast<const __half2*>(&most_bits));
  return __hmax2(value, *reinterpret_cast<const __half2*>(&least_bits));
}

template <int kBits>
__device__ inline uint4 load_halves(const uint8_t* row, int piece, const __half* scales) {
  if constexpr (kBits == 16) return *reinterpret_cast<const uint4*>(row + piece * 16);
  const __half2 scale = __half2half2(scales[piece / 4]);
  __half2 pairs[4];
  if constexpr (kBits == 8) {
    const uint2 words = *reinterpret_cast<const uint2*>(row + piece * 8);
    const uint32_t w[2] = {words.x ^ 0x80808080u, words.y ^ 0x80808080u};
#pragma unroll
    for (int i = 0; i < 4; ++i)  // bytes 0x64 and code + 128: the half 1024 + 128 + code
      pairs[i] = scaled_pair(__byte_perm(w[i / 2], 0x64646464u, i % 2 ? 0x4342u : 0x4140u), 0x64806480u, scale);
  } else {
    const uint32_t word = *reinterpret_cast<const uint32_t*>(row + piece * 4) ^ 0x88888888u;
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // byte i: its low half, then its high half
      const uint32_t byte = word >> (8 * i);
      pairs[i] = scaled_pair((byte & 15) | ((byte & 0xf0) << 12) | 0x64006400u, 0x64086408u, scale);
    }
  }
  return *reinterpret_cast<uint4*>(pairs);
}

}  // namespace halfturn::cuda
