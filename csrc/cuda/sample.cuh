// What the kernels of sample.cu work on: a row's work space, and the numbers by which tokens are compared and summed.
#pragma once
#include "launch.cuh"
#include "sample.h"

namespace halfturn::cuda {
namespace {

typedef unsigned long long u64;  // what atomicAdd takes

constexpr int kTile = 256, kPerLane = kTile / 32;  // tokens of one warp
constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kBlockTokens = kWarps * kTile;
constexpr int kChooseThreads = 1024, kChooseWarps = kChooseThreads / 32;
constexpr int kBins = 4096;  // of a histogram
constexpr int kShift = 18;   // 32 bins per power of two of a weight, as keep_nucleus has
constexpr int kWeightBins = (0x3f800000 >> kShift) + 1;
constexpr int kCountShift = 40;  // a bin: tokens << 40 | sum of their weights' last 18 bits
constexpr int kSorted = 2048;    // tokens sorted in shared memory; more go through global memory
constexpr int kDigits = 256;
constexpr uint32_t kAll = 0xffffffff;
constexpr u64 kNever = ~u64(0);
constexpr float kSmallest = 1.17549435e-38f;  // normal
constexpr uint32_t kImpossible = 0x007fffff;  // ordered(-inf)
static_assert(kWeightBins <= kBins);
static_assert(u64(kBlockTokens) << kShift <= kAll && u64(kMaxVocab) << kShift <= u64(1) << kCountShift);

struct Largest {
  float raw, adjusted;
  int32_t token, nan;
};

struct Job {
  const float* logits;
  int64_t stride;
  int vocab;
  const SampleSettings* settings;
  const LogitEdit* edits;
  uint8_t* workspace;
  SampleResult* results;
};

// One row: its logits and its part of the work space, whose parts are found from the number of blocks.
struct Row {
  const float* logits;
  uint8_t* base;
  int vocab, blocks, tiles;

  static __host__ __device__ int blocks_of(int vocab) { return (vocab + kBlockTokens - 1) / kBlockTokens; }
  static __host__ __device__ int64_t bytes(int blocks) {
    return 2 * kBins * 8 + blocks * (kPerBlock + 12 * kBlockTokens);
  }

  __device__ Row(const Job& job, int row)
      : logits(job.logits + row * job.stride),
        base(job.workspace + row * bytes(blocks_of(job.vocab))),
        vocab(job.vocab),
        blocks(blocks_of(job.vocab)),
        tiles((job.vocab + kTile - 1) / kTile) {}

  __device__ u64* histogram() const { return at<u64>(0, 0); }
  __device__ u64* raw_histogram() const { return histogram() + kBins; }
  __device__ Largest* largest() const { return at<Largest>(0); }  // [blocks]
  // [tiles]: sums of the weights and of e^(raw logit - largest raw logit), and the largest key.
  __device__ u64* sums() const { return at<u64>(16); }
  __device__ u64* raw_sums() const { return at<u64>(16 + 8 * kWarps); }
  __device__ uint32_t* best() const { return at<uint32_t>(16 + 16 * kWarps); }
  __device__ uint32_t* raw_best() const { return at<uint32_t>(16 + 20 * kWarps); }
  // [tokens]; order is for sorting.
  __device__ float* adjusted() const { return at<float>(kPerBlock); }
  __device__ float* weights() const { return at<float>(kPerBlock + 4 * kBlockTokens); }
  __device__ uint32_t* order() const { return at<uint32_t>(kPerBlock + 8 * kBlockTokens); }
  __device__ const float* source(const SampleSettings& s) const { return s.edits > 0 ? adjusted() : logits; }

 private:
  static constexpr int kPerBlock = sizeof(Largest) + 24 * kWarps;
  template <class T>
  __device__ T* at(int per_block, int fixed = 2 * kBins * 8) const {
    return reinterpret_cast<T*>(base + fixed + int64_t(blocks) * per_block);
  }
};
static_assert(sizeof(Largest) == 16);

// e^((logit - maximum) / temperature), the exp of csrc/cpu/simd.h.
__device__ inline float weight_of(float logit, float maximum, float temperature) {
  const float x = __fdiv_rn(__fsub_rn(logit, maximum), temperature);
  const float clamped = fminf(fmaxf(x, -87.3f), 88.0f);
  const float shifted = __fmaf_rn(clamped, 1.44269504f, 12582912.0f);
  const float n = __fsub_rn(shifted, 12582912.0f);
  const float r = __fmaf_rn(n, 2.12194440e-4f, __fmaf_rn(-n, 0.693359375f, clamped));
  float p = 1.9875691500e-4f;
  p = __fmaf_rn(p, r, 1.3981999507e-3f);
  p = __fmaf_rn(p, r, 8.3334519073e-3f);
  p = __fmaf_rn(p, r, 4.1665795894e-2f);
  p = __fmaf_rn(p, r, 1.6666665459e-1f);
  p = __fmaf_rn(p, r, 5.0000001201e-1f);
  p = __fadd_rn(__fmaf_rn(__fmul_rn(p, r), r, r), 1.0f);
  const float scale = __int_as_float((__float_as_int(shifted) - 0x4b400000 + 127) << 23);
  return x < -87.3f ? 0.0f : __fmul_rn(p, scale);
}

// Weights (at most 1) as integers.
__device__ inline u64 fixed(float weight) { return __float2ull_rz(weight * 0x1p44f); }

// Integers in the order of the floats; 0 and -0 are one number.
__device__ inline uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(__fadd_rn(x, 0.0f));
  return bits >> 31 ? ~bits : bits | 0x80000000;
}
__device__ inline float from_ordered(uint32_t key) { return __uint_as_float(key >> 31 ? key & 0x7fffffff : ~key); }

// The bin of a logit: 0 holds the best, and a larger logit is never in a higher one.
__device__ inline int bin_of(float logit, float maximum) {
  return int(fminf(__fmul_rn(__fsub_rn(maximum, logit), 64.0f), float(kBins - 1)));
}

// The weight of all tokens of a bin of weights.
__device__ inline u64 mass_of(u64 packed, int bin) {
  const u64 leading = u64((bin & 31) << kShift | 1 << 23);
  const u64 mantissas = (packed >> kCountShift) * leading + (packed & ((u64(1) << kCountShift) - 1));
  const int shift = (bin >> 5) - 106;  // 2^(exponent - 127 - 23 + 44)
  return shift >= 0 ? mantissas << shift : shift > -64 ? mantissas >> -shift : 0;
}

// Below this weight a token is no candidate, if the weights of all have the sum `total`.
__device__ inline float lowest_weight(const SampleSettings& s, int vocab, double total) {
  const float outside = float((1.0 - double(s.top_p)) * total / double(vocab));
  return fmaxf(fmaxf(outside, s.min_p), kSmallest);
}

}  // namespace
}  // namespace halfturn::cuda
