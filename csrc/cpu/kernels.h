// The kernels of one instruction set as a table of functions. Each *.inl is compiled once per instruction set by
// kernels_generic.cpp, kernels_avx2.cpp and kernels_avx512.cpp, in a namespace of that name.
#pragma once
#include <cstdint>

#include "../batch.h"
#include "../pages.h"
#include "matrix.h"

namespace halfturn {

constexpr int64_t kSumBlock = 64;  // elements whose exponentials are summed together

struct Kernels {
  // matmul.inl ------------------------------------------------------------------------------------------------------
  int offset;  // that the stored levels carry: see Matrix
  // A row to int8 codes with one scale; elements past `size` up to `padded` (a multiple of 16) become zero.
  // sums[t] is the sum of the codes before input tile t, t = 0 .. padded/16.
  void (*quantize_row)(const float* x, int64_t size, int64_t padded, int8_t* codes, float* scale, int32_t* sums);
  // Output tiles [tile, tile + tiles) of 16 outputs each, for all rows of the activations: see matrix.h.
  void (*matmul_a8)(const cpu::Matrix& w, const cpu::Activations& x, int64_t tile, int64_t tiles, cpu::Output out,
                    uint8_t* scratch);
  void (*matmul_f16)(const cpu::Matrix& w, const cpu::Activations& x, int64_t tile, int64_t tiles, cpu::Output out,
                     uint8_t* scratch);

  // elementwise.inl -------------------------------------------------------------------------------------------------
  // mean: subtracted from the result; null where nothing is.
  void (*rms_norm)(const float* x, const float* weight, const float* mean, int64_t size, double epsilon, float* out);
  void (*swiglu)(const float* gate, const float* up, int64_t size, float* out);
  // Sum of e^((x - maximum) / temperature) over x[0..size). Where they are given, weights[0..size) get the terms, and
  // sums their sum per block of kSumBlock.
  double (*exponentials)(const float* x, int64_t size, float maximum, float temperature, float* weights, double* sums);
  // Orthonormal Walsh-Hadamard transform (Sylvester order) of each `block` of x[0..size), in place.
  void (*hadamard)(float* x, int64_t size, int64_t block);
  // The nearest half-precision number of each of x[0..size), saturated; zeros up to `padded`.
  void (*round_to_half)(const float* x, int64_t size, int64_t padded, float* out);

  // A checksum of p[0..bytes), read as four streams; bytes is a multiple of 4096.
  uint64_t (*read_bytes)(const uint8_t* p, int64_t bytes);

  // attention.inl ---------------------------------------------------------------------------------------------------
  // One token: RoPE on q [heads, head_dim] and k [kv_heads, head_dim] in place, the Hadamard transform of R3 where K
  // has fewer than 16 bits, and K and V written into the pool. rotary: cos then sin of this position, [2, head_dim/2].
  void (*rope_and_store)(KvPool& pool, int64_t layer, int32_t page, int64_t slot, const float* rotary, int64_t heads,
                         float* q, float* k, const float* v);
  // Attention of `count` consecutive query tokens of one sequence for one KV head and its `group` query heads.
  // q and out: [count, heads*head_dim] rows of `stride` floats, at the first query head of this KV head; the token i
  // attends to positions 0 .. position+i. scratch: attention_scratch() floats of this thread.
  void (*attention)(const KvPool& pool, int64_t layer, int64_t kv_head, int64_t group, const int32_t* pages,
                    int64_t position, int64_t count, const float* q, int64_t stride, float* out, float* scratch);
  // The same, to the bit, for one token whose keys are shared out among threads: the attention over the positions of
  // one chunk of cpu::kChunk goes to states [group, attention_state()]; then the states of all chunks, [chunks, group,
  // attention_state()], give out [group, head_dim].
  void (*attention_chunk)(const KvPool& pool, int64_t layer, int64_t kv_head, int64_t group, const int32_t* pages,
                          int64_t position, const float* q, int64_t chunk, float* states, float* scratch);
  void (*attention_merge)(const KvPool& pool, int64_t group, int64_t chunks, const float* states, float* out,
                          float* scratch);
};

extern const Kernels kernels_generic;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

}  // namespace halfturn
