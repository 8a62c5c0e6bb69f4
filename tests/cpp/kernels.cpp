// The kernels of one instruction set, the KV pool, RoPE tables and the sampler behind C functions, for
// tests/kernels.py. Compiled by the tests with -DHALFTURN_ISA=name and that instruction set's flags.
#include <cstdio>

#include "check.h"
#include "cpu/attention.inl"
#include "cpu/elementwise.inl"
#include "cpu/kv_store.inl"
#include "rope.h"

using namespace halfturn;
namespace isa = halfturn::HALFTURN_ISA;

static thread_local std::string message;

// Runs work(); the message of an Error is kept for error_message().
template <class Work>
static auto guarded(Work work) -> decltype(work()) {
  message.clear();
  try {
    return work();
  } catch (const Error& error) {
    message = error.what();
    return decltype(work()){};
  }
}

extern "C" {

const char* error_message() { return message.c_str(); }
int width() { return isa::kWidth; }

void rms_norm(const float* x, const float* weight, const float* mean, int64_t size, double epsilon, float* out) {
  isa::rms_norm(x, weight, mean, size, epsilon, out);
}
void swiglu(const float* gate, const float* up, int64_t size, float* out) { isa::swiglu(gate, up, size, out); }
void hadamard(float* x, int64_t size, int64_t block) { isa::hadamard(x, size, block); }
void round_to_half(const float* x, int64_t size, int64_t padded, float* out) {
  isa::round_to_half(x, size, padded, out);
}

KvPool* pool_new(int64_t layers, int64_t kv_heads, int64_t head_dim, int k_bits, int v_bits, int64_t pages,
                 int rotate) {
  return guarded([&] { return new KvPool(layers, kv_heads, head_dim, k_bits, v_bits, pages, rotate != 0); });
}
void pool_free(KvPool* pool) { delete pool; }
int64_t pool_page_bytes(KvPool* pool) { return pool->page_bytes(); }
void pool_block(KvPool* pool, int64_t layer, int64_t page, int64_t kv_head, const void** parts) {
  KvBlock block = pool->block(layer, page, kv_head);
  parts[0] = block.k;
  parts[1] = block.k_scales;
  parts[2] = block.v;
  parts[3] = block.v_scales;
}
// q [tokens, heads, head_dim] and k [tokens, kv_heads, head_dim] are changed; rotary [tokens, head_dim].
void rope_and_store(KvPool* pool, int64_t layer, const int32_t* pages, int64_t position, int64_t tokens,
                    const float* rotary, int64_t heads, float* q, float* k, const float* v) {
  const int64_t dim = pool->head_dim(), kv_size = pool->kv_heads() * dim;
  for (int64_t i = 0; i < tokens; ++i)
    isa::rope_and_store(*pool, layer, pages[(position + i) / kPageSize], (position + i) % kPageSize, rotary + i * dim,
                        heads, q + i * heads * dim, k + i * kv_size, v + i * kv_size);
}
// Scratch memory of attention filled with NaN, and behind it floats that the kernels may not write.
struct Scratch {
  static constexpr ptrdiff_t kGuard = 64;
  static constexpr float kMark = 12345.0f;
  std::vector<float> memory;
  explicit Scratch(size_t floats) : memory(floats + kGuard, std::numeric_limits<float>::quiet_NaN()) {
    std::fill(memory.end() - kGuard, memory.end(), kMark);
  }
  ~Scratch() {
    if (std::count(memory.end() - kGuard, memory.end(), kMark) != kGuard)
      message = "attention wrote behind its scratch memory";
  }
};

// q and out: [tokens, heads, head_dim]; `chunk` tokens a call of the kernel.
void attention(KvPool* pool, int64_t layer, int64_t heads, const int32_t* pages, int64_t position, int64_t tokens,
               int64_t chunk, const float* q, float* out) {
  const int64_t dim = pool->head_dim(), group = heads / pool->kv_heads();
  Scratch scratch{size_t(attention_scratch(*pool, group))};
  for (int64_t first = 0; first < tokens; first += chunk)
    for (int64_t h = 0; h < pool->kv_heads(); ++h) {
      const int64_t at = (first * heads + h * group) * dim;
      isa::attention(*pool, layer, h, group, pages, position + first, std::min(chunk, tokens - first), q + at,
                     heads * dim, out + at, scratch.memory.data());
    }
}

// The same for the tokens one by one, chunks of keys on their own, the last one first.
void attention_in_chunks(KvPool* pool, int64_t layer, int64_t heads, const int32_t* pages, int64_t position,
                         int64_t tokens, const float* q, float* out) {
  const int64_t dim = pool->head_dim(), group = heads / pool->kv_heads(), state = group * attention_state(*pool);
  Scratch scratch{size_t(attention_scratch(*pool, group))};
  for (int64_t i = 0; i < tokens; ++i)
    for (int64_t h = 0; h < pool->kv_heads(); ++h) {
      const int64_t at = (i * heads + h * group) * dim, chunks = (position + i) / cpu::kChunk + 1;
      Scratch states{size_t(chunks * state)};
      for (int64_t c = chunks; c-- > 0;)
        isa::attention_chunk(*pool, layer, h, group, pages, position + i, q + at, c, states.memory.data() + c * state,
                             scratch.memory.data());
      isa::attention_merge(*pool, group, chunks, states.memory.data(), out + at, scratch.memory.data());
    }
}

Rope* rope_new(int64_t head_dim, int64_t max_positions, double theta, int type, double factor, double low, double high,
               double original, int64_t context) {
  Config config;
  config.head_dim = head_dim;
  config.max_positions = max_positions;
  config.rope_theta = theta;
  config.rope_scaling = {RopeScaling::Type(type), factor, low, high, original};
  return guarded([&] { return new Rope(config, context); });
}
void rope_free(Rope* rope) { delete rope; }
const float* rope_at(Rope* rope, int64_t position) {
  return guarded([&] { return rope->at(position); });
}

}  // extern "C"
