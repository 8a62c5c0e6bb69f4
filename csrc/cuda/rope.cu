// What a new token does before attention: RoPE, R3, and its keys and values into the KV cache as codes.
#include <cmath>

#include "attention.h"
#include "kv_codes.cuh"
#include "kv_encode.cuh"
#include "launch.cuh"

namespace halfturn::cuda {

namespace {

constexpr int kWarps = 4;

// One warp a head. Grid: (rows, heads + 2 * kv_heads in blocks of kWarps).
template <int kGroups>
__global__ void __launch_bounds__(32 * kWarps, 8)
    rope_kernel(KvView view, int layer, RowsView rows, const float* rotary, int heads, float* q, int64_t q_stride,
                const float* k, const float* v, int64_t kv_stride, float r3_scale) {
  let_next_start();
  const int lane = int(threadIdx.x) % 32, dim = view.head_dim;
  const int64_t row = blockIdx.x;
  int head = int(blockIdx.y) * kWarps + int(threadIdx.x) / 32;
  if (head >= heads + 2 * view.kv_heads) return;
  wait_for_previous();
  const int position = rows.positions[row];
  if (position < 0) return;

  float x[kGroups];
  Turn<kGroups> turn;
  if (head < heads + view.kv_heads) turn.load(rotary + int64_t(position) * dim, dim, lane);
  if (head < heads) {
    float* own = q + row * q_stride + int64_t(head) * dim;
    turn.apply(own, dim, lane, x);
    if (view.r3_block > 1) hadamard_head(x, view.r3_block, r3_scale, lane);
    __syncwarp();  // all lanes have read
#pragma unroll
    for (int g = 0; g < kGroups; ++g)
      if (32 * g + lane < dim) own[32 * g + lane] = x[g];
    return;
  }

  head -= heads;
  const bool is_key = head < view.kv_heads;
  if (!is_key) head -= view.kv_heads;
  if (is_key) {
    turn.apply(k + row * kv_stride + int64_t(head) * dim, dim, lane, x);
    if (view.r3_block > 1) hadamard_head(x, view.r3_block, r3_scale, lane);
  } else {
    load_head(v + row * kv_stride + int64_t(head) * dim, dim, lane, x);
  }
  const int slot = position % kPage, bits = is_key ? view.k_bits : view.v_bits;
  const int32_t page = rows.pages[int64_t(rows.sequences[row]) * rows.page_stride + position / kPage];
  uint8_t* block = kv_block(view, layer, page, head);
  uint8_t* codes = block + (is_key ? 0 : view.v) + slot * kv_row_bytes(view.groups, bits);
  __half* scales = reinterpret_cast<__half*>(block + (is_key ? view.k_scales : view.v_scales)) + slot * view.groups;
  encode_head(x, bits, codes, scales, view.groups, lane);
}

}  // namespace

void rope_and_store(const Cuda& device, const KvView& view, int layer, const RowsView& rows, int count,
                    const float* rotary, int heads, float* q, int64_t q_stride, const float* k, const float* v,
                    int64_t kv_stride) {
  CHECK(view.head_dim <= 256, "CUDA takes a head_dim of at most 256, not ", view.head_dim);
  if (count == 0) return;
  const auto kernel = view.groups <= 2 ? rope_kernel<2> : view.groups <= 4 ? rope_kernel<4> : rope_kernel<8>;
  const dim3 grid(unsigned(count), unsigned((heads + 2 * view.kv_heads + kWarps - 1) / kWarps));
  launch(device, "RoPE", kernel, grid, 32 * kWarps, 0, view, layer, rows, rotary, heads, q, q_stride, k, v, kv_stride,
         float(1.0 / std::sqrt(double(view.r3_block))));
}

}  // namespace halfturn::cuda
