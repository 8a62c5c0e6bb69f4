// One row of floats becomes an operand: the steps that the kernels of rows.cu and gemv.cuh share, so that both give the
// same bits. So sums and products that the compiler might contract, here one way and there another, are spelled out.
#pragma once
#include <cuda_fp16.h>

#include <cmath>

#include "cuda/ptx.cuh"
#include "gemv.h"
#include "operand.h"

namespace halfturn::cuda {

__device__ inline float shuffle_sum(float v) {
  for (int d = 16; d; d >>= 1) v += __shfl_xor_sync(~0u, v, d);
  return v;
}
// Of numbers that are not negative: these are in the order of their bits.
__device__ inline float warp_max(float v) { return __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(v))); }
// The largest magnitude; NaN counts as infinite, so that fmaxf() hands it on to the row's scale and so to the logits.
__device__ inline float magnitude(const float4& v) {
  return fminf(max_or_nan(max_or_nan(fabsf(v.x), fabsf(v.y)), max_or_nan(fabsf(v.z), fabsf(v.w))), INFINITY);
}

// What turns values into codes or halves.
struct RowScale {
  float factor;   // of the norm, 1 without one
  float inverse;  // codes per value before the factor
  float scale;    // of the codes
};

// From the sums of squares and the largest magnitudes of the 32 slots that chunks are dealt to (chunk c to slot
// c % 32); every thread of a warp calls it with its lane's slot.
__device__ inline float norm_factor(float squares, int size, float epsilon) {
  // Divisions that are right to the last bit take a call, for which everything in uniform registers has to move.
  return rsqrtf(__fadd_rn(__fdividef(shuffle_sum(squares), float(size)), epsilon));
}
__device__ inline RowScale row_scale(float largest, float factor = 1.0f) {
  largest = warp_max(largest);
  RowScale s;
  s.factor = factor;
  s.inverse = largest > 0 ? __fdividef(127.0f, largest) : 0.0f;
  s.scale = largest * s.factor * (1.0f / 127.0f);
  return s;
}

__device__ inline float4 floats_of(uint2 halves) {
  const float2 low = __half22float2(*reinterpret_cast<const __half2*>(&halves.x));
  const float2 high = __half22float2(*reinterpret_cast<const __half2*>(&halves.y));
  return {low.x, low.y, high.x, high.y};
}

// A norm's values, which are v times its factor, less their means.
__device__ inline float4 shifted(const float4& v, float factor, uint2 mean) {
  const float4 m = floats_of(mean);
  return {__fmaf_rn(v.x, factor, -m.x), __fmaf_rn(v.y, factor, -m.y), __fmaf_rn(v.z, factor, -m.z),
          __fmaf_rn(v.w, factor, -m.w)};
}

// Four neighbouring inputs e .. e+3 of row `row` (of `rows`) into an operand's memory (operand.h). `kParted`: of two
// words, the first holds the even elements and the second the odd ones, as Table::decode_parted() has them.
template <bool kParted = false>
__device__ inline int64_t operand_at(int e, int row, int rows) {
  const int n = (e >> 2) & 3;  // the inputs 4n .. 4n+3 of a tile are two pairs, in neighbouring words
  return (int64_t(uint32_t(e) / kStep) * rows + row) * kStep + (e & 48) + 8 * (n & 1) + (kParted ? 1 : 2) * (n >> 1);
}
// The lowest byte is the code of x: adding 1.5 * 2^23 rounds to the nearest integer, and conversions are slow.
__device__ inline uint32_t code_of(float x, float inverse) {
  return __float_as_uint(__fadd_rn(__fmul_rn(x, inverse), 12582912.0f));
}
template <bool kParted = false>
__device__ inline void put_codes(int8_t* at, const float4& v, float inverse) {
  const auto code = [&](float x) { return code_of(x, inverse); };
  if constexpr (kParted) {
    at[0] = int8_t(code(v.x)), at[4] = int8_t(code(v.y)), at[2] = int8_t(code(v.z)), at[6] = int8_t(code(v.w));
  } else {
    *reinterpret_cast<uint16_t*>(at) = uint16_t(__byte_perm(code(v.x), code(v.y), 0x0040));
    *reinterpret_cast<uint16_t*>(at + 4) = uint16_t(__byte_perm(code(v.z), code(v.w), 0x0040));
  }
}
__device__ inline void put_halves(uint16_t* at, const float4& v, float factor) {
  const auto bounded = [&](float x) { return min_or_nan(max_or_nan(x * factor, -65504.0f), 65504.0f); };
  *reinterpret_cast<__half2*>(at) = __floats2half2_rn(bounded(v.x), bounded(v.y));
  *reinterpret_cast<__half2*>(at + 4) = __floats2half2_rn(bounded(v.z), bounded(v.w));
}

// The squares of x[0..3] onto `squares`.
__device__ inline void add_squares(const float4& a, float& squares) {
  squares = fmaf(a.w, a.w, fmaf(a.z, a.z, fmaf(a.y, a.y, fmaf(a.x, a.x, squares))));
}

// x[0..3] * weight[0..3].
__device__ inline float4 weighted(const float4& a, uint2 weight) {
  const float4 w = floats_of(weight);
  return {a.x * w.x, a.y * w.y, a.z * w.z, a.w * w.w};
}

}  // namespace halfturn::cuda
