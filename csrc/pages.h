// The pool of KV pages: keys and values of kPageSize positions, all layers and KV heads, at 16, 8 or 4 bits.
#pragma once
#include <cstdint>

namespace halfturn {

constexpr int64_t kPageSize = 32;  // positions of one page
constexpr int64_t kKvGroup = 32;   // values that share one scale

// Block of the Hadamard transform of R3 on queries and keys: the largest power of two that divides head_dim, 1 = none.
constexpr int64_t r3_block_of(int64_t head_dim, int k_bits, bool rotated) {
  return rotated && k_bits < 16 ? head_dim & -head_dim : 1;
}

// Throws Error unless both are 16, 8 or 4.
void check_kv_bits(int k_bits, int v_bits);

// Where one page keeps one KV head of one layer. `groups` = head_dim / 32 rounded up; the last one may be shorter.
// Keys stand dimension by dimension, so that one load gives the same dimension of many positions and scores need no sum
// across lanes; values stand position by position. Both come as panels of 32 rows of 32 codes, one after the other.
// Every byte belongs to one position, so that threads may write neighbouring positions.
struct KvBlock {
  uint8_t* k;          // 16 bits: half [head_dim, 32]; 8: int8 [head_dim, 32];
                       // 4: [head_dim/2, 32] bytes, dimension 2i in the low half of a byte, 2i+1 in the high half
  uint16_t* k_scales;  // half [groups, 32]; unused at 16 bits
  uint8_t* v;          // 16 bits: half [groups, 32 positions, 32]; 8: int8 of the same shape;
               // 4: [groups, 32 positions, 16] bytes, dimension i in the low half of byte i, i+16 in the high half
  uint16_t* v_scales;  // half [groups, 32]; unused at 16 bits
};

class KvPool {
 public:
  // k_bits and v_bits: 16 (IEEE half), 8 or 4 (two's complement codes, one half scale per 32 values of a position).
  // rotate_keys asks for the Hadamard transform of R3 on queries and keys, which is done where k_bits < 16. Memory is
  // reserved here and becomes resident as it is written. Throws Error if a number is out of range or the memory cannot
  // be had.
  KvPool(int64_t layers, int64_t kv_heads, int64_t head_dim, int k_bits, int v_bits, int64_t pages, bool rotate_keys);
  ~KvPool();
  KvPool(const KvPool&) = delete;
  KvPool& operator=(const KvPool&) = delete;

  int64_t layers() const { return layers_; }
  int64_t kv_heads() const { return kv_heads_; }
  int64_t head_dim() const { return head_dim_; }
  int64_t v_dim() const { return groups_ * kKvGroup; }  // head_dim rounded up to whole groups
  int64_t groups() const { return groups_; }
  int64_t pages() const { return pages_; }
  int k_bits() const { return k_bits_; }
  int v_bits() const { return v_bits_; }
  int64_t r3_block() const { return r3_block_; }

  int64_t k_bytes() const { return v_; }                  // of the keys of one block with their scales
  int64_t v_bytes() const { return block_bytes_ - v_; }   // of its values
  int64_t page_bytes() const { return page_bytes_; }      // of one page: kPageSize positions in all layers
  int64_t bytes() const { return page_bytes_ * pages_; }  // reserved; see above
  KvBlock block(int64_t layer, int64_t page, int64_t kv_head) const {
    uint8_t* start = data_ + page * page_bytes_ + (layer * kv_heads_ + kv_head) * block_bytes_;
    return {start, reinterpret_cast<uint16_t*>(start + k_scales_), start + v_,
            reinterpret_cast<uint16_t*>(start + v_scales_)};
  }

 private:
  int64_t layers_, kv_heads_, head_dim_, groups_, pages_;
  int k_bits_, v_bits_;
  int64_t r3_block_;
  int64_t k_scales_, v_, v_scales_;  // offsets inside a block
  int64_t block_bytes_, page_bytes_;
  uint8_t* data_ = nullptr;  // [pages, layers, kv_heads, block_bytes]: a short sequence touches few bytes
};

}  // namespace halfturn
