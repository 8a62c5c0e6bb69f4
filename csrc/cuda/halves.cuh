// Small integers to halves.
#pragma once
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/ptx.cuh"

namespace halfturn::cuda {

__device__ inline float clamp_to_half(float x) { return fminf(fmaxf(x, -65504.0f), 65504.0f); }

__device__ inline uint32_t to_halves(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// Integers become halves by putting them into the low bits of 1024 and subtracting that, with what makes them unsigned:
// conversion instructions run at a quarter of the rate.
constexpr uint32_t kThousands = 0x64006400;                           // two halves of 1024
constexpr uint32_t kByteBias = 0x64806480, kNibbleBias = 0x64086408;  // 1024 + 128, 1024 + 8
__device__ inline uint32_t subtract(uint32_t pair, uint32_t bias) {
  const __half2 x = __hsub2(*reinterpret_cast<const __half2*>(&pair), *reinterpret_cast<const __half2*>(&bias));
  return *reinterpret_cast<const uint32_t*>(&x);
}
// Two of four bytes, each 128 above its value: the first two or the last two.
__device__ inline uint32_t bytes_to_halves(uint32_t bytes, bool last) {
  return subtract(__byte_perm(bytes, kThousands | kThousands >> 8, last ? 0x4342 : 0x4140), kByteBias);
}
// The lowest nibble of each half word, each 8 above its value.
__device__ inline uint32_t nibbles_to_halves(uint32_t nibbles) {
  return subtract((nibbles & 0x000f000fu) | kThousands, kNibbleBias);
}

}  // namespace halfturn::cuda
