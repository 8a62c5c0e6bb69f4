// The KV pages on the card: keys and values of kPageSize positions, all layers and KV heads, at 16, 8 or 4 bits.
#pragma once
#include <cstdint>

#include "../pages.h"
#include "cuda.h"

namespace halfturn::cuda {

// Where positions are kept; passed to kernels by value. A block holds one KV head of one layer of one page: the keys'
// codes [32 positions, width] and half scales [32, groups], then the values' in the same way. `groups` = head_dim / 32
// rounded up, width = 32 * groups, and what is behind head_dim is zero. Codes: half; int8; or 4 bits, two's complement,
// byte j of a group of 32 holding the values 2j (low half) and 2j + 1.
struct KvView {
  uint8_t* data = nullptr;  // [pages, layers, kv_heads, block_bytes]
  int64_t page_bytes = 0, block_bytes = 0;
  int k_scales = 0, v = 0, v_scales = 0;  // byte offsets inside a block, multiples of 16; scales are absent at 16 bits
  int layers = 0, kv_heads = 0, head_dim = 0, groups = 0;
  int k_bits = 16, v_bits = 16;
  int r3_block = 1;  // r3_block_of()
};

// What each row of a step is; device pointers. Row r is the token at positions[r] of sequence sequences[r], whose pages
// are pages[sequence * page_stride ...].
struct RowsView {
  const int32_t* tokens = nullptr;     // [rows]
  const int32_t* positions = nullptr;  // [rows]; -1: a row of padding, which reads and writes nothing
  const int32_t* sequences = nullptr;  // [rows]
  const int32_t* pages = nullptr;      // [sequences, page_stride]
  int page_stride = 0;
};

}  // namespace halfturn::cuda
