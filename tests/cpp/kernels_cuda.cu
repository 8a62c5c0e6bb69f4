// RoPE, the KV cache, attention and the activation on a card behind the C functions of kernels.cpp, with arguments in
// host memory.
#include <cuda_fp16.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "cuda/attention.h"
#include "cuda/kv_encode.cuh"
#include "cuda/launch.cuh"
#include "cuda/rows.h"
#include "rope.h"

using namespace halfturn;

static thread_local std::string message;

// Runs work(); the message of an Error is kept for error_message().
template <class Work>
static auto guarded(Work work) -> decltype(work()) {
  message.clear();
  try {
    return work();
  } catch (const Error& error) {
    message = error.what();
    return decltype(work())();
  }
}

static Cuda& device() {
  static Cuda* const cuda = new Cuda;
  return *cuda;
}

template <class T>
static cuda::Buffer<T> upload(const T* data, int64_t count) {
  cuda::Buffer<T> buffer(count, "a test");
  cuda::check(cudaMemcpyAsync(buffer.get(), data, size_t(buffer.bytes()), cudaMemcpyHostToDevice, device().stream()),
              "copying to the card");
  return buffer;
}

template <class T>
static void download(const T* from, int64_t count, T* to) {
  cuda::check(cudaMemcpyAsync(to, from, size_t(count) * sizeof(T), cudaMemcpyDeviceToHost, device().stream()),
              "copying from the card");
  device().synchronize();
}

// In no unnamed namespace: functions that take one would not be exported.
struct Pool {
  cuda::KvView view;
  cuda::Buffer<uint8_t> memory;
  std::vector<uint8_t> parts[4];  // of the block that pool_block() was asked for last
};

namespace {

// Rows of one sequence from `position` on, and a row of padding behind them.
struct Rows {
  cuda::Buffer<int32_t> positions, sequences, pages;
  cuda::RowsView view;
  Rows(const int32_t* page_list, int64_t position, int64_t count) {
    const int64_t page_count = (position + count - 1) / kPageSize + 1;
    std::vector<int32_t> all(size_t(count) + 1), zeros(size_t(count) + 1);
    for (int64_t i = 0; i < count; ++i) all[size_t(i)] = int32_t(position + i);
    all.back() = -1;
    positions = upload(all.data(), count + 1);
    sequences = upload(zeros.data(), count + 1);
    pages = upload(page_list, page_count);
    view = {nullptr, positions.get(), sequences.get(), pages.get(), int(page_count)};
    device().synchronize();  // before the vectors go
  }
};

// `rows` rows of `size` floats and one of padding, which nothing may write.
struct Padded {
  int64_t rows, size;
  cuda::Buffer<float> memory;
  static constexpr float kUntouched = 12345.0f;
  Padded(const float* data, int64_t rows, int64_t size) : rows(rows), size(size) {
    std::vector<float> all(size_t((rows + 1) * size), std::numeric_limits<float>::quiet_NaN());
    if (data) std::copy(data, data + rows * size, all.begin());
    std::fill(all.end() - size, all.end(), kUntouched);
    memory = upload(all.data(), int64_t(all.size()));
    device().synchronize();
  }
  void take(float* to) const {
    std::vector<float> all(size_t((rows + 1) * size));
    download(memory.get(), int64_t(all.size()), all.data());
    std::copy(all.begin(), all.end() - size, to);
    CHECK(std::count(all.end() - size, all.end(), kUntouched) == size, "a row of padding was written");
  }
};

__global__ void byte_scales_kernel(const float* largest, int count, float* scales, float* inverses) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= count) return;
  const cuda::KvScale scale(cuda::over_127(largest[i]));
  scales[i] = scale.value, inverses[i] = scale.inverse;
}

}  // namespace

extern "C" {

const char* error_message() { return message.c_str(); }

Pool* pool_new(int64_t layers, int64_t kv_heads, int64_t head_dim, int k_bits, int v_bits, int64_t pages, int rotate) {
  return guarded([&] {
    auto* pool = new Pool;
    cuda::KvView& view = pool->view;
    view.layers = int(layers);
    view.kv_heads = int(kv_heads);
    view.head_dim = int(head_dim);
    view.groups = int((head_dim + 31) / 32);
    view.k_bits = k_bits;
    view.v_bits = v_bits;
    view.r3_block = int(r3_block_of(head_dim, k_bits, rotate != 0));
    const int position = view.groups * 4, scales = 2 * 32 * view.groups;  // bytes of one position per bit
    view.k_scales = 32 * position * k_bits;
    view.v = view.k_scales + (k_bits < 16 ? scales : 0);
    view.v_scales = view.v + 32 * position * v_bits;
    view.block_bytes = view.v_scales + (v_bits < 16 ? scales : 0);
    view.page_bytes = view.block_bytes * layers * kv_heads;
    pool->memory = cuda::Buffer<uint8_t>(view.page_bytes * pages, "the KV cache");
    view.data = pool->memory.get();
    // As other requests may have left it: NaN, in halves and in scales.
    cuda::check(cudaMemsetAsync(view.data, 0xff, size_t(view.page_bytes * pages), device().stream()), "a test");
    device().synchronize();
    return pool;
  });
}
void pool_free(Pool* pool) { delete pool; }
int64_t pool_page_bytes(Pool* pool) { return pool->view.page_bytes; }

void pool_bytes(Pool* pool, uint8_t* to) {
  guarded([&] { download(pool->memory.get(), pool->memory.count(), to); });
}

// The parts in the CPU's layout (pages.h).
void pool_block(Pool* pool, int64_t layer, int64_t page, int64_t kv_head, const void** parts) {
  guarded([&] {
    const cuda::KvView& view = pool->view;
    const size_t dim = size_t(view.head_dim), groups = size_t(view.groups), width = groups * 32;
    std::vector<uint8_t> block(size_t(view.block_bytes));
    download(view.data + page * view.page_bytes + (layer * view.kv_heads + kv_head) * view.block_bytes,
             view.block_bytes, block.data());
    for (size_t which = 0; which < 2; ++which) {
      const bool keys = which == 0;
      const size_t bits = size_t(keys ? view.k_bits : view.v_bits), bytes = bits == 16 ? 2 : 1;
      const uint8_t* codes = block.data() + (keys ? 0 : view.v);
      const uint8_t* scales = block.data() + (keys ? view.k_scales : view.v_scales);
      auto &out = pool->parts[2 * which], &out_scales = pool->parts[2 * which + 1];
      out.assign(width * 32 * bits / 8, 0);
      out_scales.assign(bits < 16 ? groups * 64 : 0, 0);
      for (size_t p = 0; p < 32; ++p) {
        for (size_t g = 0; bits < 16 && g < groups; ++g)
          std::memcpy(out_scales.data() + (g * 32 + p) * 2, scales + (p * groups + g) * 2, 2);
        for (size_t d = 0; d < (keys ? dim : width); ++d) {
          if (bits > 4) {
            const size_t to = keys ? d * 32 + p : (d / 32 * 32 + p) * 32 + d % 32;
            std::memcpy(out.data() + to * bytes, codes + (p * width + d) * bytes, bytes);
          } else {
            const uint8_t code = uint8_t(codes[(p * width + d) / 2] >> (d % 2 * 4) & 15);
            const size_t to = keys ? d / 2 * 32 + p : (d / 32 * 32 + p) * 16 + d % 16;
            const bool high = keys ? d % 2 == 1 : d % 32 >= 16;
            out[to] = uint8_t(out[to] | code << (high ? 4 : 0));
          }
        }
      }
    }
    for (int i = 0; i < 4; ++i) parts[i] = pool->parts[i].data();
  });
}

// q [tokens, heads, head_dim] and k [tokens, kv_heads, head_dim] are changed; rotary [tokens, head_dim].
void rope_and_store(Pool* pool, int64_t layer, const int32_t* pages, int64_t position, int64_t tokens,
                    const float* rotary, int64_t heads, float* q, float* k, const float* v) {
  guarded([&] {
    const int64_t dim = pool->view.head_dim, kv_heads = pool->view.kv_heads, kv_size = kv_heads * dim;
    std::vector<float> table(size_t((position + tokens) * dim));
    std::copy(rotary, rotary + tokens * dim, table.begin() + position * dim);
    const auto angles = upload(table.data(), int64_t(table.size()));
    const Rows rows(pages, position, tokens);
    const Padded queries(q, tokens, heads * dim), keys(k, tokens, kv_size), values(v, tokens, kv_size);
    cuda::rope_and_store(device(), pool->view, int(layer), rows.view, int(tokens) + 1, angles.get(), int(heads),
                         queries.memory.get(), heads * dim, keys.memory.get(), values.memory.get(), kv_size);
    queries.take(q);
    // The turned keys are written nowhere but into the cache: turn them as queries, which stores the same once more.
    const Padded turned(k, tokens, kv_size);
    cuda::rope_and_store(device(), pool->view, int(layer), rows.view, int(tokens) + 1, angles.get(), int(kv_heads),
                         turned.memory.get(), kv_size, keys.memory.get(), values.memory.get(), kv_size);
    turned.take(k);
  });
}

// q and out: [tokens, heads, head_dim]; `chunk` tokens a call of the kernel.
void attention(Pool* pool, int64_t layer, int64_t heads, const int32_t* pages, int64_t position, int64_t tokens,
               int64_t chunk, const float* q, float* out) {
  guarded([&] {
    const int64_t size = heads * pool->view.head_dim;
    const Rows rows(pages, position, tokens);
    const Padded queries(q, tokens, size), result(nullptr, tokens, size);
    for (int64_t first = 0; first < tokens; first += chunk) {
      const int64_t end = std::min(tokens, first + chunk);
      std::vector<cuda::FlashTile> tiles;
      for (int64_t row = first; row < end; row += cuda::kFlashRows)
        tiles.push_back(
            {int32_t(row), int32_t(std::min<int64_t>(cuda::kFlashRows, end - row)), int32_t(position + row), 0});
      tiles.push_back({});
      const auto uploaded = upload(tiles.data(), int64_t(tiles.size()));
      cuda::prefill_attention(device(), pool->view, int(layer), uploaded.get(), int(tiles.size()), rows.pages.get(),
                              rows.view.page_stride, int(heads), queries.memory.get(), size, result.memory.get(), size);
      device().synchronize();
    }
    result.take(out);
  });
}

// The same, every token as a row of decode, in one launch.
void decode_attention_rows(Pool* pool, int64_t layer, int64_t heads, const int32_t* pages, int64_t position,
                           int64_t tokens, const float* q, float* out) {
  guarded([&] {
    const int64_t size = heads * pool->view.head_dim;
    int chunks = 1, count = int(tokens) + 1;
    for (int64_t i = 0; i < tokens; ++i) chunks = std::max(chunks, cuda::chunks_of(int(position + i)));
    const Rows rows(pages, position, tokens);
    const Padded queries(q, tokens, size), result(nullptr, tokens, size);
    const cuda::Buffer<float> partial(cuda::decode_partial_floats(pool->view, int(heads), count, chunks), "a test");
    cuda::decode_attention(device(), pool->view, int(layer), rows.view, count, int(heads), queries.memory.get(), size,
                           partial.get(), chunks, result.memory.get(), size);
    result.take(out);
  });
}

// One step of decoding: row r is the token at positions[r] of a sequence of its own, whose pages are
// pages[r * stride ..]. q [rows, heads, head_dim] and k, v [rows, kv_heads, head_dim] as the projections leave them,
// rotary [context, head_dim]; `fused`: in one launch with RoPE and the cache's writes, or in two.
void decode_step(Pool* pool, int64_t layer, int64_t heads, const int32_t* pages, int64_t stride,
                 const int32_t* positions, int64_t rows, const float* rotary, int64_t context, int64_t fused,
                 const float* q, const float* k, const float* v, float* out) {
  guarded([&] {
    const cuda::KvView& view = pool->view;
    const int64_t size = heads * view.head_dim, kv_size = view.kv_heads * view.head_dim;
    int chunks = 1, count = int(rows) + 1;
    for (int64_t r = 0; r < rows; ++r) chunks = std::max(chunks, cuda::chunks_of(positions[r]));
    std::vector<int32_t> all(positions, positions + rows), sequences(size_t(count), 0);
    all.push_back(-1);
    for (int64_t r = 0; r < rows; ++r) sequences[size_t(r)] = int32_t(r);
    const auto row_positions = upload(all.data(), count), row_sequences = upload(sequences.data(), count);
    const auto row_pages = upload(pages, rows * stride);
    const auto angles = upload(rotary, context * view.head_dim);
    const Padded queries(q, rows, size), keys(k, rows, kv_size), values(v, rows, kv_size), result(nullptr, rows, size);
    const cuda::RowsView rows_view = {nullptr, row_positions.get(), row_sequences.get(), row_pages.get(), int(stride)};
    const cuda::Buffer<float> partial(cuda::decode_partial_floats(view, int(heads), count, chunks), "a test");
    device().synchronize();
    if (fused) {
      cuda::decode_rope_attention(device(), view, int(layer), rows_view, count, angles.get(), int(heads),
                                  queries.memory.get(), size, keys.memory.get(), values.memory.get(), kv_size,
                                  partial.get(), chunks, result.memory.get(), size);
    } else {
      cuda::rope_and_store(device(), view, int(layer), rows_view, count, angles.get(), int(heads), queries.memory.get(),
                           size, keys.memory.get(), values.memory.get(), kv_size);
      cuda::decode_attention(device(), view, int(layer), rows_view, count, int(heads), queries.memory.get(), size,
                             partial.get(), chunks, result.memory.get(), size);
    }
    result.take(out);
  });
}
void attention_in_chunks(Pool* pool, int64_t layer, int64_t heads, const int32_t* pages, int64_t position,
                         int64_t tokens, const float* q, float* out) {
  decode_attention_rows(pool, layer, heads, pages, position, tokens, q, out);
}

// gate and up [rows, stride]; out [rows, padded] <- what the operand means, its padding to whole steps too.
void activate(int64_t size, int64_t stride, int64_t block, int64_t rows, int64_t half, const float* gate,
              const float* up, float* out) {
  guarded([&] {
    cuda::Operand x;
    x.rows = int(rows), x.rows_padded = int((rows + 7) / 8 * 8), x.steps = int((size + cuda::kStep - 1) / cuda::kStep);
    x.padded_steps = x.steps;
    const int64_t padded = int64_t(x.steps) * cuda::kStep, values = padded * x.rows_padded;
    const auto gates = upload(gate, rows * stride), ups = upload(up, rows * stride);
    const std::vector<uint16_t> garbage(size_t(values), 0x7e7e);
    const auto memory = upload(garbage.data(), values);
    const cuda::Buffer<float> scales(x.rows_padded, "a test");
    if (half) x.values = memory.get();
    else x.codes = reinterpret_cast<int8_t*>(memory.get());
    x.scales = scales.get();
    cuda::activate(device(), gates.get(), ups.get(), stride, int(size), int(block), x);
    std::vector<uint16_t> halves(size_t(values), 0);
    std::vector<float> scale(size_t(x.rows_padded), 0);
    download(memory.get(), values, halves.data());
    download(scales.get(), x.rows_padded, scale.data());
    const auto* codes = reinterpret_cast<const int8_t*>(halves.data());
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t e = 0; e < padded; ++e) {
        const int64_t n = e >> 2 & 3, in_tile = 8 * (n & 1) + 2 * (n >> 1) + (e & 1) + 2 * (e & 2);
        const int64_t at = (e / cuda::kStep * x.rows_padded + r) * cuda::kStep + (e & 48) + in_tile;
        __half value;
        std::memcpy(&value, &halves[size_t(at)], 2);
        out[r * padded + e] = half ? __half2float(value) : float(codes[at]) * scale[size_t(r)];
      }
  });
}

// The same of few rows: out [rows, stride] takes the place of gate, largest [rows] is the maximum of the parts.
void activate_in_place(int64_t size, int64_t stride, int64_t block, int64_t rows, const float* gate, const float* up,
                       float* out, float* largest) {
  guarded([&] {
    const auto gates = upload(gate, rows * stride), ups = upload(up, rows * stride);
    const std::vector<float> garbage(size_t(rows * cuda::kMostMaxima), 1e9f);
    const auto maxima = upload(garbage.data(), int64_t(garbage.size()));
    const int parts =
        cuda::activate(device(), gates.get(), ups.get(), stride, int(size), int(block), int(rows), maxima.get());
    CHECK(parts <= cuda::kMostMaxima, parts, " maxima of a row");
    std::vector<float> all(garbage.size(), 0);
    download(gates.get(), rows * stride, out);
    download(maxima.get(), int64_t(all.size()), all.data());
    for (int64_t r = 0; r < rows; ++r) {
      const auto begin = all.begin() + r * parts;
      largest[r] = *std::max_element(begin, begin + parts);
    }
  });
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
// scales and inverses [count] of codes of 8 bits whose largest magnitudes are these.
void byte_scales(const float* largest, int64_t count, float* scales, float* inverses) {
  guarded([&] {
    const auto given = upload(largest, count);
    const cuda::Buffer<float> there(count, "a test"), inverses_there(count, "a test");
    cuda::launch(device(), "byte scales", byte_scales_kernel, dim3(unsigned((count + 255) / 256)), 256, 0, given.get(),
                 int(count), there.get(), inverses_there.get());
    download(there.get(), count, scales);
    download(inverses_there.get(), count, inverses);
  });
}

const float* rope_at(Rope* rope, int64_t position) {
  return guarded([&] { return rope->at(position); });
}

}  // extern "C"
