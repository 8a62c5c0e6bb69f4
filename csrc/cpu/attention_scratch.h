// How the attention kernel cuts its work, and the scratch memory that follows from it.
#pragma once
#include <algorithm>
#include <cstdint>

#include "../pages.h"

namespace halfturn {

namespace cpu {
constexpr int64_t kQueryRows = 64;  // query rows (tokens * heads of the group) that share one pass over the keys
constexpr int64_t kKeyBlock = 128;  // positions, aligned to multiples of it, that share one step of the online softmax
constexpr int64_t kChunk = 256;     // positions, aligned likewise, whose attention is computed on its own, then added
}  // namespace cpu

// Floats that one query row's attention over one chunk, or over all of them, is: values, sums by lane, maximum.
inline int64_t attention_state(const KvPool& pool) { return pool.v_dim() + 32; }

// Floats of scratch memory for one thread's call of Kernels::attention.
inline int64_t attention_scratch(const KvPool& pool, int64_t group) {
  int64_t rows = std::max(cpu::kQueryRows, group);
  int64_t per_row = pool.head_dim() + cpu::kKeyBlock + pool.v_dim() + 16 + 1;  // query, scores, output, sums, maximum
  int64_t page = kPageSize * (pool.head_dim() + pool.v_dim());                 // keys and values as floats
  return rows * (per_row + attention_state(pool)) + page + 8 * 16;             // each part starts at a multiple of 16
}

}  // namespace halfturn
