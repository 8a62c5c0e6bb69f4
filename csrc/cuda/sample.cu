// Sampling on the card. Three kernels: `adjust` applies the edits and finds the largest logits, `weigh` finishes greedy
// rows and else makes weights, their sums per tile of 256 tokens, and histograms; `choose`, one block a row, finds the
// edges of top-k and top-p in the histograms, sorts the few tokens there, and draws.
//
// Nothing depends on the order in which threads come: weights are summed as integers of 2^-44, which is exact for
// weights of 2^-21 and more. Candidates are walked in the order of csrc/sampler.cpp, by token or from the best, and
// weights are made with its polynomial, so that one random number gives the same token, unless it falls on the edge
// between two tokens within the rounding of the CPU's sums (about 1e-7).
#include <cfloat>

#include "sample.cuh"

namespace halfturn::cuda {
namespace {

__device__ inline bool ranked(const SampleSettings& s, int vocab) { return s.top_k > 0 && s.top_k < vocab; }

__device__ inline Largest merge(const Largest& a, const Largest& b) {
  const bool second = b.adjusted > a.adjusted || (b.adjusted == a.adjusted && b.token < a.token);
  return {fmaxf(a.raw, b.raw), second ? b.adjusted : a.adjusted, second ? b.token : a.token, a.nan | b.nan};
}

__device__ inline Largest merge_lanes(Largest l) {
  for (int step = 16; step > 0; step /= 2)
    l = merge(l, {__shfl_xor_sync(kAll, l.raw, step), __shfl_xor_sync(kAll, l.adjusted, step),
                  __shfl_xor_sync(kAll, l.token, step), __shfl_xor_sync(kAll, l.nan, step)});
  return l;
}

__device__ inline Largest nothing() { return {-INFINITY, -INFINITY, 0x7fffffff, 0}; }

// The whole row's, by every warp for itself.
__device__ inline Largest largest_of(const Row& row) {
  Largest l = nothing();
  for (int i = threadIdx.x % 32; i < row.blocks; i += 32) l = merge(l, row.largest()[i]);
  return merge_lanes(l);
}

__device__ inline LogitsFault fault_of(const Largest& l) {
  return l.nan                       ? LogitsFault::kNotNumbers
         : !isfinite(l.raw)          ? LogitsFault::kInfinite
         : !(l.adjusted > -INFINITY) ? LogitsFault::kAllBanned
                                     : LogitsFault::kNone;
}

__device__ inline u64 sum_lanes(u64 value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kAll, value, step);
  return value;
}

__device__ inline float edited(float logit, const LogitEdit& e) {
  logit = __fadd_rn(logit, e.bias);
  logit = logit > 0 ? __fdiv_rn(logit, e.repetition) : __fmul_rn(logit, e.repetition);
  logit = __fsub_rn(logit, e.penalty);
  return logit > FLT_MAX ? FLT_MAX : logit;
}

// ---- adjust: grid (blocks of tokens, rows) ----

__global__ void __launch_bounds__(kThreads) adjust(Job job) {
  __shared__ Largest warps[kWarps];
  let_next_start();
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int begin = int(blockIdx.x) * kBlockTokens, mine = begin + warp * kTile + lane;
  const Row row(job, int(blockIdx.y));
  wait_for_previous();
  const SampleSettings s = job.settings[blockIdx.y];

  float values[kPerLane];
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) values[j] = mine + 32 * j < row.vocab ? row.logits[mine + 32 * j] : -INFINITY;
  for (int i = int(blockIdx.x) * kThreads + int(threadIdx.x); i < kBins; i += int(gridDim.x) * kThreads) {
    if (s.temperature > 0) row.histogram()[i] = 0;
    if (s.logprobs > 0) row.raw_histogram()[i] = 0;
  }
  Largest l = nothing();
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    l.nan |= values[j] != values[j];
    l.raw = fmaxf(l.raw, values[j]);  // of a number and NaN, the number
  }
  if (s.edits > 0) {
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) row.adjusted()[mine + 32 * j] = values[j];
    __syncthreads();
    for (int i = int(threadIdx.x); i < s.edits; i += kThreads) {
      const LogitEdit e = job.edits[s.first_edit + i];
      if (e.token >= begin && e.token < begin + kBlockTokens)
        row.adjusted()[e.token] = edited(row.adjusted()[e.token], e);
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) values[j] = row.adjusted()[mine + 32 * j];
  }
#pragma unroll
  for (int j = 0; j < kPerLane; ++j)
    if (values[j] > l.adjusted) {
      l.adjusted = values[j];
      l.token = mine + 32 * j;
    }
  l = merge_lanes(l);
  if (lane == 0) warps[warp] = l;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kWarps; ++w) l = merge(l, warps[w]);
    row.largest()[blockIdx.x] = l;
  }
}

// ---- weigh: grid (blocks of tokens, rows) ----

struct Histogram {
  uint32_t counts[kBins], low[kBins];
};

__device__ inline void clear(Histogram& h) {
  __syncthreads();
  for (int i = int(threadIdx.x); i < kBins; i += kThreads) h.counts[i] = h.low[i] = 0;
  __syncthreads();
}

__device__ inline void add_to(u64* to, const Histogram& h) {
  __syncthreads();
  for (int i = int(threadIdx.x); i < kBins; i += kThreads)
    if (h.counts[i]) atomicAdd(to + i, u64(h.counts[i]) << kCountShift | h.low[i]);
}

// Counts the bins of one warp's logits, and finds their largest key.
__device__ inline void count_logits(const float* values, float maximum, Histogram& h, uint32_t* best) {
  uint32_t top = 0;
#pragma unroll
  for (int j = 0; j < kPerLane; ++j)
    if (values[j] > -INFINITY) {
      atomicAdd(&h.counts[bin_of(values[j], maximum)], 1u);
      top = max(top, ordered(values[j]));
    }
  top = __reduce_max_sync(kAll, top);
  if (threadIdx.x % 32 == 0) *best = top;
}

__global__ void __launch_bounds__(kThreads) weigh(Job job) {
  __shared__ Histogram h;
  let_next_start();
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int tile = int(blockIdx.x) * kWarps + warp, mine = tile * kTile + lane;
  const Row row(job, int(blockIdx.y));
  wait_for_previous();
  const SampleSettings s = job.settings[blockIdx.y];
  const bool greedy = !(s.temperature > 0);
  if (greedy && s.logprobs < 0 && blockIdx.x > 0) return;
  const Largest l = largest_of(row);
  const LogitsFault fault = fault_of(l);
  if (blockIdx.x == 0) {
    SampleResult& result = job.results[blockIdx.y];
    if (threadIdx.x < kMaxLogprobs) {
      result.top_tokens[threadIdx.x] = -1;
      result.top_logprobs[threadIdx.x] = 0;
    }
    if (threadIdx.x == 0) {
      result.token = fault == LogitsFault::kNone ? l.token : 0;
      result.fault = fault;
      result.largest = l.raw;
      result.logprob = 0;
    }
  }
  if (fault != LogitsFault::kNone || (greedy && s.logprobs < 0)) return;

  float values[kPerLane];
  if (!greedy) {
    const float* source = row.source(s);
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) values[j] = mine + 32 * j < row.vocab ? source[mine + 32 * j] : -INFINITY;
    if (ranked(s, row.vocab)) {
      clear(h);
      count_logits(values, l.adjusted, h, row.best() + tile);
      add_to(row.histogram(), h);
    } else {
      const bool nucleus = s.top_p < 1.0f;
      // The sum of all weights is not known yet; it is 1 at least.
      const float lowest = lowest_weight(s, row.vocab, 1.0);
      if (nucleus) clear(h);
      u64 sum = 0;
      uint32_t top = 0;
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        const float weight = weight_of(values[j], l.adjusted, s.temperature);
        const uint32_t bits = __float_as_uint(weight);
        row.weights()[mine + 32 * j] = weight;
        top = max(top, bits);
        if (nucleus || weight >= lowest) sum += fixed(weight);
        if (nucleus && weight >= lowest) {
          atomicAdd(&h.counts[bits >> kShift], 1u);
          atomicAdd(&h.low[bits >> kShift], bits & ((1u << kShift) - 1));
        }
      }
      sum = sum_lanes(sum);
      top = __reduce_max_sync(kAll, top);
      if (lane == 0) {
        row.sums()[tile] = sum;
        row.best()[tile] = top;
      }
      if (nucleus) add_to(row.histogram(), h);
    }
  }
  if (s.logprobs >= 0) {
    u64 sum = 0;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      values[j] = mine + 32 * j < row.vocab ? row.logits[mine + 32 * j] : -INFINITY;
      sum += fixed(weight_of(values[j], l.raw, 1.0f));
    }
    sum = sum_lanes(sum);
    if (lane == 0) row.raw_sums()[tile] = sum;
    if (s.logprobs > 0) {
      clear(h);
      count_logits(values, l.raw, h, row.raw_best() + tile);
      add_to(row.raw_histogram(), h);
    }
  }
}

// ---- choose: one block of 1024 threads per row; every function is called by all of them ----

struct Found {
  int index;  // the number of elements where there is none
  u64 upto;   // sum of the elements up to and with it
  u64 total;
};

struct Shared {
  union {
    u64 list[kSorted];  // ~key << 32 | token, ascending: best first, equal ones in the order of their ids
    uint32_t digits[kChooseWarps][kDigits];
  };
  u64 sums[kChooseWarps];
  Found found;
  int gathered;
};

// Sum of the values of the threads before this one.
__device__ __noinline__ u64 scan(Shared& shared, u64 own, u64& total) {
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  u64 upto = own;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const u64 other = __shfl_up_sync(kAll, upto, step);
    if (lane >= step) upto += other;
  }
  if (lane == 31) shared.sums[warp] = upto;
  __syncthreads();
  u64 before = upto - own;
  total = 0;
#pragma unroll 4
  for (int w = 0; w < kChooseWarps; ++w) {
    if (w < warp) before += shared.sums[w];
    total += shared.sums[w];
  }
  __syncthreads();
  return before;
}

// The first of `count` elements at which the running sum of value(i) is above x.
template <class Value>
__device__ Found find_first(Shared& shared, int count, u64 x, Value value) {
  const int each = (count + kChooseThreads - 1) / kChooseThreads;
  const int begin = min(count, int(threadIdx.x) * each), end = min(count, begin + each);
  u64 own = 0, total;
#pragma unroll 1
  for (int i = begin; i < end; ++i) own += value(i);
  u64 sum = scan(shared, own, total);
  if (threadIdx.x == 0) shared.found = {count, total, total};
  __syncthreads();
  if (sum <= x && x - sum < own)  // for one thread at most
#pragma unroll 1
    for (int i = begin; i < end; ++i)
      if ((sum += value(i)) > x) {
        shared.found = {i, sum, total};
        break;
      }
  __syncthreads();
  const Found found = shared.found;
  __syncthreads();
  return found;
}

__device__ inline u64 point_in(u64 mass, double uniform) {  // rounding must not lead past the last token
  const u64 at = __double2ull_rz(uniform * double(mass));
  return mass == 0 ? 0 : min(at, mass - 1);
}

// Sums to be reached for the nucleus; at least 1.
__device__ inline u64 nucleus_of(const SampleSettings& s, u64 total) {
  return max(u64(1), __double2ull_ru(double(s.top_p) * double(total)));
}

// Ascending order of list[0 .. size), a power of two.
__device__ __noinline__ void sort(Shared& shared, int size) {
  for (int length = 2; length <= size; length *= 2)
    for (int step = length / 2; step > 0; step /= 2) {
#pragma unroll 1
      for (int i = int(threadIdx.x); i < size / 2; i += kChooseThreads) {
        const int a = 2 * i - (i & (step - 1)), b = a + step;
        const u64 x = shared.list[a], y = shared.list[b];
        if ((x > y) == ((a & length) == 0)) {
          shared.list[a] = y;
          shared.list[b] = x;
        }
      }
      __syncthreads();
    }
}

// Best first, keeping the order of equal ones: each warp counts and then moves the digits of its own stretch. The
// result is in `tokens` again.
template <class Key>
__device__ void sort_large(Shared& shared, int count, uint32_t* tokens, uint32_t* other, Key key) {
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int each = (count + kChooseThreads - 1) / kChooseThreads * 32;  // a multiple of 32
  const int begin = min(count, warp * each), end = min(count, begin + each);
  for (int shift = 0; shift < 32; shift += 8) {
    for (int i = lane; i < kDigits; i += 32) shared.digits[warp][i] = 0;
    __syncwarp();
    for (int i = begin + lane; i < end; i += 32)
      atomicAdd(&shared.digits[warp][~key(int(tokens[i])) >> shift & (kDigits - 1)], 1u);
    __syncthreads();
    u64 count_of = 0, total;
    if (threadIdx.x < kDigits)
#pragma unroll 4
      for (int w = 0; w < kChooseWarps; ++w) count_of += shared.digits[w][threadIdx.x];
    uint32_t offset = uint32_t(scan(shared, count_of, total));
    if (threadIdx.x < kDigits)
#pragma unroll 4
      for (int w = 0; w < kChooseWarps; ++w) {
        const uint32_t here = shared.digits[w][threadIdx.x];
        shared.digits[w][threadIdx.x] = offset;
        offset += here;
      }
    __syncthreads();
    for (int base = begin; base < end; base += 32) {
      const bool inside = base + lane < end;
      const uint32_t token = inside ? tokens[base + lane] : 0;
      const uint32_t digit = inside ? ~key(int(token)) >> shift & (kDigits - 1) : kDigits;
      const uint32_t same = __match_any_sync(kAll, digit);
      const int before = __popc(same & ((1u << lane) - 1));
      if (inside) other[shared.digits[warp][digit] + uint32_t(before)] = token;
      __syncwarp();
      if (inside && before == 0) shared.digits[warp][digit] += uint32_t(__popc(same));
      __syncwarp();
    }
    __syncthreads();
    uint32_t* swapped = tokens;
    tokens = other;
    other = swapped;
  }
}

// Candidates, best first.
struct List {
  const u64* sorted;      // in shared memory,
  const uint32_t* large;  // or where there are too many
  int count;
  __device__ int token(int i) const { return int(large ? large[i] : uint32_t(sorted[i])); }
};

// Sorts the `count` tokens that keep(key of the token) takes. Tiles whose best key fails may(key) have none.
template <class Key, class Keep, class May>
__device__ List gather(Shared& shared, const Row& row, int count, const uint32_t* best, Key key, Keep keep, May may,
                       uint32_t* tokens, uint32_t* other) {
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  if (count <= kSorted) {
    if (threadIdx.x == 0) shared.gathered = 0;
    __syncthreads();
    for (int tile = warp; tile < row.tiles; tile += kChooseWarps) {
      if (!may(best[tile])) continue;
      uint32_t keys[kPerLane];
      const int mine = tile * kTile + lane;
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) keys[j] = key(min(mine + 32 * j, row.vocab - 1));
#pragma unroll
      for (int j = 0; j < kPerLane; ++j)
        if (mine + 32 * j < row.vocab && keep(keys[j])) {
          const int place = atomicAdd(&shared.gathered, 1);
          if (place < kSorted) shared.list[place] = u64(~keys[j]) << 32 | uint32_t(mine + 32 * j);
        }
    }
    __syncthreads();
    int size = 1;
    while (size < count) size *= 2;
    for (int i = count + int(threadIdx.x); i < size; i += kChooseThreads) shared.list[i] = kNever;
    __syncthreads();
    sort(shared, size);
    return {shared.list, nullptr, count};
  }
  // In the order of their ids, each warp the tokens of its own stretch of tiles.
  const int each = (row.tiles + kChooseWarps - 1) / kChooseWarps;
  const int begin = min(row.tiles, warp * each), end = min(row.tiles, begin + each);
  const auto kept = [&](int tile, int j) {
    const int token = tile * kTile + j * 32 + lane;
    return __ballot_sync(kAll, token < row.vocab && keep(key(min(token, row.vocab - 1))));
  };
  u64 found = 0, total;
  for (int tile = begin; tile < end; ++tile)
    if (may(best[tile]))
      for (int j = 0; j < kPerLane; ++j) found += u64(__popc(kept(tile, j)));
  uint32_t place = uint32_t(scan(shared, lane == 0 ? found : 0, total));
  place = __shfl_sync(kAll, place, 0);
  for (int tile = begin; tile < end; ++tile)
    if (may(best[tile]))
      for (int j = 0; j < kPerLane; ++j) {
        const uint32_t mask = kept(tile, j);
        if (mask >> lane & 1)
          tokens[place + uint32_t(__popc(mask & ((1u << lane) - 1)))] = uint32_t(tile * kTile + j * 32 + lane);
        place += uint32_t(__popc(mask));
      }
  __syncthreads();
  sort_large(shared, count, tokens, other, key);
  return {nullptr, tokens, count};
}

// The `count` largest logits that are not -inf.
__device__ List find_best(Shared& shared, const Row& row, const float* logits, float maximum, const u64* histogram,
                          const uint32_t* best, int count, uint32_t* tokens, uint32_t* other) {
  const Found f = find_first(shared, kBins, u64(count) - 1, [&](int i) { return histogram[i] >> kCountShift; });
  const int edge = min(f.index, kBins - 1);
  const auto keep = [&](uint32_t key) { return key > kImpossible && bin_of(from_ordered(key), maximum) <= edge; };
  List list =
      gather(shared, row, int(f.upto), best, [&](int i) { return ordered(logits[i]); }, keep, keep, tokens, other);
  list.count = min(list.count, count);
  return list;
}

// Top-k: candidates from the best to the worst.
__device__ int draw_ranked(Shared& shared, const Row& row, const SampleSettings& s, const Largest& l) {
  const float* logits = row.source(s);
  const List list = find_best(shared, row, logits, l.adjusted, row.histogram(), row.best(), s.top_k, row.order(),
                              reinterpret_cast<uint32_t*>(row.weights()));
  const auto weight = [&](int i) { return weight_of(logits[list.token(i)], l.adjusted, s.temperature); };
  const auto mass = [&](int i) {
    const float w = weight(i);
    return w >= s.min_p ? fixed(w) : 0;
  };
  // min_p does not make the mass smaller that top_p is a part of.
  const u64 total = find_first(shared, list.count, kNever, [&](int i) { return fixed(weight(i)); }).total;
  u64 kept = total;
  if (s.top_p < 1.0f || s.min_p > 0)
    kept = find_first(shared, list.count, s.top_p < 1.0f ? nucleus_of(s, total) - 1 : kNever, mass).upto;
  const Found chosen = find_first(shared, list.count, point_in(kept, s.uniform), mass);
  return chosen.index < list.count ? list.token(chosen.index) : l.token;
}

// Among the tokens of weight >= lowest, whose sums per tile are in row.sums(), in the order of their ids.
__device__ int pick_by_id(Shared& shared, const Row& row, float lowest, u64 at, int otherwise) {
  const Found f = find_first(shared, row.tiles, at, [&](int i) { return row.sums()[i]; });
  if (f.index >= row.tiles) return otherwise;
  // By every warp for itself.
  const int first = f.index * kTile, lane = int(threadIdx.x) % 32;
  u64 before = f.upto - row.sums()[f.index];
  for (int j = 0; j < kPerLane; ++j) {
    const int token = first + 32 * j + lane;
    const float weight = token < row.vocab ? row.weights()[token] : 0.0f;
    u64 upto = weight >= lowest ? fixed(weight) : 0;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const u64 other = __shfl_up_sync(kAll, upto, step);
      if (lane >= step) upto += other;
    }
    const uint32_t above = __ballot_sync(kAll, before + upto > at);
    if (above) return first + 32 * j + __ffs(int(above)) - 1;
    before += __shfl_sync(kAll, upto, 31);
  }
  return otherwise;
}

// No top-k. As on the CPU, the nucleus is walked in two parts: by id the tokens of the bins above its edge, then from
// the best those of the bin that the edge is in.
__device__ int draw_by_id(Shared& shared, const Row& row, const SampleSettings& s, const Largest& l) {
  const auto tile_sum = [&](int i) { return row.sums()[i]; };
  const u64 total = find_first(shared, row.tiles, kNever, tile_sum).total;
  if (!(s.top_p < 1.0f))
    return pick_by_id(shared, row, lowest_weight(s, row.vocab, 1.0), point_in(total, s.uniform), l.token);

  const u64 wanted = nucleus_of(s, total);
  const Found f = find_first(shared, kWeightBins, wanted - 1, [&](int i) {
    const int bin = kWeightBins - 1 - i;
    return mass_of(row.histogram()[bin], bin);
  });
  const int edge = kWeightBins - 1 - f.index;  // -1: min_p leaves less than the nucleus has, so that all are kept
  const float lowest =
      edge < 0 ? lowest_weight(s, row.vocab, double(total) * 0x1p-44) : __uint_as_float(uint32_t(edge + 1) << kShift);
  for (int tile = int(threadIdx.x) / 32; tile < row.tiles; tile += kChooseWarps) {
    u64 sum = 0;
    if (row.best()[tile] >= __float_as_uint(lowest)) {
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {  // weights of padding are 0
        const float weight = row.weights()[tile * kTile + 32 * j + int(threadIdx.x) % 32];
        if (weight >= lowest) sum += fixed(weight);
      }
      sum = sum_lanes(sum);
    }
    if (threadIdx.x % 32 == 0) row.sums()[tile] = sum;
  }
  __syncthreads();
  const u64 above = find_first(shared, row.tiles, kNever, tile_sum).total;
  if (edge < 0) return pick_by_id(shared, row, lowest, point_in(above, s.uniform), l.token);

  const auto key = [&](int i) { return __float_as_uint(row.weights()[i]); };
  const float candidate = lowest_weight(s, row.vocab, 1.0);  // what the histogram counted
  const List list = gather(
      shared, row, int(row.histogram()[edge] >> kCountShift), row.best(), key,
      [&](uint32_t k) { return int(k >> kShift) == edge && __uint_as_float(k) >= candidate; },
      [&](uint32_t k) { return int(k >> kShift) >= edge; }, row.order(), reinterpret_cast<uint32_t*>(row.adjusted()));
  const auto mass = [&](int i) { return fixed(row.weights()[list.token(i)]); };
  // `above` is less than what is wanted, as each bin's mass was rounded down once and here each weight is.
  const u64 kept = above + find_first(shared, list.count, wanted - 1 - above, mass).upto;
  const u64 at = point_in(kept, s.uniform);
  if (at < above) return pick_by_id(shared, row, lowest, at, l.token);
  const Found chosen = find_first(shared, list.count, at - above, mass);
  return chosen.index < list.count ? list.token(chosen.index) : l.token;
}

__global__ void __launch_bounds__(kChooseThreads) choose(Job job) {
  __shared__ Shared shared;
  let_next_start();
  const Row row(job, int(blockIdx.x));
  wait_for_previous();
  const SampleSettings s = job.settings[blockIdx.x];
  const bool greedy = !(s.temperature > 0);
  if (greedy && s.logprobs < 0) return;
  const Largest l = largest_of(row);
  if (fault_of(l) != LogitsFault::kNone) return;
  SampleResult& result = job.results[blockIdx.x];
  const int token = greedy                 ? l.token
                    : ranked(s, row.vocab) ? draw_ranked(shared, row, s, l)
                                           : draw_by_id(shared, row, s, l);
  if (threadIdx.x == 0) result.token = token;
  if (s.logprobs < 0) return;

  const u64 total = find_first(shared, row.tiles, kNever, [&](int i) { return row.raw_sums()[i]; }).total;
  const double log_sum = double(l.raw) + log(double(total) * 0x1p-44);
  if (threadIdx.x == 0) result.logprob = float(double(row.logits[token]) - log_sum);
  if (s.logprobs == 0) return;
  const List list = find_best(shared, row, row.logits, l.raw, row.raw_histogram(), row.raw_best(), s.logprobs,
                              row.order(), reinterpret_cast<uint32_t*>(row.weights()));
  if (int(threadIdx.x) < min(list.count, kMaxLogprobs)) {
    const int best = list.token(int(threadIdx.x));
    result.top_tokens[threadIdx.x] = best;
    result.top_logprobs[threadIdx.x] = float(double(row.logits[best]) - log_sum);
  }
}

}  // namespace

int64_t sample_workspace_bytes(int rows, int vocab) { return rows * Row::bytes(Row::blocks_of(vocab)); }

void sample(const Cuda& device, const float* logits, int64_t stride, int rows, int vocab,
            const SampleSettings* settings, const LogitEdit* edits, void* workspace, SampleResult* results) {
  CHECK(vocab >= 1 && vocab <= kMaxVocab, "the vocabulary has ", vocab, " tokens, the card samples from 1 to ",
        kMaxVocab);
  if (rows == 0) return;
  const Job job{logits, stride, vocab, settings, edits, static_cast<uint8_t*>(workspace), results};
  const dim3 grid(unsigned(Row::blocks_of(vocab)), unsigned(rows));
  launch(device, "adjusting logits", adjust, grid, kThreads, 0, job);
  launch(device, "weighing tokens", weigh, grid, kThreads, 0, job);
  launch(device, "choosing tokens", choose, dim3(unsigned(rows)), kChooseThreads, 0, job);
}

}  // namespace halfturn::cuda
