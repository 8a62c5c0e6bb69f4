// Attention of spans of new rows on tensor cores: a block takes one query head of one tile of rows and goes over the
// keys in blocks of a fixed size from position 0 on, with an online softmax, whatever the tile is: so a row's result
// does not depend on how spans are cut into tiles.
//
// Codes come in by asynchronous copies, one block ahead, and are expanded to halves in shared memory, as the tensor
// cores need them. Queries are halves too; scores, weights' sums and results are float32.
#include <algorithm>
#include <cmath>
#include <numbers>

#include "attention.h"
#include "halves.cuh"
#include "kv_codes.cuh"
#include "launch.cuh"

namespace halfturn::cuda {

namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr unsigned kAll = 0xffffffffu;
static_assert(kFlashRows == 16 * kWarps);

template <int kDim>
struct Shape {
  static constexpr int kKeys = kDim > 128 ? 32 : 64;  // positions of one block
  static constexpr int kStride = (kDim + 8) * 2;      // bytes of an expanded row: no bank conflicts
  static constexpr int kExpanded = kKeys * kStride;   // of keys, and of values
  static constexpr bool kKeepQueries = kDim <= 128;   // in registers
  static constexpr int kBlocks = kDim == 64 ? 3 : 2;  // resident on a multiprocessor
  static constexpr int kQueries = kKeepQueries ? 0 : kFlashRows * kDim * 2;
};

// Codes and scales of kKeys positions to halves. Positions from `count` on hold what another request left, perhaps NaN,
// and become zeros, as does what is behind head_dim.
template <int kDim, int kBits>
__device__ __forceinline__ void expand(const uint8_t* codes, int groups, int count, uint8_t* to) {
  using S = Shape<kDim>;
  constexpr int kPieces = kDim / 8;
  const int row_bytes = kv_row_bytes(groups, kBits);
  const auto* scales = reinterpret_cast<const __half*>(codes + S::kKeys * row_bytes);
#pragma unroll 4
  for (int i = int(threadIdx.x); i < S::kKeys * kPieces; i += kThreads) {
    const int position = i / kPieces, piece = i % kPieces;
    uint4 halves = {};
    if (position < count && piece < groups * 4)
      halves = load_halves<kBits>(codes + position * row_bytes, piece, scales + position * groups);
    *reinterpret_cast<uint4*>(to + position * S::kStride + piece * 16) = halves;
  }
}

template <int kDim>
__device__ __forceinline__ void expand(const uint8_t* codes, int bits, int groups, int count, uint8_t* to) {
  switch (bits) {
    case 4: return expand<kDim, 4>(codes, groups, count, to);
    case 8: return expand<kDim, 8>(codes, groups, count, to);
    default: return expand<kDim, 16>(codes, groups, count, to);
  }
}

// Grid: (heads, tiles), the last tile first: the longest of a span.
template <int kDim>
__global__ void __launch_bounds__(kThreads, Shape<kDim>::kBlocks)
    flash_kernel(KvView view, int layer, const FlashTile* tiles, const int32_t* pages, int page_stride, const float* q,
                 int64_t q_stride, float scale, float* out, int64_t out_stride) {
  using S = Shape<kDim>;
  constexpr int kKeys = S::kKeys, kTiles = kKeys / 8, kSteps = kDim / 16;
  HALFTURN_LAUNCHED_MEMORY(uint8_t, 16, shared);
  let_next_start();
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, groups = view.groups, dim = view.head_dim;
  const int head = int(blockIdx.x), kv_head = head / (int(gridDim.x) / view.kv_heads);
  uint8_t *keys = shared + S::kQueries, *values = keys + S::kExpanded, *raw = values + S::kExpanded;
  const int k_bytes = kv_row_bytes(groups, view.k_bits), v_bytes = kv_row_bytes(groups, view.v_bits);
  uint8_t* raw_values = raw + kKeys * (k_bytes + (view.k_bits < 16 ? 2 * groups : 0));
  wait_for_previous();
  const FlashTile tile = tiles[gridDim.y - 1 - blockIdx.y];
  if (tile.rows <= 0) return;

  const int end = tile.position + tile.rows;
  const int32_t* own_pages = pages + int64_t(tile.sequence) * page_stride;
  const auto copy = [&](int begin) {
#pragma unroll
    for (int at = 0; at < kKeys; at += kPage) {
      const int count = min(kPage, end - begin - at), thread = int(threadIdx.x);
      if (count <= 0) break;
      const uint8_t* block = kv_block(view, layer, own_pages[(begin + at) / kPage], kv_head);
      const auto part = [&](uint8_t* to, int codes, int scales, int bytes, int bits) {
        start_copy(to + at * bytes, block + codes, count * bytes, thread, kThreads);
        if (bits < 16)
          start_copy(to + kKeys * bytes + at * groups * 2, block + scales, kPage * groups * 2, thread, kThreads);
      };
      part(raw, 0, view.k_scales, k_bytes, view.k_bits);
      part(raw_values, view.v, view.v_scales, v_bytes, view.v_bits);
    }
    commit_copies();
  };
  copy(0);

  // Fragments: this lane has the rows `row` and row + 8 of the warp's 16, and of 8 columns those of 2 * quad.
  const int row = warp * 16 + lane / 4, quad = lane % 4;
  uint32_t queries[S::kKeepQueries ? kSteps : 1][4];
  uint4* kept = reinterpret_cast<uint4*>(shared) + warp * kSteps * 32 + lane;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    uint32_t fragment[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = row + i % 2 * 8, d = step * 16 + i / 2 * 8 + quad * 2;
      const float* from = q + (tile.first_row + r) * q_stride + int64_t(head) * dim + d;
      const bool there = r < tile.rows && d < dim;
      fragment[i] = there ? to_halves(clamp_to_half(from[0] * scale), clamp_to_half(from[1] * scale)) : 0;
      if constexpr (S::kKeepQueries) queries[step][i] = fragment[i];
    }
    if constexpr (!S::kKeepQueries) kept[step * 32] = make_uint4(fragment[0], fragment[1], fragment[2], fragment[3]);
  }

  float sums[kDim / 8][4] = {}, maxima[2] = {-INFINITY, -INFINITY}, totals[2] = {};
  const int first = tile.position + warp * 16;  // position of the warp's first row
  // The rows that this lane names to ldmatrix: keys as they stand, [key, dimension] pairs of tiles; values transposed.
  const uint32_t key_rows =
      uint32_t(__cvta_generic_to_shared(keys)) + uint32_t((lane / 16 * 8 + lane % 8) * S::kStride + lane / 8 % 2 * 16);
  const uint32_t value_rows = uint32_t(__cvta_generic_to_shared(values)) +
                              uint32_t((lane / 8 % 2 * 8 + lane % 8) * S::kStride + lane / 16 * 16);

  for (int begin = 0; begin < end; begin += kKeys) {
    wait_for_copies<0>();
    __syncthreads();  // codes are there, and the expanded ones of the block before are done with
    expand<kDim>(raw, view.k_bits, groups, end - begin, keys);
    expand<kDim>(raw_values, view.v_bits, groups, end - begin, values);
    __syncthreads();
    if (begin + kKeys < end) copy(begin + kKeys);
    if (begin > first + 15 || warp * 16 >= tile.rows) continue;  // nothing for this warp's rows

    float scores[kTiles][4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t a[4];
      if constexpr (S::kKeepQueries) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = queries[step][i];
      } else {
        const uint4 fragment = kept[step * 32];
        a[0] = fragment.x, a[1] = fragment.y, a[2] = fragment.z, a[3] = fragment.w;
      }
#pragma unroll
      for (int pair = 0; pair < kTiles / 2; ++pair) {
        uint32_t b[4];
        load_matrices(b, key_rows + uint32_t(pair * 16 * S::kStride + step * 32));
        multiply(scores[2 * pair], a, b[0], b[1]);
        multiply(scores[2 * pair + 1], a, b[2], b[3]);
      }
    }

    if (begin + kKeys - 1 > first) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (begin + t * 8 + quad * 2 + i % 2 > tile.position + row + i / 2 * 8) scores[t][i] = -INFINITY;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // row, row + 8
      float largest = maxima[half];
#pragma unroll
      for (int t = 0; t < kTiles; ++t) largest = fmaxf(largest, fmaxf(scores[t][2 * half], scores[t][2 * half + 1]));
      largest = fmaxf(largest, __shfl_xor_sync(kAll, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(kAll, largest, 2));
      const float factor = power_of_two(maxima[half] - largest);  // position 0 is visible: `largest` is finite
      maxima[half] = largest;
      float total = 0.0f;
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          scores[t][i] = power_of_two(scores[t][i] - largest);
          total += scores[t][i];
        }
      totals[half] = fmaf(totals[half], factor, total);
#pragma unroll
      for (int t = 0; t < kDim / 8; ++t) {
        sums[t][2 * half] *= factor;
        sums[t][2 * half + 1] *= factor;
      }
    }

#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
      const auto& low = scores[2 * step];
      const auto& high = scores[2 * step + 1];
      const uint32_t a[4] = {to_halves(low[0], low[1]), to_halves(low[2], low[3]), to_halves(high[0], high[1]),
                             to_halves(high[2], high[3])};
#pragma unroll
      for (int pair = 0; pair < kDim / 16; ++pair) {
        uint32_t b[4];
        load_transposed(b, value_rows + uint32_t(step * 16 * S::kStride + pair * 32));
        multiply(sums[2 * pair], a, b[0], b[1]);
        multiply(sums[2 * pair + 1], a, b[2], b[3]);
      }
    }
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float total = totals[half];
    total += __shfl_xor_sync(kAll, total, 1);
    total += __shfl_xor_sync(kAll, total, 2);
    const int r = row + half * 8;
    if (r >= tile.rows) continue;
    const float inverse = 1.0f / total;
    float* to = out + (tile.first_row + r) * out_stride + int64_t(head) * dim + quad * 2;
#pragma unroll
    for (int t = 0; t < kDim / 8; ++t)
      if (t * 8 + quad * 2 < dim) {
        to[t * 8] = sums[t][2 * half] * inverse;
        to[t * 8 + 1] = sums[t][2 * half + 1] * inverse;
      }
  }
}

template <int kDim>
void flash(const Cuda& device, const KvView& view, int layer, const FlashTile* tiles, int tile_count,
           const int32_t* pages, int page_stride, int heads, const float* q, int64_t q_stride, float* out,
           int64_t out_stride) {
  using S = Shape<kDim>;
  const auto raw = [&](int bits) {
    return S::kKeys * (kv_row_bytes(view.groups, bits) + (bits < 16 ? 2 * view.groups : 0));
  };
  const int shared = S::kQueries + 2 * S::kExpanded + raw(view.k_bits) + raw(view.v_bits);
  const float scale = float(std::numbers::log2e / std::sqrt(double(view.head_dim)));
  launch(device, "attention of spans", flash_kernel<kDim>, dim3(unsigned(heads), unsigned(tile_count)), kThreads,
         size_t(shared), view, layer, tiles, pages, page_stride, q, q_stride, scale, out, out_stride);
}

}  // namespace

void prefill_attention(const Cuda& device, const KvView& view, int layer, const FlashTile* tiles, int tile_count,
                       const int32_t* pages, int page_stride, int heads, const float* q, int64_t q_stride, float* out,
                       int64_t out_stride) {
  CHECK(view.head_dim <= 256, "CUDA takes a head_dim of at most 256, not ", view.head_dim);
  if (tile_count == 0) return;
  const auto run = view.groups <= 2   ? flash<64>
                   : view.groups == 3 ? flash<96>
                   : view.groups == 4 ? flash<128>
                                      : flash<256>;
  run(device, view, layer, tiles, tile_count, pages, page_stride, heads, q, q_stride, out, out_stride);
}

}  // namespace halfturn::cuda
