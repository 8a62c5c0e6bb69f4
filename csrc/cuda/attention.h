// RoPE, the KV cache's writes and attention over it.
#pragma once
#include <cstdint>

#include "../codec/grid.h"
#include "cuda.h"
#include "kv.h"

namespace halfturn::cuda {

// Turns q [rows, q_stride] (heads * head_dim used) and k [rows, kv_stride] by RoPE, applies R3 (orthonormal block
// Hadamard of view.r3_block) to both, and writes k and v into the pages. q is updated in place. rotary: float32
// [context, 2, head_dim/2], the cosines, then the sines of a position. head_dim is even and at most 256, here and
// below.
void rope_and_store(const Cuda&, const KvView&, int layer, const RowsView&, int rows, const float* rotary, int heads,
                    float* q, int64_t q_stride, const float* k, const float* v, int64_t kv_stride);

// Decode: each row on its own, over all positions up to its own, in chunks whose length depends on that position alone,
// whatever the batch is; each chunk's attention goes to `partial`, and the chunks are added in a fixed order.
// max_chunks: the most that a row of this launch has. out: float32 [rows, out_stride].
constexpr int kChunk = 128;      // positions of the shortest chunks
constexpr int kMostChunks = 32;  // of a row
// The more and shorter, the better for one row, as they are more blocks; for many rows, what each begins and ends with
// counts. Measured at Llama-3.1-8B's shape: 128 positions up to 2048, then 16 to 32 chunks.
HALFTURN_HOST_DEVICE constexpr int chunk_length(int position) {
  int shift = 0;
  while (position / kChunk >> shift >= (shift == 0 ? 16 : kMostChunks)) ++shift;
  return kChunk << shift;
}
HALFTURN_HOST_DEVICE constexpr int chunks_of(int position) { return position / chunk_length(position) + 1; }
int64_t decode_partial_floats(const KvView&, int heads, int rows, int max_chunks);
void decode_attention(const Cuda&, const KvView&, int layer, const RowsView&, int rows, int heads, const float* q,
                      int64_t q_stride, float* partial, int max_chunks, float* out, int64_t out_stride);
// The same with rope_and_store() in it, to the bit: q, k and v are as the projections left them (q stays so), and the
// rows' own keys and values are stored on the way. No two rows may be of one sequence, and older positions must have
// been written before the step: by kernels that a copy or a wait separates from this launch, as they are fetched before
// earlier kernels have ended.
void decode_rope_attention(const Cuda&, const KvView&, int layer, const RowsView&, int rows, const float* rotary,
                           int heads, const float* q, int64_t q_stride, const float* k, const float* v,
                           int64_t kv_stride, float* partial, int max_chunks, float* out, int64_t out_stride);

// Prefill: up to kFlashRows neighbouring rows of one sequence, the first at `position`. The keys and values of all of
// them are in the pages already. A tile of no rows does nothing.
constexpr int kFlashRows = 64;
struct FlashTile {
  int32_t first_row, rows, position, sequence;
};
void prefill_attention(const Cuda&, const KvView&, int layer, const FlashTile* tiles, int tile_count,
                       const int32_t* pages, int page_stride, int heads, const float* q, int64_t q_stride, float* out,
                       int64_t out_stride);

}  // namespace halfturn::cuda
