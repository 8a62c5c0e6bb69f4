// Vectors of floats for kernels that are written once and compiled per instruction set (see kernels.h).
// F holds kWidth floats: 16 with AVX-512, 8 with AVX2, 4 otherwise. GCC's and clang's vector extensions do the
// arithmetic.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>

#include "../codec/half.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace halfturn::HALFTURN_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float F __attribute__((vector_size(4 * kWidth)));
typedef int32_t I __attribute__((vector_size(4 * kWidth)));

inline F load(const float* p) {
  F v;
  std::memcpy(&v, p, sizeof(F));
  return v;
}
inline void store(float* p, F v) { std::memcpy(p, &v, sizeof(F)); }
inline F splat(float x) { return x - F{}; }  // x + 0 would be an addition: it turns -0 into 0

// a * b + c, rounded once where the instruction set can; never left to the compiler's choice where rows must agree.
inline F fma(F a, F b, F c) {
#if defined(__AVX512F__)
  return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// Lane i becomes lane i ^ kStride.
template <int kStride>
inline F exchange(F v) {
  return [v]<int... kLane>(std::integer_sequence<int, kLane...>) {
    return __builtin_shufflevector(v, v, (kLane ^ kStride)...);
  }(std::make_integer_sequence<int, kWidth>());
}

inline F max(F a, F b) { return a > b ? a : b; }
inline F min(F a, F b) { return a < b ? a : b; }
inline F abs(F a) { return (F)((I)a & 0x7fffffff); }

// Sum and maximum of the lanes, always in the same order.
template <int kStride = kWidth / 2>
inline float sum(F v) {
  v += exchange<kStride>(v);
  if constexpr (kStride > 1) return sum<kStride / 2>(v);
  else return v[0];
}
template <int kStride = kWidth / 2>
inline float maximum(F v) {
  v = max(v, exchange<kStride>(v));
  if constexpr (kStride > 1) return maximum<kStride / 2>(v);
  else return v[0];
}

// e^x for x <= 88, relative error under 2e-7; 0 below -87. Range reduction by ln 2 in two parts, polynomial of degree 5
// (Cephes expf).
inline F exp(F x) {
  F clamped = min(max(x, splat(-87.3f)), splat(88.0f));
  F shifted = clamped * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to the nearest integer
  F n = shifted - 12582912.0f;
  F r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
  F p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  I exponent = ((I)shifted - 0x4b400000 + 127) << 23;
  F result = p * (F)exponent;
  return x < splat(-87.3f) ? F{} : result;
}

// IEEE half precision, rounding to nearest even; the plain versions are exact for every value.
inline float half_to_float(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  return halfturn::half_to_float(h);
#endif
}
inline uint16_t float_to_half(float value) {
#if defined(__F16C__)
  return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude >= 0x7f800000) return uint16_t(sign | 0x7c00 | (magnitude > 0x7f800000 ? 0x200 : 0));
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);
  if (magnitude < 0x38800000) {  // subnormal: the float unit rounds for us
    float shifted;
    std::memcpy(&shifted, &magnitude, 4);
    shifted += 0.5f;
    std::memcpy(&magnitude, &shifted, 4);
    return uint16_t(sign | (magnitude - 0x3f000000));
  }
  magnitude += 0xfff + ((magnitude >> 13) & 1) - (112u << 23);
  return uint16_t(sign | (magnitude >> 13));
#endif
}

// kWidth halves to floats and back.
inline F load_half(const uint16_t* p) {
#if defined(__AVX512F__)
  return (F)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  return (F)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  F v;
  for (int i = 0; i < kWidth; ++i) v[i] = half_to_float(p[i]);
  return v;
#endif
}
inline void store_half(uint16_t* p, F v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kWidth; ++i) p[i] = float_to_half(v[i]);
#endif
}
// kWidth signed bytes to floats.
inline F load_int8(const int8_t* p) {
#if defined(__AVX512F__)
  return (F)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
  return (F)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  F v;
  for (int i = 0; i < kWidth; ++i) v[i] = float(p[i]);
  return v;
#endif
}

}  // namespace halfturn::HALFTURN_ISA
