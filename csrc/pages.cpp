#include "pages.h"

#include <sys/mman.h>

#include "check.h"

namespace halfturn {

namespace {

constexpr int64_t align(int64_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

void check_kv_bits(int k_bits, int v_bits) {
  for (int bits : {k_bits, v_bits})
    CHECK(bits == 16 || bits == 8 || bits == 4, "the KV cache cannot store ", bits, " bits a value: choose 16, 8 or 4");
}

KvPool::KvPool(int64_t layers, int64_t kv_heads, int64_t head_dim, int k_bits, int v_bits, int64_t pages,
               bool rotate_keys)
    : layers_(layers), kv_heads_(kv_heads), head_dim_(head_dim), pages_(pages), k_bits_(k_bits), v_bits_(v_bits) {
  check_kv_bits(k_bits, v_bits);
  CHECK(head_dim >= 2 && head_dim <= 1024 && head_dim % 2 == 0,
        "the KV cache takes an even head_dim of 2 to 1024, not ", head_dim);
  CHECK(layers > 0 && kv_heads > 0 && pages > 0, "the KV cache needs layers, heads and pages, not ", layers, ", ",
        kv_heads, " and ", pages);

  groups_ = (head_dim + kKvGroup - 1) / kKvGroup;
  r3_block_ = r3_block_of(head_dim, k_bits, rotate_keys);

  const int64_t scales = groups_ * kPageSize * 2;
  k_scales_ = align(head_dim * kPageSize * k_bits / 8);
  v_ = k_scales_ + (k_bits < 16 ? align(scales) : 0);
  v_scales_ = v_ + align(v_dim() * kPageSize * v_bits / 8);
  block_bytes_ = v_scales_ + (v_bits < 16 ? align(scales) : 0);

  int64_t total = 0;
  CHECK(!__builtin_mul_overflow(block_bytes_, layers * kv_heads, &page_bytes_) &&
            !__builtin_mul_overflow(page_bytes_, pages, &total),
        "a KV cache of ", pages, " pages does not fit any memory");
  void* data = mmap(nullptr, size_t(total), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  CHECK(data != MAP_FAILED, "a KV cache of ", pages * kPageSize, " positions needs ", total,
        " bytes, which this machine does not give: lower kv_tokens or the context, or store fewer bits");
  data_ = static_cast<uint8_t*>(data);
}

KvPool::~KvPool() { munmap(data_, size_t(bytes())); }

}  // namespace halfturn
