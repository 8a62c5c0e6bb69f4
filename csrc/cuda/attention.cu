// Attention of single query rows on tensor cores, in two kernels: one block per chunk of positions, KV head and row,
// which reads the keys and values once for up to 8 query heads that share them; then the chunks of each row are added.
//
// A block takes kChunk positions at a time, each warp 16 of its own, neighbours in memory. A warp copies their codes
// into its own part of shared memory, the next ones as soon as there is room, and does a softmax of its own over all it
// sees, so that the warps meet only at the end, where their results are added. Both products have a warp's positions or
// dimensions as rows and query heads as columns: scores [16 positions, 8 heads] = keys * queries, and
// sums [dimensions, 8 heads] += values * weights. Codes become halves in registers. Lane (g, c) = (lane / 4, lane % 4)
// has the rows g and g + 8 and the heads 2c and 2c + 1 of either result.
//
// decode_rope_attention() does in the same kernel what rope.cu does before: each block turns its queries, and the one
// that reaches the row's own position also encodes that position's key and value, two warps of it. They go into shared
// memory, from where the warp that has the position takes them as if copied from the cache, and into the cache.
#include <algorithm>
#include <cmath>
#include <numbers>

#include "attention.h"
#include "halves.cuh"
#include "kv_codes.cuh"
#include "kv_encode.cuh"
#include "launch.cuh"

namespace halfturn::cuda {

namespace {

constexpr int kWarps = 8;
constexpr int kOwn = kChunk / kWarps;  // positions of a warp at a time
constexpr int kHeads = 8;              // query heads at a time
constexpr unsigned kAll = 0xffffffffu;
static_assert(kOwn == 16 && kPage % kOwn == 0 && kHeads == kWarps);

// Bytes between a warp's positions in shared memory, such that lanes that read together meet no bank twice.
__host__ __device__ constexpr int key_pitch(int dim, int bits) { return (dim / 32 | 1) * 4 * bits; }
__host__ __device__ constexpr int value_pitch(int dim, int bits) { return (dim * bits / 256 | 1) * 32; }

// Of a warp's part of shared memory: keys and their scales, then values and theirs where there is room for both, else
// in the place of the keys once these are done with. Results in the end take the place of all.
struct WarpMemory {
  int bytes, v;
  bool together;  // keys and values
};
__host__ __device__ constexpr bool fit_together(int dim, int k_bits, int v_bits) {
  return kOwn * (key_pitch(dim, k_bits) + value_pitch(dim, v_bits) + dim / 8) <= 10 << 10;
}

// The position, of a warp's first 8, that is row `row` of a product; so are the ones 8 behind. Chosen for the banks.
__device__ __forceinline__ int position_of(int row) { return row ^ (row >> 2); }

// Eight neighbouring codes as pairs of neighbours; at 4 bits, as the pairs (i, i + 4).
template <int kBits>
__device__ __forceinline__ void load_pairs(const uint8_t* from, uint32_t (&pairs)[4]) {
  if constexpr (kBits == 16) {
    const uint4 words = *reinterpret_cast<const uint4*>(from);
    pairs[0] = words.x, pairs[1] = words.y, pairs[2] = words.z, pairs[3] = words.w;
  } else if constexpr (kBits == 8) {
    const uint2 words = *reinterpret_cast<const uint2*>(from);
    const uint32_t low = words.x ^ 0x80808080u, high = words.y ^ 0x80808080u;
    pairs[0] = bytes_to_halves(low, false), pairs[1] = bytes_to_halves(low, true);
    pairs[2] = bytes_to_halves(high, false), pairs[3] = bytes_to_halves(high, true);
  } else {
    const uint32_t word = *reinterpret_cast<const uint32_t*>(from) ^ 0x88888888u;
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = nibbles_to_halves(word >> (4 * i));
  }
}

// scores <- keys times queries; `query`: of head g.
template <int kBits, int kDim>
__device__ __forceinline__ void score(const uint8_t* keys, int groups, const __half* query, float (&scores)[4],
                                      int lane) {
  constexpr int kPitch = key_pitch(kDim, kBits);
  const int position = position_of(lane / 4), c = lane % 4;
  const uint8_t* low = keys + position * kPitch + c * kBits;
  const __half* scales = reinterpret_cast<const __half*>(keys + kOwn * kPitch) + position * groups;
#pragma unroll
  for (int i = 0; i < 4; ++i) scores[i] = 0.0f;
#pragma unroll
  for (int group = 0; group < kDim / 32; ++group) {
    if (group >= groups) break;
    uint32_t a[4], b[4];
    load_pairs<kBits>(low + group * (4 * kBits), a);
    load_pairs<kBits>(low + 8 * kPitch + group * (4 * kBits), b);
    float sums[4] = {};
    const uint4 words = *reinterpret_cast<const uint4*>(query + 32 * group + 8 * c);
    uint32_t q[4] = {words.x, words.y, words.z, words.w};
    if constexpr (kBits == 4) {  // in the order of load_pairs()
      q[0] = __byte_perm(words.x, words.z, 0x5410), q[1] = __byte_perm(words.x, words.z, 0x7632);
      q[2] = __byte_perm(words.y, words.w, 0x5410), q[3] = __byte_perm(words.y, words.w, 0x7632);
    }
    multiply(kBits == 16 ? scores : sums, {a[0], b[0], a[1], b[1]}, q[0], q[1]);
    multiply(kBits == 16 ? scores : sums, {a[2], b[2], a[3], b[3]}, q[2], q[3]);
    if constexpr (kBits < 16) {
      const float first = __half2float(scales[group]), second = __half2float(scales[8 * groups + group]);
      scores[0] = fmaf(sums[0], first, scores[0]), scores[1] = fmaf(sums[1], first, scores[1]);
      scores[2] = fmaf(sums[2], second, scores[2]), scores[3] = fmaf(sums[3], second, scores[3]);
    }
  }
}

// What a lane has of the warp's softmax: the largest score so far of its two heads, in units of log 2, and the sums of
// the weights relative to it of its own positions.
struct Softmax {
  float largest[2] = {-INFINITY, -INFINITY}, total[2] = {};
  // Scores of the first `count` positions, at least one, to weights in halves, as the right operand of a product;
  // `factors`: what was added up before is to be multiplied by these.
  __device__ __forceinline__ void add(float (&scores)[4], int count, uint32_t (&weights)[2], float (&factors)[2],
                                      int lane) {
    const int position = position_of(lane / 4);
    if (position >= count) scores[0] = scores[1] = -INFINITY;
    if (position + 8 >= count) scores[2] = scores[3] = -INFINITY;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float most = fmaxf(scores[i], scores[i + 2]);
#pragma unroll
      for (int offset = 4; offset < 32; offset *= 2) most = fmaxf(most, __shfl_xor_sync(kAll, most, offset));
      most = fmaxf(most, largest[i]);
      factors[i] = power_of_two(largest[i] - most);  // 0 at first
      largest[i] = most;
      scores[i] = power_of_two(scores[i] - most), scores[i + 2] = power_of_two(scores[i + 2] - most);
      total[i] = fmaf(total[i], factors[i], scores[i] + scores[i + 2]);
    }
    weights[0] = transpose(to_halves(scores[0], scores[1]));
    weights[1] = transpose(to_halves(scores[2], scores[3]));
  }
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int offset = 4; offset < 32; offset *= 2)
#pragma unroll
      for (int i = 0; i < 2; ++i) total[i] += __shfl_xor_sync(kAll, total[i], offset);
  }
};

// Which dimensions are a lane's: of each of kPieces runs of kRun that are 8 * kRun apart, the run g; two neighbours are
// the rows g and g + 8 of a product.
template <int kBits, int kDim>
struct Runs {
  static constexpr int kDims = kDim / 8, kRun = kDims * kBits > 128 ? 128 / kBits : kDims, kPieces = kDims / kRun;
  static constexpr int kWords = kRun * kBits / 32;
};

// sums += values times weights: value i of a lane's dimensions, in the order of their runs, at sums[i / 2][2 * (i % 2)]
// for the head 2c, behind that for 2c + 1. Positions from `count` on hold zeros, but their scales anything.
template <int kBits, int kDim>
__device__ __forceinline__ void add_values(const uint8_t* values, int groups, int count, const uint32_t (&weights)[2],
                                           float (&sums)[kDim / 16][4], int lane) {
  using R = Runs<kBits, kDim>;
  constexpr int kPitch = value_pitch(kDim, kBits);
  const int g = lane / 4, c = lane % 4;
  // Of the product's columns 2c, 2c + 1, 2c + 8, 2c + 9.
  const int positions[2] = {position_of(2 * c), position_of(2 * c + 1)};
#pragma unroll
  for (int piece = 0; piece < R::kPieces; ++piece) {
    const int run = 8 * piece + g;
    uint32_t words[4][R::kWords];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint8_t* from = values + (positions[i % 2] + i / 2 * 8) * kPitch + run * (R::kWords * 4);
      if constexpr (R::kWords == 4) {
        const uint4 v = *reinterpret_cast<const uint4*>(from);
        words[i][0] = v.x, words[i][1] = v.y, words[i][2] = v.z, words[i][3] = v.w;
      } else if constexpr (R::kWords == 2) {
        const uint2 v = *reinterpret_cast<const uint2*>(from);
        words[i][0] = v.x, words[i][1] = v.y;
      } else {
        words[i][0] = *reinterpret_cast<const uint32_t*>(from);
      }
    }
    [[maybe_unused]] __half2 scales[2];  // of two positions each
    if constexpr (kBits < 16) {
      const auto* all = reinterpret_cast<const __half*>(values + kOwn * kPitch) + min(run * R::kRun / 32, groups - 1);
      const __half most = __ushort_as_half(0x5fff), zero = __ushort_as_half(0);  // 511.75: times 128 is a half
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        __half pair[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int position = positions[j] + 8 * i;
          pair[j] = position < count ? __hmin(__hmax(all[position * groups], __hneg(most)), most) : zero;
        }
        scales[i] = __halves2half2(pair[0], pair[1]);
      }
    }
    const auto scaled = [&](uint32_t codes, int which) {
      const __half2 x = __hmul2(*reinterpret_cast<const __half2*>(&codes), scales[which]);
      return *reinterpret_cast<const uint32_t*>(&x);
    };
#pragma unroll
    for (int i = 0; i < R::kRun / 2; ++i) {  // two dimensions
      uint32_t a[4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t *first = words[2 * half], *second = words[2 * half + 1];
        uint32_t &even = a[2 * half], &odd = a[2 * half + 1];
        if constexpr (kBits == 16) {
          even = __byte_perm(first[i], second[i], 0x5410), odd = __byte_perm(first[i], second[i], 0x7632);
        } else if constexpr (kBits == 8) {
          const uint32_t four = __byte_perm(first[i / 2], second[i / 2], i % 2 ? 0x7362 : 0x5140) ^ 0x80808080u;
          even = scaled(bytes_to_halves(four, false), half), odd = scaled(bytes_to_halves(four, true), half);
        } else {
          const uint32_t four = __byte_perm(first[i / 4], second[i / 4], i % 4 / 2 ? 0x7632 : 0x5410) ^ 0x88888888u;
          even = scaled(nibbles_to_halves(four >> (i % 2 * 8)), half);
          odd = scaled(nibbles_to_halves(four >> (i % 2 * 8 + 4)), half);
        }
      }
      multiply(sums[piece * (R::kRun / 2) + i], a, weights[0], weights[1]);
    }
  }
}

// results [heads, kDim] <- the sums.
template <int kBits, int kDim>
__device__ __forceinline__ void put_results(const float (&sums)[kDim / 16][4], int heads, float* results, int lane) {
  using R = Runs<kBits, kDim>;
  const int g = lane / 4, c = lane % 4;
#pragma unroll
  for (int i = 0; i < kDim / 16; ++i) {
    const int d = (i / (R::kRun / 2) * 8 + g) * R::kRun + i % (R::kRun / 2) * 2;
#pragma unroll
    for (int j = 0; j < 2; ++j)
      if (2 * c + j < heads)
        *reinterpret_cast<float2*>(results + (2 * c + j) * kDim + d) = make_float2(sums[i][j], sums[i][j + 2]);
  }
}

// write(head, d, sums of d and d + 1, largest score, total weight) for what `active` warps' results [heads, kDim], each
// `bytes` behind the one before, add up to; the block shares the work.
template <int kDim, class Write>
__device__ __forceinline__ void add_warps(int heads, int active, const float (&maxima)[kWarps][kHeads],
                                          const float (&totals)[kWarps][kHeads], const uint8_t* results, int bytes,
                                          const Write& write) {
#pragma unroll 1
  for (int at = 2 * int(threadIdx.x); at < heads * kDim; at += 64 * kWarps) {
    const int h = at / kDim;
    float factors[kWarps], largest = -INFINITY, total = 0.0f;
    float2 sum = {0.0f, 0.0f};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      factors[w] = w < active ? maxima[w][h] : -INFINITY;
      largest = fmaxf(largest, factors[w]);
    }
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      if (w >= active) break;
      const float factor = power_of_two(factors[w] - largest);
      const float2 result = *reinterpret_cast<const float2*>(results + w * bytes + at * 4);
      total = fmaf(totals[w][h], factor, total);
      sum.x = fmaf(result.x, factor, sum.x), sum.y = fmaf(result.y, factor, sum.y);
    }
    write(h, at % kDim, sum, largest, total);
  }
}

// What the projections left of the rows' keys and values; without `rotary` the queries are turned already, and the
// cache has the rows' own positions.
struct Arrival {
  const float *rotary = nullptr, *k = nullptr, *v = nullptr;
  int64_t kv_stride = 0;
  float r3_scale = 1.0f;
};

// One position's codes, a multiple of 16 bytes up to 512, and scales.
__device__ __forceinline__ void put_row(uint8_t* codes, __half* scales, const uint8_t* from, const __half* from_scales,
                                        int groups, int bits, int lane) {
  if (lane * 16 < kv_row_bytes(groups, bits))
    reinterpret_cast<uint4*>(codes)[lane] = reinterpret_cast<const uint4*>(from)[lane];
  if (bits < 16 && lane < groups) scales[lane] = from_scales[lane];
}

// Grid: (chunks, kv_heads, rows). kBits: of keys and values, or 0 where the view says: the less code, the sooner it is
// there, as every launch fetches it anew.
template <int kDim, int kBits>
__global__ void __launch_bounds__(32 * kWarps, kDim > 128 ? 1 : 2)
    chunk_kernel(KvView view, int layer, RowsView rows, Arrival arrival, int heads, const float* q, int64_t q_stride,
                 float scale, WarpMemory memory, float* partial, float* out, int64_t out_stride) {
  constexpr int kGroups = kDim / 32, kKeyWarp = kWarps - 1, kValueWarp = kWarps - 2;
  HALFTURN_LAUNCHED_MEMORY(uint8_t, 16, shared);
  __shared__ __align__(16) __half queries[kHeads][kDim + 32];
  __shared__ float maxima[kWarps][kHeads], totals[kWarps][kHeads];
  __shared__ __align__(16) uint8_t new_codes[2][kDim * 2];  // of the row's own position: key, value
  __shared__ __half new_scales[2][kGroups];
  let_next_start();
  const int warp = int(threadIdx.x) / 32, own_lane = int(threadIdx.x) % 32;
  const int chunk = int(blockIdx.x), kv_head = int(blockIdx.y), group = heads / view.kv_heads, groups = view.groups;
  const int dim = view.head_dim, k_bits = kBits ? kBits : view.k_bits, v_bits = kBits ? kBits : view.v_bits;
  const bool together = kBits ? fit_together(kDim, kBits, kBits) : memory.together;
  const int64_t row = blockIdx.z;
  uint8_t *const keys = shared + warp * memory.bytes, *const values = keys + memory.v;  // of this warp
  // Rows and pages are copied to the card before a step's first kernel, so they are there already.
  const int position = rows.positions[row], length = chunk_length(position), begin = chunk * length;
  const int32_t* pages = rows.pages + int64_t(rows.sequences[row]) * rows.page_stride;
  if (position < begin) {                 // also -1
    if (chunk == 0) wait_for_previous();  // a kernel of which no block waited could end before those ahead of it
    return;
  }

  const bool turns = arrival.rotary != nullptr, encodes = turns && position < begin + length && warp >= kValueWarp;
  const bool is_key = warp == kKeyWarp;
  const int end = min(begin + length, position + 1), active = min(kWarps, (end - begin + kOwn - 1) / kOwn);
  // The warp's positions of the kChunk that begin at `from`: `count` of them, of which the cache has `stored`.
  struct Part {
    int first, count, stored;
    int32_t page;
  };
  const auto part_at = [&](int from) {
    Part p;
    p.first = from + warp * kOwn;
    p.count = min(kOwn, end - p.first);
    p.stored = turns ? min(p.count, position - p.first) : p.count;
    p.page = p.count > 0 ? pages[p.first / kPage] : 0;
    return p;
  };
  const auto copy = [&](const Part& p, uint8_t* to, int pitch, int codes, int scales, int bits) {
    if (p.count > 0) {
      const uint8_t* block = kv_block(view, layer, p.page, kv_head);
      const int bytes = kv_row_bytes(groups, bits), slot = p.first % kPage;
      // As many lanes to a row as it may have pieces of 16 bytes, a power of two.
      const int shift = (kGroups == 2 ? 1 : kGroups == 4 ? 2 : 3) + (bits == 4 ? 0 : bits == 8 ? 1 : 2);
      const int at = (own_lane & ((1 << shift) - 1)) * 16;
      const uint8_t* from = block + codes + slot * bytes + at;
      // Through a shuffle, so that no part of it is known to be the same in all lanes: copy_16_once().
      const uint32_t start = __shfl_sync(kAll, uint32_t(__cvta_generic_to_shared(to)), own_lane);
      if (at < bytes)
#pragma unroll 1
        for (int r = own_lane >> shift; r < kOwn; r += 32 >> shift)
          copy_16_once(start + uint32_t(r * pitch + at), from + r * bytes, r < p.stored);
      if (bits < 16) start_copy(to + kOwn * pitch, block + scales + slot * groups * 2, kOwn * groups * 2, own_lane, 32);
    }
    commit_copies();
  };
  const int k_pitch = key_pitch(kDim, k_bits), v_pitch = value_pitch(kDim, v_bits);
  const auto copy_keys = [&](const Part& p) { copy(p, keys, k_pitch, 0, view.k_scales, k_bits); };
  const auto copy_values = [&](const Part& p) { copy(p, values, v_pitch, view.v, view.v_scales, v_bits); };
  const auto take_new = [&](const Part& p, uint8_t* to, int pitch, int which, int bits) {
    if (p.stored == p.count || p.count <= 0) return;  // the row's own position is the last of them
    __half* scales = reinterpret_cast<__half*>(to + kOwn * pitch) + p.stored * groups;
    put_row(to + p.stored * pitch, scales, new_codes[which], new_scales[which], groups, bits, own_lane);
    __syncwarp();
  };

  // With `turns`, nothing that may still run writes the older positions: a step writes a layer's cache only here, each
  // row its own position, and between steps there are copies, which wait for the kernels before them to end and let
  // none behind them begin early. So their keys and values are on their way while the projections still run. (The
  // scales copied with them may hold those of the new position, which take_new() replaces.)
  if (!turns) wait_for_previous();
  const int32_t new_page = encodes ? pages[position / kPage] : 0;
  Turn<kGroups> turn;
#pragma unroll 1
  for (int from = 0; from < group; from += kHeads) {
    copy_keys(part_at(begin));
    if (together) copy_values(part_at(begin));
    if (turns && from == 0) {
      if (warp < group || (encodes && is_key)) turn.load(arrival.rotary + int64_t(position) * dim, dim, own_lane);
      wait_for_previous();
    }
    // Not to be seen through, or the compiler computes the addresses of every width of codes ahead of the loop, for
    // which registers do not suffice.
    int lane = own_lane;
    hide(lane);
    const int heads_now = min(kHeads, group - from);
    const bool encodes_now = encodes && from == 0;
#pragma unroll 1
    for (int pass = encodes_now ? 0 : 1; pass < 2; ++pass) {  // the new position's key or value, then a query
      const bool new_one = pass == 0;
      float x[kGroups] = {};
      if (new_one || warp < heads_now) {
        const int64_t kv_at = row * arrival.kv_stride + int64_t(kv_head) * dim;
        const float* head = !new_one ? q + row * q_stride + (int64_t(kv_head) * group + from + warp) * dim
                            : is_key ? arrival.k + kv_at
                                     : arrival.v + kv_at;
        if (turns && (!new_one || is_key)) {
          turn.apply(head, dim, lane, x);
          if (view.r3_block > 1) hadamard_head(x, view.r3_block, arrival.r3_scale, lane);
        } else {
          load_head(head, dim, lane, x);
        }
      }
      if (new_one) {
        encode_head(x, is_key ? k_bits : v_bits, new_codes[!is_key], new_scales[!is_key], groups, lane);
      } else {
#pragma unroll
        for (int g = 0; g < kGroups; ++g) queries[warp][32 * g + lane] = __float2half_rn(clamp_to_half(x[g] * scale));
      }
    }
    __syncthreads();
    if (encodes_now) {
      const int bits = is_key ? k_bits : v_bits, slot = position % kPage;
      uint8_t* new_block = kv_block(view, layer, new_page, kv_head);
      __half* scales = reinterpret_cast<__half*>(new_block + (is_key ? view.k_scales : view.v_scales)) + slot * groups;
      put_row(new_block + (is_key ? 0 : view.v) + slot * kv_row_bytes(groups, bits), scales, new_codes[!is_key],
              new_scales[!is_key], groups, bits, lane);
    }

    Part part = part_at(begin);
    if (part.count > 0) {
      const __half* query = queries[lane / 4];
      Softmax softmax;
      float sums[kDim / 16][4] = {};
#pragma unroll 1
      for (int at = begin; part.count > 0; at += kChunk) {
        const Part next = part_at(at + kChunk);
        if (together) wait_for_copies<1>();
        else wait_for_copies<0>();
        __syncwarp();
        take_new(part, keys, k_pitch, 0, k_bits);
        float scores[4], factors[2];
        switch (k_bits) {
          case 4: score<4, kDim>(keys, groups, query, scores, lane); break;
          case 8: score<8, kDim>(keys, groups, query, scores, lane); break;
          default: score<16, kDim>(keys, groups, query, scores, lane);
        }
        __syncwarp();
        if (together) copy_keys(next);
        else copy_values(part);
        uint32_t weights[2];
        softmax.add(scores, part.count, weights, factors, lane);
        if (__any_sync(kAll, factors[0] != 1.0f || factors[1] != 1.0f))
#pragma unroll
          for (int i = 0; i < kDim / 16 * 4; ++i) sums[i / 4][i % 4] *= factors[i % 2];
        if (together) wait_for_copies<1>();
        else wait_for_copies<0>();
        __syncwarp();
        take_new(part, values, v_pitch, 1, v_bits);
        switch (v_bits) {
          case 4: add_values<4, kDim>(values, groups, part.count, weights, sums, lane); break;
          case 8: add_values<8, kDim>(values, groups, part.count, weights, sums, lane); break;
          default: add_values<16, kDim>(values, groups, part.count, weights, sums, lane);
        }
        __syncwarp();
        if (together) copy_values(next);
        else copy_keys(next);
        part = next;
      }
      softmax.finish();
      if (lane < 4)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          maxima[warp][2 * lane + i] = softmax.largest[i], totals[warp][2 * lane + i] = softmax.total[i];
      float* results = reinterpret_cast<float*>(keys);
      switch (v_bits) {
        case 4: put_results<4, kDim>(sums, heads_now, results, lane); break;
        case 8: put_results<8, kDim>(sums, heads_now, results, lane); break;
        default: put_results<16, kDim>(sums, heads_now, results, lane);
      }
    }
    __syncthreads();

    add_warps<kDim>(heads_now, active, maxima, totals, shared, memory.bytes,
                    [&](int h, int d, float2 sum, float largest, float total) {
                      const int head = kv_head * group + from + h;
                      if (position < kChunk) {  // a row of one chunk is finished here
                        float* to = out + row * out_stride + int64_t(head) * dim;
                        const float inverse = __fdividef(1.0f, total);
                        if (d < dim) to[d] = sum.x * inverse;
                        if (d + 1 < dim) to[d + 1] = sum.y * inverse;
                      } else {
                        const int64_t index = (row * heads + head) * gridDim.x + chunk;
                        *reinterpret_cast<float2*>(partial + index * kDim + d) = sum;
                        if (d == 0) {
                          float* states = partial + int64_t(gridDim.z) * heads * gridDim.x * kDim;
                          reinterpret_cast<float2*>(states)[index] = make_float2(largest, total);
                        }
                      }
                    });
    if (from + kHeads < group) __syncthreads();  // the next heads' results overwrite these
  }
}

// Adds the chunks of each row of more than one: warp w takes the chunks w, w + kWarps, ... Grid: (heads, rows).
template <int kDim>
__global__ void __launch_bounds__(32 * kWarps)
    add_chunks_kernel(RowsView rows, int dim, const float* partial, int max_chunks, float* out, int64_t out_stride) {
  __shared__ float results[kWarps][kDim], totals[kWarps];
  let_next_start();
  constexpr int kEach = kDim / 32, kAtOnce = 4;  // chunks of a warp
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, head = int(blockIdx.x);
  const int64_t row = blockIdx.y, index = (row * gridDim.x + head) * max_chunks;
  const float* sums = partial + index * kDim + lane;
  const float2* states =
      reinterpret_cast<const float2*>(partial + int64_t(gridDim.y) * gridDim.x * max_chunks * kDim) + index;
  const int position = rows.positions[row];
  wait_for_previous();
  if (position < kChunk) return;

  const int chunks = chunks_of(position);
  float largest = -INFINITY, total = 0.0f, own[kEach] = {};
#pragma unroll 1
  for (int first = warp; first < chunks; first += kAtOnce * kWarps) {
    // All that is to be read is asked for before anything waits for it, the largest too.
    float read[kAtOnce][kEach];
    float2 state[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int c = min(first + i * kWarps, chunks - 1);
      state[i] = states[c];
#pragma unroll
      for (int j = 0; j < kEach; ++j) read[i][j] = sums[int64_t(c) * kDim + j * 32];
    }
    if (first == warp) {
      for (int c = lane; c < chunks; c += 32) largest = fmaxf(largest, states[c].x);
#pragma unroll
      for (int offset = 16; offset; offset /= 2) largest = fmaxf(largest, __shfl_xor_sync(kAll, largest, offset));
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i * kWarps >= chunks) break;
      const float factor = power_of_two(state[i].x - largest);
      total = fmaf(state[i].y, factor, total);
#pragma unroll
      for (int j = 0; j < kEach; ++j) own[j] = fmaf(read[i][j], factor, own[j]);
    }
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) results[warp][i * 32 + lane] = own[i];
  if (lane == 0) totals[warp] = total;
  __syncthreads();
  const int d = int(threadIdx.x);
  if (d >= dim) return;
  float sum = 0.0f;
  total = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    sum += results[w][d];
    total += totals[w];
  }
  out[row * out_stride + int64_t(head) * dim + d] = __fdividef(sum, total);
}

int padded_dim(const KvView& view) {
  CHECK(view.head_dim <= 256, "CUDA takes a head_dim of at most 256, not ", view.head_dim);
  return view.groups <= 2 ? 64 : view.groups <= 4 ? 128 : 256;
}

template <int kDim>
void decode(const Cuda& device, const KvView& view, int layer, const RowsView& rows, int count, const Arrival& arrival,
            int heads, const float* q, int64_t q_stride, float* partial, int max_chunks, float* out,
            int64_t out_stride) {
  const auto bytes = [&](int bits, int pitch) { return kOwn * (pitch + (bits < 16 ? 2 * view.groups : 0)); };
  const int k = bytes(view.k_bits, key_pitch(kDim, view.k_bits)),
            v = bytes(view.v_bits, value_pitch(kDim, view.v_bits));
  const int results = std::min(kHeads, heads / view.kv_heads) * kDim * 4;
  WarpMemory memory = {};
  memory.together = fit_together(kDim, view.k_bits, view.v_bits);
  memory.v = memory.together ? k : 0;
  memory.bytes = std::max(memory.together ? k + v : std::max(k, v), results);
  size_t shared = size_t(kWarps * memory.bytes);
  if (shared > 40 << 10) shared = std::max<size_t>(shared, (48 << 10) + 16);  // with the static part more than 48 KiB

  const float scale = float(std::numbers::log2e / std::sqrt(double(view.head_dim)));
  const dim3 grid(unsigned(max_chunks), unsigned(view.kv_heads), unsigned(count));
  const int both = view.k_bits == view.v_bits ? view.k_bits : 0;
  const auto kernel = both == 4    ? chunk_kernel<kDim, 4>
                      : both == 8  ? chunk_kernel<kDim, 8>
                      : both == 16 ? chunk_kernel<kDim, 16>
                                   : chunk_kernel<kDim, 0>;
  launch(device, "attention", kernel, grid, 32 * kWarps, shared, view, layer, rows, arrival, heads, q, q_stride, scale,
         memory, partial, out, out_stride);
  if (max_chunks > 1)
    launch(device, "attention, adding chunks", add_chunks_kernel<kDim>, dim3(unsigned(heads), unsigned(count)),
           32 * kWarps, 0, rows, view.head_dim, partial, max_chunks, out, out_stride);
}

void decode_any(const Cuda& device, const KvView& view, int layer, const RowsView& rows, int count,
                const Arrival& arrival, int heads, const float* q, int64_t q_stride, float* partial, int max_chunks,
                float* out, int64_t out_stride) {
  if (count == 0) return;
  const int dim = padded_dim(view);
  const auto run = dim == 64 ? decode<64> : dim == 128 ? decode<128> : decode<256>;
  run(device, view, layer, rows, count, arrival, heads, q, q_stride, partial, max_chunks, out, out_stride);
}

}  // namespace

int64_t decode_partial_floats(const KvView& view, int heads, int rows, int max_chunks) {
  return max_chunks == 1 ? 0 : int64_t(rows) * heads * max_chunks * (padded_dim(view) + 2);
}

void decode_attention(const Cuda& device, const KvView& view, int layer, const RowsView& rows, int count, int heads,
                      const float* q, int64_t q_stride, float* partial, int max_chunks, float* out,
                      int64_t out_stride) {
  decode_any(device, view, layer, rows, count, {}, heads, q, q_stride, partial, max_chunks, out, out_stride);
}

void decode_rope_attention(const Cuda& device, const KvView& view, int layer, const RowsView& rows, int count,
                           const float* rotary, int heads, const float* q, int64_t q_stride, const float* k,
                           const float* v, int64_t kv_stride, float* partial, int max_chunks, float* out,
                           int64_t out_stride) {
  const Arrival arrival = {rotary, k, v, kv_stride, float(1.0 / std::sqrt(double(view.r3_block)))};
  decode_any(device, view, layer, rows, count, arrival, heads, q, q_stride, partial, max_chunks, out, out_stride);
}

}  // namespace halfturn::cuda
