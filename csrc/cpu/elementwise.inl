// Operations on one row at a time: RMSNorm, SwiGLU, exponentials, the block Hadamard transform, rounding to half
// precision.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels.h"
#include "simd.h"

namespace halfturn::HALFTURN_ISA {

// The rest of a row that does not fill a vector, filled up with zeros; and back.
inline F load_part(const float* p, int64_t count) {
  F v{};
  std::memcpy(&v, p, size_t(count) * sizeof(float));
  return v;
}
inline void store_part(float* p, F v, int64_t count) { std::memcpy(p, &v, size_t(count) * sizeof(float)); }

// work(vector) for every vector of x[0..size) and of the matching y and z, into out.
template <class Work>
inline void map_row(int64_t size, const float* x, const float* y, float* out, Work work) {
  int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) store(out + i, work(load(x + i), load(y + i)));
  if (i < size) store_part(out + i, work(load_part(x + i, size - i), load_part(y + i, size - i)), size - i);
}

void rms_norm(const float* x, const float* weight, const float* mean, int64_t size, double epsilon, float* out) {
  F sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kWidth <= size; i += 4 * kWidth)
    for (int s = 0; s < 4; ++s) {
      F v = load(x + i + s * kWidth);
      sums[s] = fma(v, v, sums[s]);
    }
  for (; i < size; i += kWidth) {
    F v = load_part(x + i, std::min<int64_t>(kWidth, size - i));
    sums[0] = fma(v, v, sums[0]);
  }
  double mean_square = double(sum((sums[0] + sums[1]) + (sums[2] + sums[3]))) / double(size);
  F factor = splat(float(1.0 / std::sqrt(mean_square + epsilon)));
  map_row(size, x, weight, out, [&](F v, F w) { return v * factor * w; });
  if (mean) map_row(size, out, mean, out, [](F v, F m) { return v - m; });
}

void swiglu(const float* gate, const float* up, int64_t size, float* out) {
  map_row(size, gate, up, out, [](F g, F u) { return g / (1.0f + exp(-g)) * u; });
}

double exponentials(const float* x, int64_t size, float maximum, float temperature, float* weights, double* sums) {
  double total = 0;
  float tail[kSumBlock], tail_weights[kSumBlock];
  for (int64_t begin = 0; begin < size; begin += kSumBlock) {
    const int64_t count = std::min(kSumBlock, size - begin);
    const float* from = x + begin;
    float* to = weights && count == kSumBlock ? weights + begin : tail_weights;
    if (count < kSumBlock) {
      std::fill(std::copy(from, from + count, tail), tail + kSumBlock, -std::numeric_limits<float>::infinity());
      from = tail;
    }
    F block{};
    for (int64_t i = 0; i < kSumBlock; i += kWidth) {
      const F weight = exp((load(from + i) - maximum) / temperature);
      store(to + i, weight);
      block += weight;
    }
    if (weights && count < kSumBlock) std::copy(to, to + count, weights + begin);
    const double block_sum = double(sum(block));
    if (sums) sums[begin / kSumBlock] = block_sum;
    total += block_sum;
  }
  return total;
}

// ---- Hadamard transform: butterflies inside a vector, then between vectors, 8 at a time ----

// Lane i of the transform's stage: v[i] + v[i+s] where i has not the bit s, v[i-s] - v[i] where it has.
template <int kStride>
inline F butterfly(F v) {
  const F signs = []<int... kLane>(std::integer_sequence<int, kLane...>) {
    return F{(kLane & kStride ? -1.0f : 1.0f)...};
  }(std::make_integer_sequence<int, kWidth>());
  return fma(v, signs, exchange<kStride>(v));
}

// All stages of a stride below `block`, which may be smaller than a vector.
template <int kStride = 1>
inline F transform_lanes(F v, int64_t block) {
  if constexpr (kStride < kWidth) {
    if (kStride >= block) return v;
    return transform_lanes<kStride * 2>(butterfly<kStride>(v), block);
  }
  return v;
}

// One transform of kCount vectors that stand `step` floats apart.
template <int kCount, bool kLanes>
inline void transform_vectors(float* x, int64_t step, F scale) {
  F v[kCount];
  for (int i = 0; i < kCount; ++i) {
    v[i] = load(x + i * step);
    if constexpr (kLanes) v[i] = transform_lanes(v[i] * scale, kWidth);
  }
  for (int stride = 1; stride < kCount; stride *= 2)
    for (int i = 0; i < kCount; ++i)
      if (!(i & stride)) {
        F a = v[i], b = v[i + stride];
        v[i] = a + b;
        v[i + stride] = a - b;
      }
  for (int i = 0; i < kCount; ++i) store(x + i * step, v[i]);
}

template <bool kLanes>
inline void transform_vectors(float* x, int64_t count, int64_t step, F scale) {
  switch (count) {
    case 1: return transform_vectors<1, kLanes>(x, step, scale);
    case 2: return transform_vectors<2, kLanes>(x, step, scale);
    case 4: return transform_vectors<4, kLanes>(x, step, scale);
    default: return transform_vectors<8, kLanes>(x, step, scale);
  }
}

void hadamard(float* x, int64_t size, int64_t block) {
  if (block <= 1) return;
  const F scale = splat(float(1.0 / std::sqrt(double(block))));
  if (block < kWidth) {
    int64_t i = 0;
    for (; i + kWidth <= size; i += kWidth) store(x + i, transform_lanes(load(x + i) * scale, block));
    if (i < size) store_part(x + i, transform_lanes(load_part(x + i, size - i) * scale, block), size - i);
    return;
  }
  const int64_t vectors = block / kWidth, first = std::min<int64_t>(vectors, 8);
  for (float* start = x; start < x + size; start += block) {
    for (int64_t i = 0; i < vectors; i += first) transform_vectors<true>(start + i * kWidth, first, kWidth, scale);
    for (int64_t done = first; done < vectors;) {
      const int64_t radix = std::min<int64_t>(vectors / done, 8);
      for (int64_t i = 0; i < vectors; i += done * radix)
        for (int64_t j = 0; j < done; ++j)
          transform_vectors<false>(start + (i + j) * kWidth, radix, done * kWidth, scale);
      done *= radix;
    }
  }
}

void round_to_half(const float* x, int64_t size, int64_t padded, float* out) {
  const F limit = splat(65504.0f);
  map_row(size, x, x, out, [&](F v, F) {
    uint16_t halves[kWidth];
    store_half(halves, max(-limit, min(limit, v)));  // NaN stays, of which both take the second
    return load_half(halves);
  });
  std::fill(out + size, out + padded, 0.0f);
}

}  // namespace halfturn::HALFTURN_ISA
