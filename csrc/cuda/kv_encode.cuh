// What becomes of one head of a new token, held by one warp: RoPE, R3, and codes for the KV cache. Shared by the
// kernels of rope.cu and attention.cu, which must give the same bits: so every product and sum that the compiler might
// contract is spelled out.
//
// The element 32 * g + lane is in x[g] of each lane, zeros behind head_dim. So the values that share a scale are one
// register of the warp.
#pragma once
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>

#include "cuda/ptx.cuh"

namespace halfturn::cuda {

// How one position turns a head: element i and its partner, head_dim/2 away, become own[g] * x + other[g] * partner.
template <int kGroups>
struct Turn {
  float own[kGroups], other[kGroups];
  // angles [2, dim/2]: cosines, then sines.
  __device__ __forceinline__ void load(const float* angles, int dim, int lane) {
    const int half = dim / 2;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int i = 32 * g + lane;
      own[g] = other[g] = 0.0f;
      if (i < half) own[g] = angles[i], other[g] = -angles[i + half];
      else if (i < dim) own[g] = angles[i - half], other[g] = angles[i];
    }
  }
  __device__ __forceinline__ void apply(const float* from, int dim, int lane, float (&x)[kGroups]) const {
    const int half = dim / 2;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int i = 32 * g + lane;
      float mine = 0.0f, partner = 0.0f;
      if (i < dim) mine = from[i], partner = from[i < half ? i + half : i - half];
      x[g] = fmaf(mine, own[g], __fmul_rn(partner, other[g]));
    }
  }
};

template <int kGroups>
__device__ __forceinline__ void load_head(const float* from, int dim, int lane, float (&x)[kGroups]) {
#pragma unroll
  for (int g = 0; g < kGroups; ++g) x[g] = 32 * g + lane < dim ? from[32 * g + lane] : 0.0f;
}

// The orthonormal block Hadamard transform. Strides below 32 are between lanes, the others between registers. Blocks
// lie inside head_dim, so that the zeros behind it stay zeros.
template <int kGroups>
__device__ __forceinline__ void hadamard_head(float (&x)[kGroups], int block, float scale, int lane) {
#pragma unroll
  for (int g = 0; g < kGroups; ++g) x[g] = __fmul_rn(x[g], scale);
#pragma unroll
  for (int stride = 1; stride < 32; stride *= 2)
    if (stride < block)
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const float other = __shfl_xor_sync(0xffffffffu, x[g], stride);
        x[g] = lane & stride ? __fsub_rn(other, x[g]) : __fadd_rn(other, x[g]);
      }
#pragma unroll
  for (int step = 1; step < kGroups; step *= 2)
    if (step * 32 < block)
#pragma unroll
      for (int g = 0; g < kGroups; ++g)
        if (!(g & step)) {
          const float a = x[g], b = x[g + step];
          x[g] = __fadd_rn(a, b);
          x[g + step] = __fsub_rn(a, b);
        }
}

// ---- Codes ----

struct KvScale {
  __half half;
  float value, inverse;
  __device__ explicit KvScale(float scale) : half(__float2half_rn(fminf(fmaxf(scale, -65504.0f), 65504.0f))) {
    value = __half2float(half);
    // 1 / value, right to the last bit for every half (tests/test_attention.py): a division proper takes a call.
    const float guess = reciprocal(value);
    inverse = value == 0.0f ? 0.0f : fmaf(guess, fmaf(-value, guess, 1.0f), guess);
  }
};

__device__ inline float round_code(float x, float inverse, float lowest, float highest) {
  return rintf(fmaxf(fminf(__fmul_rn(x, inverse), highest), lowest));
}

template <class Combine>
__device__ inline float across_warp(float x, Combine combine) {
#pragma unroll
  for (int offset = 16; offset; offset /= 2) x = combine(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}

// The largest magnitude of a warp's numbers, NaN aside: numbers that are not negative are in the order of their bits.
__device__ inline float largest_magnitude(float x) {
  return __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(fmaxf(fabsf(x), 0.0f))));
}

// x / 127 for x >= 0, right to the last bit, of what makes a scale: the most that half precision has, at most.
__device__ inline float over_127(float x) {
  constexpr float kPart = 1.0f / 127.0f;
  x = fminf(x, 127.0f * 65504.0f);
  const float quotient = __fmul_rn(x, kPart);
  return fmaf(fmaf(-127.0f, quotient, x), kPart, quotient);
}

// The largest magnitude becomes +-127.
template <int kGroups>
__device__ __forceinline__ void store_bytes(const float (&x)[kGroups], int8_t* codes, __half* scales, int groups,
                                            int lane) {
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const KvScale scale(over_127(largest_magnitude(x[g])));
    if (g >= groups) continue;
    codes[32 * g + lane] = int8_t(int(round_code(x[g], scale.inverse, -127.0f, 127.0f)));
    if (lane == 0) scales[g] = scale.half;
  }
}

// As the CPU does it (cpu/kv_store.inl): of the scales that put the value of the largest magnitude at -7 .. -9, the one
// of the least squared error.
template <int kGroups>
__device__ __forceinline__ void store_nibbles(const float (&x)[kGroups], uint8_t* codes, __half* scales, int groups,
                                              int lane) {
  const auto smaller = [](float a, float b) { return fminf(a, b); };
  const auto larger = [](float a, float b) { return fmaxf(a, b); };
  const auto add = [](float a, float b) { return __fadd_rn(a, b); };
  float extreme[kGroups], least[kGroups], best[kGroups];
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const float lowest = across_warp(x[g], smaller), highest = across_warp(x[g], larger);
    extreme[g] = -lowest > highest ? lowest : highest;
    best[g] = KvScale(extreme[g] / -8.0f).value;
    least[g] = INFINITY;
  }
#pragma unroll 1  // the groups are enough to do at a time, all of it would take too many registers
  for (int i = 0; i < 5; ++i)
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const KvScale scale(extreme[g] / (-7.0f - 0.5f * float(i)));
      const float miss = fmaf(-round_code(x[g], scale.inverse, -8.0f, 7.0f), scale.value, x[g]);
      const float error = across_warp(__fmul_rn(miss, miss), add);
      if (error < least[g]) {
        least[g] = error;
        best[g] = scale.value;
      }
    }
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const KvScale scale(best[g]);  // of a half already
    const int code = int(round_code(x[g], scale.inverse, -8.0f, 7.0f)) & 15;
    const int next = __shfl_down_sync(0xffffffffu, code, 1);
    if (g >= groups) continue;
    if (lane % 2 == 0) codes[16 * g + lane / 2] = uint8_t(code | next << 4);
    if (lane == 0) scales[g] = scale.half;
  }
}

template <int kGroups>
__device__ __forceinline__ void store_halves(const float (&x)[kGroups], __half* values, int groups, int lane) {
#pragma unroll
  for (int g = 0; g < kGroups; ++g)
    if (g < groups) {  // comparisons, which let NaN through
      const float clamped = x[g] > 65504.0f ? 65504.0f : x[g] < -65504.0f ? -65504.0f : x[g];
      values[32 * g + lane] = __float2half_rn(clamped);
    }
}

// Codes of one position, kv_row_bytes() of them, and its scales.
template <int kGroups>
__device__ __forceinline__ void encode_head(const float (&x)[kGroups], int bits, uint8_t* codes, __half* scales,
                                            int groups, int lane) {
  if (bits == 16) store_halves(x, reinterpret_cast<__half*>(codes), groups, lane);
  else if (bits == 8) store_bytes(x, reinterpret_cast<int8_t*>(codes), scales, groups, lane);
  else store_nibbles(x, codes, scales, groups, lane);
}

}  // namespace halfturn::cuda
