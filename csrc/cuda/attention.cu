// Attention of single query rows, in two kernels: one block per chunk of kChunk positions, KV head and row, which reads
// the keys and values once for all query heads that share them; then the chunks of each row are added.
//
// In a block, each warp has up to 16 positions of its own, neighbours in memory. It copies their keys and values
// into its own part of shared memory, all at once, and does a softmax of its own, so that the warps meet only at the
// end, where their results are added. A warp's lanes take 8 dimensions each of as many positions as they reach.
//
// decode_rope_attention() does in the same kernel what rope.cu does before: each block turns its queries, and the one
// that reaches the row's own position also encodes that position's key and value, two warps of it. They go into shared
// memory, from where the warp that has the position takes them as if copied from the cache, and into the cache.
#include <algorithm>
#include <cmath>
#include <numbers>

#include "attention.h"
#include "kv_codes.cuh"
#include "kv_encode.cuh"
#include "launch.cuh"

namespace halfturn::cuda {

namespace {

constexpr int kWarps = 8;
constexpr int kOwn = kChunk / kWarps;  // positions of a warp
constexpr unsigned kAll = 0xffffffffu;
static_assert(kOwn == 16 && kPage % kOwn == 0);

// A warp's shared memory. Keys and values stand behind each other, or, where that would be too large, the values take
// the place of the keys once these are done with. Results likewise have their own place or, if what is there is not
// read again or is copied again, that of keys and values.
struct WarpMemory {
  int bytes, v, results;
  bool together;  // keys and values
};

// Adds v[0..kValues) over the lanes that differ in the bits kOffset, kOffset/2, ..., kLast. Each step halves the
// values: a lane keeps the half that its bit says, so that lane bits, the highest first, say which part of the values
// ends up in v[0 ..].
template <int kValues, int kOffset, int kLast, int kSize>
__device__ __forceinline__ void sum_across(float (&v)[kSize], int lane) {
  if constexpr (kOffset >= kLast) {
    if constexpr (kValues > 1) {
      const bool upper = lane & kOffset;
#pragma unroll
      for (int i = 0; i < kValues / 2; ++i) {
        const float mine = upper ? v[i + kValues / 2] : v[i], other = upper ? v[i] : v[i + kValues / 2];
        v[i] = mine + __shfl_xor_sync(kAll, other, kOffset);
      }
      sum_across<kValues / 2, kOffset / 2, kLast>(v, lane);
    } else {
      v[0] += __shfl_xor_sync(kAll, v[0], kOffset);
      sum_across<1, kOffset / 2, kLast>(v, lane);
    }
  }
}

// How a warp's lanes share out its positions: kLanes have one position's dimensions, kRows positions at a time.
template <int kDim>
struct Lanes {
  static constexpr int kLanes = kDim / 8, kRows = 32 / kLanes, kSteps = kOwn / kRows;
};

// scores[position * kHeads + head] <- query times key, for the warp's first `count` positions.
template <int kBits, int kDim, int kHeads>
__device__ __forceinline__ void score(const uint8_t* keys, int groups, int count, const float (&query)[kHeads][8],
                                      float* scores, int lane) {
  using L = Lanes<kDim>;
  constexpr int kBatch = 4, kValues = kBatch * kHeads;  // short, so that few positions are done soon
  static_assert(L::kSteps % kBatch == 0);
  const int piece = lane % L::kLanes, row = lane / L::kLanes, row_bytes = kv_row_bytes(groups, kBits);
  const auto* scales = reinterpret_cast<const __half*>(keys + kOwn * row_bytes);
  const bool inside = piece < groups * 4;
#pragma unroll 1
  for (int first = 0; first < L::kSteps && first * L::kRows < count; first += kBatch) {
    float sums[kValues];
#pragma unroll
    for (int step = 0; step < kBatch; ++step) {
      const int position = (first + step) * L::kRows + row;
      float x[8] = {}, scale = 1.0f;
      if (inside && position < count) {
        load_codes<kBits>(keys + position * row_bytes, piece, x);
        if (kBits < 16) scale = __half2float(scales[position * groups + piece / 4]);
      }
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < 8; ++i) sum = fmaf(query[h][i], x[i], sum);
        sums[step * kHeads + h] = __fmul_rn(sum, scale);
      }
    }
    sum_across<kValues, L::kLanes / 2, 1>(sums, lane);
    const auto put = [&](int n, float sum) {
      scores[((first + n / kHeads) * L::kRows + row) * kHeads + n % kHeads] = sum;
    };
    if constexpr (kValues >= L::kLanes) {
      constexpr int kKept = kValues / L::kLanes;
#pragma unroll
      for (int i = 0; i < kKept; ++i) put(piece * kKept + i, sums[i]);
    } else {
      constexpr int kCopies = L::kLanes / kValues;
      if (piece % kCopies == 0) put(piece / kCopies, sums[0]);
    }
  }
}

// Scores in units of log 2 become weights relative to the warp's largest.
template <int kHeads>
__device__ __forceinline__ void soften(float* scores, int count, float* maximum, float* total, int lane) {
  constexpr int kEach = kOwn * kHeads > 32 ? kOwn * kHeads / 32 : 1, kApart = 32 / kHeads;
  const int head = lane % kHeads;
  float weights[kEach], largest = -INFINITY, sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int p = lane / kHeads + i * kApart;
    weights[i] = p < count ? scores[p * kHeads + head] : -INFINITY;
    largest = fmaxf(largest, weights[i]);
  }
#pragma unroll
  for (int offset = 16; offset >= kHeads; offset /= 2) largest = fmaxf(largest, __shfl_xor_sync(kAll, largest, offset));
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int p = lane / kHeads + i * kApart;
    if (p >= count) continue;
    weights[i] = power_of_two(weights[i] - largest);
    scores[p * kHeads + head] = weights[i];
    sum += weights[i];
  }
#pragma unroll
  for (int offset = 16; offset >= kHeads; offset /= 2) sum += __shfl_xor_sync(kAll, sum, offset);
  if (lane < kHeads) {
    maximum[head] = largest;
    total[head] = sum;
  }
}

// results [kHeads, kDim] <- weights times values.
template <int kBits, int kDim, int kHeads>
__device__ __forceinline__ void add_values(const uint8_t* values, int groups, int count, const float* weights,
                                           float* results, int lane) {
  using L = Lanes<kDim>;
  const int piece = lane % L::kLanes, row = lane / L::kLanes, row_bytes = kv_row_bytes(groups, kBits);
  const auto* scales = reinterpret_cast<const __half*>(values + kOwn * row_bytes);
  const bool inside = piece < groups * 4;
  float sums[kHeads * 8] = {};
#pragma unroll 2
  for (int step = 0; step * L::kRows < count; ++step) {
    const int position = step * L::kRows + row;
    if (!inside || position >= count) continue;
    float x[8], scale = 1.0f, weight[kHeads];
    load_codes<kBits>(values + position * row_bytes, piece, x);
    if (kBits < 16) scale = __half2float(scales[position * groups + piece / 4]);
    if constexpr (kHeads == 4)
      *reinterpret_cast<float4*>(weight) = *reinterpret_cast<const float4*>(weights + position * 4);
    else
      for (int h = 0; h < kHeads; ++h) weight[h] = weights[position * kHeads + h];
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      weight[h] *= scale;
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[h * 8 + i] = fmaf(weight[h], x[i], sums[h * 8 + i]);
    }
  }
  sum_across<kHeads * 8, 16, L::kLanes>(sums, lane);
  __syncwarp();  // results may take the place of the values
  constexpr int kKept = kHeads * 8 / L::kRows;
#pragma unroll
  for (int i = 0; i < kKept; i += 2) {
    const int n = row * kKept + i;
    *reinterpret_cast<float2*>(results + n / 8 * kDim + piece * 8 + n % 8) = make_float2(sums[i], sums[i + 1]);
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

// How many neighbouring positions each warp has, at most kOwn: a power of two for which they are all busy, as far as
// their scales are pieces of 16 bytes.
__device__ __forceinline__ int positions_of_a_warp(int visible, int groups) {
  int each = 2;
  while (each < kOwn && (each * kWarps < visible || each * groups % 8)) each *= 2;
  return each;
}

// Grid: (chunks, kv_heads, rows).
template <int kDim, int kHeads>
__global__ void __launch_bounds__(32 * kWarps, 2)
    chunk_kernel(KvView view, int layer, RowsView rows, Arrival arrival, int heads, const float* q, int64_t q_stride,
                 float scale, WarpMemory memory, float* partial, float* out, int64_t out_stride) {
  constexpr int kGroups = kDim / 32, kKeyWarp = kWarps - 1, kValueWarp = kWarps - 2;
  static_assert(kHeads <= kValueWarp);
  extern __shared__ __align__(16) uint8_t shared[];
  __shared__ __align__(16) float scores[kWarps][kOwn * kHeads], queries[kHeads][kDim];
  __shared__ float maxima[kWarps][kHeads], totals[kWarps][kHeads];
  __shared__ __align__(16) uint8_t new_codes[2][kDim * 2];  // of the row's own position: key, value
  __shared__ __half new_scales[2][kGroups];
  let_next_start();
  const int warp = int(threadIdx.x) / 32, own_lane = int(threadIdx.x) % 32;
  const int chunk = int(blockIdx.x), kv_head = int(blockIdx.y), group = heads / view.kv_heads, groups = view.groups;
  const int dim = view.head_dim, begin = chunk * kChunk;
  const int64_t row = blockIdx.z;
  uint8_t* own = shared + warp * memory.bytes;
  // Rows and pages are copied to the card before a step's first kernel, so they are there already.
  const int position = rows.positions[row];
  const int32_t* pages = rows.pages + int64_t(rows.sequences[row]) * rows.page_stride;
  if (position < begin) {                 // also -1
    if (chunk == 0) wait_for_previous();  // a kernel of which no block waited could end before those ahead of it
    return;
  }

  const bool turns = arrival.rotary != nullptr, encodes = turns && position < begin + kChunk && warp >= kValueWarp;
  const bool is_key = warp == kKeyWarp;
  const int visible = min(kChunk, position + 1 - begin), each = positions_of_a_warp(visible, groups);
  const int active = (visible + each - 1) / each, first = begin + warp * each;
  const int count = min(each, visible - warp * each), stored = turns ? min(count, position - first) : count;
  const bool has_new = turns && count > 0 && position - first < each;  // the row's own position, its last
  const int32_t page = count > 0 ? pages[first / kPage] : 0;
  const auto copy = [&](uint8_t* to, int codes, int scales, int bits) {
    const uint8_t* block = kv_block(view, layer, page, kv_head);
    const int bytes = kv_row_bytes(groups, bits), slot = first % kPage;
    start_copy(to, block + codes + slot * bytes, stored * bytes, own_lane, 32);
    if (bits < 16) start_copy(to + kOwn * bytes, block + scales + slot * groups * 2, each * groups * 2, own_lane, 32);
    commit_copies();
  };
  const auto take_new = [&](uint8_t* to, int which, int bits) {
    __half* scales = reinterpret_cast<__half*>(to + kOwn * kv_row_bytes(groups, bits)) + (position - first) * groups;
    put_row(to + (position - first) * kv_row_bytes(groups, bits), scales, new_codes[which], new_scales[which], groups,
            bits, own_lane);
    __syncwarp();
  };

  // With `turns`, nothing that may still run writes the older positions: a step writes a layer's cache only here, each
  // row its own position, and between steps there are copies, which wait for the kernels before them to end and let
  // none behind them begin early. So their keys and values are on their way while the projections still run. (The
  // scales copied with them may hold those of the new position, which take_new() replaces.)
  if (!turns) wait_for_previous();
  if (count > 0) {
    copy(own, 0, view.k_scales, view.k_bits);
    if (memory.together) copy(own + memory.v, view.v, view.v_scales, view.v_bits);
  }
  const float* angles = turns ? arrival.rotary + int64_t(position) * dim : nullptr;
  const int32_t new_page = encodes ? pages[position / kPage] : 0;
  Turn<kGroups> turn;
  if (turns && (warp < kHeads || (encodes && is_key))) turn.load(angles, dim, own_lane);
  if (turns) wait_for_previous();

  for (int from = 0; from < group; from += kHeads) {
    // Not to be seen through, or the compiler computes the addresses of every width of codes ahead of the loop, for
    // which registers do not suffice.
    int lane = own_lane;
    asm volatile("" : "+r"(lane));
    if (from > 0 && !memory.together && count > 0) copy(own, 0, view.k_scales, view.k_bits);
    const bool encodes_now = encodes && from == 0;
    if (warp < kHeads || encodes_now) {
      float x[kGroups] = {};
      if (warp >= kHeads || from + warp < group) {
        const int64_t kv_at = row * arrival.kv_stride + int64_t(kv_head) * dim;
        const float* head = warp < kHeads ? q + row * q_stride + (int64_t(kv_head) * group + from + warp) * dim
                            : is_key      ? arrival.k + kv_at
                                          : arrival.v + kv_at;
        if (turns && (warp < kHeads || is_key)) {
          turn.apply(head, dim, lane, x);
          if (view.r3_block > 1) hadamard_head(x, view.r3_block, arrival.r3_scale, lane);
        } else {
          load_head(head, dim, lane, x);
        }
      }
      if (warp < kHeads) {
#pragma unroll
        for (int g = 0; g < kGroups; ++g) queries[warp][32 * g + lane] = x[g] * scale;
      } else {
        encode_head(x, is_key ? view.k_bits : view.v_bits, new_codes[!is_key], new_scales[!is_key], groups, lane);
      }
    }
    __syncthreads();
    if (encodes_now) {
      const int bits = is_key ? view.k_bits : view.v_bits, slot = position % kPage;
      uint8_t* new_block = kv_block(view, layer, new_page, kv_head);
      __half* scales = reinterpret_cast<__half*>(new_block + (is_key ? view.k_scales : view.v_scales)) + slot * groups;
      put_row(new_block + (is_key ? 0 : view.v) + slot * kv_row_bytes(groups, bits), scales, new_codes[!is_key],
              new_scales[!is_key], groups, bits, lane);
    }

    if (count > 0) {
      float query[kHeads][8];
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        const auto* pieces = reinterpret_cast<const float4*>(queries[h] + lane % Lanes<kDim>::kLanes * 8);
        reinterpret_cast<float4*>(query[h])[0] = pieces[0];
        reinterpret_cast<float4*>(query[h])[1] = pieces[1];
      }
      if (memory.together) wait_for_copies<1>();
      else wait_for_copies<0>();
      __syncwarp();
      if (has_new) take_new(own, 0, view.k_bits);
      switch (view.k_bits) {
        case 4: score<4, kDim, kHeads>(own, groups, count, query, scores[warp], lane); break;
        case 8: score<8, kDim, kHeads>(own, groups, count, query, scores[warp], lane); break;
        default: score<16, kDim, kHeads>(own, groups, count, query, scores[warp], lane);
      }
      __syncwarp();
      if (!memory.together) copy(own, view.v, view.v_scales, view.v_bits);
      soften<kHeads>(scores[warp], count, maxima[warp], totals[warp], lane);
      wait_for_copies<0>();
      __syncwarp();
      uint8_t* values = own + memory.v;
      if (has_new) take_new(values, 1, view.v_bits);
      float* results = reinterpret_cast<float*>(own + memory.results);
      switch (view.v_bits) {
        case 4: add_values<4, kDim, kHeads>(values, groups, count, scores[warp], results, lane); break;
        case 8: add_values<8, kDim, kHeads>(values, groups, count, scores[warp], results, lane); break;
        default: add_values<16, kDim, kHeads>(values, groups, count, scores[warp], results, lane);
      }
    }
    __syncthreads();

    // The warps' results added. A row of one chunk is finished here.
    constexpr int kOutputs = kHeads * kDim, kEach = kOutputs > 32 * kWarps ? kOutputs / (32 * kWarps) : 1;
    const int at = int(threadIdx.x) * kEach, h = at / kDim, d = at % kDim;
    if (at < kOutputs && from + h < group) {
      float factors[kWarps], largest = -INFINITY, total = 0.0f, sums[kEach] = {};
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        factors[w] = w < active ? maxima[w][h] : -INFINITY;
        largest = fmaxf(largest, factors[w]);
      }
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        if (w >= active) break;
        const float factor = power_of_two(factors[w] - largest);
        const float* results = reinterpret_cast<const float*>(shared + w * memory.bytes + memory.results);
        total = fmaf(totals[w][h], factor, total);
#pragma unroll
        for (int i = 0; i < kEach; ++i) sums[i] = fmaf(results[at + i], factor, sums[i]);
      }
      const int head = kv_head * group + from + h;
      if (position < kChunk) {
        float* to = out + row * out_stride + int64_t(head) * dim;
        const float inverse = 1.0f / total;
#pragma unroll
        for (int i = 0; i < kEach; ++i)
          if (d + i < dim) to[d + i] = sums[i] * inverse;
      } else {
        const int64_t index = (row * heads + head) * gridDim.x + chunk;
        float* to = partial + index * kDim + d;
#pragma unroll
        for (int i = 0; i < kEach; ++i) to[i] = sums[i];
        if (d == 0) {
          float* states = partial + int64_t(gridDim.z) * heads * gridDim.x * kDim;
          reinterpret_cast<float2*>(states)[index] = make_float2(largest, total);
        }
      }
    }
    if (from + kHeads < group) __syncthreads();  // the next heads' results overwrite these
  }
}

// Adds the chunks of each row of more than one: warp w takes the chunks w, w + kWarps, ... Grid: (heads, rows).
template <int kDim>
__global__ void __launch_bounds__(32 * kWarps)
    add_chunks_kernel(RowsView rows, int dim, const float* partial, int max_chunks, float* out, int64_t out_stride) {
  __shared__ float results[kWarps][kDim], totals[kWarps];
  let_next_start();
  constexpr int kEach = kDim / 32;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, head = int(blockIdx.x);
  const int64_t row = blockIdx.y, index = (row * gridDim.x + head) * max_chunks;
  const float* sums = partial + index * kDim + lane;
  const float2* states =
      reinterpret_cast<const float2*>(partial + int64_t(gridDim.y) * gridDim.x * max_chunks * kDim) + index;
  const int position = rows.positions[row];
  wait_for_previous();
  if (position < kChunk) return;

  const int chunks = position / kChunk + 1;
  float largest = -INFINITY, total = 0.0f, own[kEach] = {};
  for (int c = lane; c < chunks; c += 32) largest = fmaxf(largest, states[c].x);
#pragma unroll
  for (int offset = 16; offset; offset /= 2) largest = fmaxf(largest, __shfl_xor_sync(kAll, largest, offset));
#pragma unroll 4
  for (int c = warp; c < chunks; c += kWarps) {
    const float2 state = states[c];
    const float factor = power_of_two(state.x - largest);
    total = fmaf(state.y, factor, total);
#pragma unroll
    for (int i = 0; i < kEach; ++i) own[i] = fmaf(sums[int64_t(c) * kDim + i * 32], factor, own[i]);
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
  out[row * out_stride + int64_t(head) * dim + d] = sum * (1.0f / total);
}

int padded_dim(const KvView& view) {
  CHECK(view.head_dim <= 256, "CUDA takes a head_dim of at most 256, not ", view.head_dim);
  return view.groups <= 2 ? 64 : view.groups <= 4 ? 128 : 256;
}

int warp_bytes(const KvView& view, int bits) {  // of the codes and scales of a warp's positions
  return kOwn * (kv_row_bytes(view.groups, bits) + (bits < 16 ? 2 * view.groups : 0));
}

template <int kDim, int kHeads>
void decode(const Cuda& device, const KvView& view, int layer, const RowsView& rows, int count, const Arrival& arrival,
            int heads, const float* q, int64_t q_stride, float* partial, int max_chunks, float* out,
            int64_t out_stride) {
  const int k = warp_bytes(view, view.k_bits), v = warp_bytes(view, view.v_bits), results = kHeads * kDim * 4;
  const bool again = heads / view.kv_heads > kHeads;  // more than one turn over keys and values
  WarpMemory memory = {};
  memory.together = k + v <= 8192 && k + v + (again ? results : 0) <= 11 << 10;
  memory.v = memory.together ? k : 0;
  const int inputs = memory.together ? k + v : std::max(k, v);
  const bool apart = memory.together && again;
  memory.results = apart ? inputs : 0;
  memory.bytes = apart ? inputs + results : std::max(inputs, results);
  size_t shared = size_t(kWarps * memory.bytes);
  if (shared > 40 << 10) shared = std::max<size_t>(shared, (48 << 10) + 16);  // with the static part more than 48 KiB

  const float scale = float(std::numbers::log2e / std::sqrt(double(view.head_dim)));
  const dim3 grid(unsigned(max_chunks), unsigned(view.kv_heads), unsigned(count));
  launch(device, "attention", chunk_kernel<kDim, kHeads>, grid, 32 * kWarps, shared, view, layer, rows, arrival, heads,
         q, q_stride, scale, memory, partial, out, out_stride);
  if (max_chunks > 1)
    launch(device, "attention, adding chunks", add_chunks_kernel<kDim>, dim3(unsigned(heads), unsigned(count)),
           32 * kWarps, 0, rows, view.head_dim, partial, max_chunks, out, out_stride);
}

void decode_any(const Cuda& device, const KvView& view, int layer, const RowsView& rows, int count,
                const Arrival& arrival, int heads, const float* q, int64_t q_stride, float* partial, int max_chunks,
                float* out, int64_t out_stride) {
  if (count == 0) return;
  const int dim = padded_dim(view);
  const bool shared_keys = heads > view.kv_heads;
  const auto run = dim == 64    ? (shared_keys ? decode<64, 4> : decode<64, 1>)
                   : dim == 128 ? (shared_keys ? decode<128, 4> : decode<128, 1>)
                                : (shared_keys ? decode<256, 4> : decode<256, 1>);
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
