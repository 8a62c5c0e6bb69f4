// What a new token does before attention: RoPE, R3, and its keys and values into the KV cache as codes.
#pragma once
#include <algorithm>
#include <limits>

#include "../pages.h"
#include "elementwise.inl"
#include "simd.h"

namespace halfturn::HALFTURN_ISA {

// The scale of up to 32 values in half precision, and 1 / scale (0 for a scale of 0).
struct Scale {
  uint16_t half;
  float value, inverse;
  explicit Scale(float scale)
      : half(float_to_half(std::clamp(scale, -65504.0f, 65504.0f))), value(half_to_float(half)) {
    inverse = value == 0.0f ? 0.0f : 1.0f / value;
  }
};

inline F round_codes(F x, float inverse, float lowest, float highest) {
  const F magic = splat(12582912.0f);  // adding 1.5 * 2^23 rounds to the nearest integer
  const F clamped = max(min(x * inverse, splat(highest)), splat(lowest));
  return (clamped + magic) - magic;
}

// codes[0..32) and the scale of 32 values (zeros where there are fewer): 8 bits, the largest becomes +-127.
inline uint16_t encode_bytes(const float* x, float* codes) {
  F largest{};
  for (int i = 0; i < 32; i += kWidth) largest = max(largest, abs(load(x + i)));
  const Scale scale(maximum(largest) / 127.0f);
  for (int i = 0; i < 32; i += kWidth) store(codes + i, round_codes(load(x + i), scale.inverse, -127.0f, 127.0f));
  return scale.half;
}

// 4 bits: the code -8 has no positive partner, so the value of the largest magnitude gets it. Of a few scales that put
// it at -7 .. -9 (a little clipping pays), the one of the least squared error: on N(0, 1) the mean square error is
// .0068; dividing by the largest magnitude / 7 gives .0094.
inline uint16_t encode_nibbles(const float* x, float* codes) {
  F low = load(x), high = low;
  for (int i = kWidth; i < 32; i += kWidth) {
    low = min(low, load(x + i));
    high = max(high, load(x + i));
  }
  const float lowest = -maximum(-low), highest = maximum(high);
  const float extreme = -lowest > highest ? lowest : highest;
  Scale best(extreme / -8.0f);
  float least = std::numeric_limits<float>::infinity();
  for (float target = -7.0f; target >= -9.0f; target -= 0.5f) {
    const Scale scale(extreme / target);
    F error{};
    for (int i = 0; i < 32; i += kWidth) {
      const F value = load(x + i), miss = value - round_codes(value, scale.inverse, -8.0f, 7.0f) * scale.value;
      error = fma(miss, miss, error);
    }
    const float now = sum(error);
    if (now < least) {
      least = now;
      best = scale;
    }
  }
  for (int i = 0; i < 32; i += kWidth) store(codes + i, round_codes(load(x + i), best.inverse, -8.0f, 7.0f));
  return best.half;
}

inline void store_key(const KvPool& pool, const KvBlock& block, int64_t slot, const float* k) {
  const int64_t dim = pool.head_dim();
  auto* halves = reinterpret_cast<uint16_t*>(block.k);
  for (int64_t g = 0; g * 32 < dim; ++g) {
    const int64_t begin = g * 32, dims = std::min<int64_t>(32, dim - begin);
    float x[32] = {}, codes[32];
    std::copy(k + begin, k + begin + dims, x);
    if (pool.k_bits() == 16) {
      for (int64_t i = 0; i < dims; ++i)
        halves[(begin + i) * 32 + slot] = float_to_half(std::clamp(x[i], -65504.0f, 65504.0f));
    } else if (pool.k_bits() == 8) {
      block.k_scales[begin + slot] = encode_bytes(x, codes);
      for (int64_t i = 0; i < dims; ++i) block.k[(begin + i) * 32 + slot] = uint8_t(int8_t(codes[i]));
    } else {
      block.k_scales[begin + slot] = encode_nibbles(x, codes);
      for (int64_t i = 0; i < dims; i += 2)
        block.k[(begin + i) * 16 + slot] = uint8_t((int(codes[i]) & 15) | (int(codes[i + 1]) & 15) << 4);
    }
  }
}

inline void store_value(const KvPool& pool, const KvBlock& block, int64_t slot, const float* v) {
  const int64_t dim = pool.head_dim();
  auto* halves = reinterpret_cast<uint16_t*>(block.v);
  for (int64_t g = 0; g * 32 < dim; ++g) {
    const int64_t row = g * 32 + slot;  // of 32 values
    float x[32] = {}, codes[32];
    std::copy(v + g * 32, v + std::min(dim, g * 32 + 32), x);
    if (pool.v_bits() == 16) {
      for (int i = 0; i < 32; ++i) halves[row * 32 + i] = float_to_half(std::clamp(x[i], -65504.0f, 65504.0f));
    } else if (pool.v_bits() == 8) {
      block.v_scales[row] = encode_bytes(x, codes);
      for (int i = 0; i < 32; ++i) block.v[row * 32 + i] = uint8_t(int8_t(codes[i]));
    } else {
      block.v_scales[row] = encode_nibbles(x, codes);
      for (int i = 0; i < 16; ++i)
        block.v[row * 16 + i] = uint8_t((int(codes[i]) & 15) | (int(codes[i + 16]) & 15) << 4);
    }
  }
}

// Pairs (i, i + head_dim/2) of one head turned by the position's angles, as Hugging Face pairs them.
inline void rotate(float* x, const float* rotary, int64_t dim) {
  const int64_t half = dim / 2;
  for (int64_t i = 0; i < half; i += kWidth) {
    const int64_t count = std::min<int64_t>(kWidth, half - i);
    const auto get = [&](const float* p) { return count == kWidth ? load(p) : load_part(p, count); };
    const F a = get(x + i), b = get(x + half + i), cosine = get(rotary + i), sine = get(rotary + half + i);
    store_part(x + i, a * cosine - b * sine, count);
    store_part(x + half + i, b * cosine + a * sine, count);
  }
}

void rope_and_store(KvPool& pool, int64_t layer, int32_t page, int64_t slot, const float* rotary, int64_t heads,
                    float* q, float* k, const float* v) {
  const int64_t dim = pool.head_dim(), kv_heads = pool.kv_heads();
  for (int64_t h = 0; h < heads; ++h) rotate(q + h * dim, rotary, dim);
  for (int64_t h = 0; h < kv_heads; ++h) rotate(k + h * dim, rotary, dim);
  hadamard(q, heads * dim, pool.r3_block());
  hadamard(k, kv_heads * dim, pool.r3_block());
  for (int64_t h = 0; h < kv_heads; ++h) {
    const KvBlock block = pool.block(layer, page, h);
    store_key(pool, block, slot, k + h * dim);
    store_value(pool, block, slot, v + h * dim);
  }
}

}  // namespace halfturn::HALFTURN_ISA
