#include <cuda_fp16.h>

#include <algorithm>

#include "../codec/grid.h"
#include "launch.cuh"
#include "row_operand.cuh"
#include "rows.h"

namespace halfturn::cuda {
namespace {

constexpr int kWidestHadamard = 1024;  // of the activation's blocks

// Four threads a tile: thread j of them has the inputs 2j, 2j + 1, 2j + 8 and 2j + 9 of the row's token, whose codes
// are neighbours in each plane.
__global__ void __launch_bounds__(256)
    embed_rows(Matrix m, RowsView view, int rows, float* x, int64_t stride, const SampleResult* drawn) {
  __shared__ __align__(16) int8_t levels[256];
  let_next_start();
  if (threadIdx.x < 16)
    reinterpret_cast<uint4*>(levels)[threadIdx.x] = reinterpret_cast<const uint4*>(m.levels)[threadIdx.x];
  wait_for_previous();
  const int row = int(blockIdx.x), group_tiles = int(m.in_tiles / m.groups);
  if (row >= rows || view.positions[row] < 0) return;
  const int given = view.tokens[row];
  // A row without a choice has no token either; what follows it is thrown away.
  const int token = given < 0 ? min(max(drawn[-1 - given].token, 0), int(m.out) - 1) : given;
  __syncthreads();
  for (int n = int(threadIdx.x); n < 4 * int(m.in_tiles); n += int(blockDim.x)) {
    const int k = n >> 2, j = n & 3, e = grid::element_at(token % 16, 2 * j);
    const uint32_t* tile = m.codes + (int64_t(k) * m.out_tiles + token / 16) * 8 * m.bits;
    const float scale = __half2float(__ushort_as_half(m.scales[int64_t(k / group_tiles) * 16 * m.out_tiles + token]));
    uint32_t codes[4] = {};
    for (int shift = 0; shift < m.bits;) {
      const int width = grid::plane_width(m.bits, shift);
      const uint32_t packed = grid::plane_bits(tile + 8 * shift, width, e, 4);
#pragma unroll
      for (int i = 0; i < 4; ++i) codes[i] |= ((packed >> (i * width)) & ((1u << width) - 1)) << shift;
      shift += width;
    }
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const int at = 16 * k + 2 * j + 4 * i;
      float* to = x + row * stride + at;
      const float a = float(levels[codes[i]]) * scale, b = float(levels[codes[i + 1]]) * scale;
      if (at + 1 < int(m.in)) *reinterpret_cast<float2*>(to) = {a, b};
      else if (at < int(m.in)) *to = a;
    }
  }
}

enum class Kind { kNorm, kPlain };

struct RowJob {
  const float* x;
  int64_t stride;
  const uint16_t *weight, *mean;
  const int32_t* chosen;
  int size;
  float epsilon;
};

// One block a row, one warp a chunk of 32 * kEach inputs: element (q * 32 + lane) * 4 + t of a chunk is v[4 * q + t] of
// its lane.
template <Kind kKind, int kEach>
__global__ void __launch_bounds__(1024) prepare_rows(RowJob job, Operand out) {
  constexpr int kQuads = kEach / 4;
  __shared__ float2 parts[32];
  __shared__ float shifted_parts[32];
  let_next_start();
  const int row = int(blockIdx.x), lane = int(threadIdx.x) & 31, warp = int(threadIdx.x) >> 5;
  const int warps = int(blockDim.x) >> 5, first = warp * 32 * kEach + lane * 4;  // q more: 128 inputs on
  const bool weighs = kKind == Kind::kNorm && job.weight, shifts = kKind == Kind::kNorm && job.mean;
  uint2 mean[kQuads];
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    mean[q] = {0, 0};
    if (shifts && first + 128 * q < job.size) mean[q] = *reinterpret_cast<const uint2*>(job.mean + first + 128 * q);
  }
  wait_for_previous();
  const float* const from = job.x + int64_t(job.chosen ? job.chosen[row] : row) * job.stride;

  float4 v[kQuads];
  float squares = 0, largest = 0;
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    const int e = first + 128 * q;
    v[q] = {0, 0, 0, 0};
    if (e < job.size) v[q] = *reinterpret_cast<const float4*>(from + e);  // rows are padded to 16 with zeros
    if (kKind == Kind::kNorm) add_squares(v[q], squares);
    if (weighs && e < job.size) v[q] = weighted(v[q], *reinterpret_cast<const uint2*>(job.weight + e));
    largest = fmaxf(largest, magnitude(v[q]));
  }
  RowScale scale = {1.0f, 0.0f, 0.0f};
  if (kKind == Kind::kNorm || out.codes) {
    squares = shuffle_sum(squares);
    largest = warp_max(largest);
    if (lane == 0) parts[warp] = {squares, largest};
    __syncthreads();
    const float2 part = lane < warps ? parts[lane] : float2{0, 0};
    const float factor = kKind == Kind::kNorm ? norm_factor(part.x, job.size, job.epsilon) : 1.0f;
    if (shifts) {  // the largest magnitude is known once the norm's factor is
      largest = 0;
#pragma unroll
      for (int q = 0; q < kQuads; ++q) {
        v[q] = shifted(v[q], factor, mean[q]);
        largest = fmaxf(largest, magnitude(v[q]));
      }
      largest = warp_max(largest);
      if (lane == 0) shifted_parts[warp] = largest;
      __syncthreads();
      scale = row_scale(lane < warps ? shifted_parts[lane] : 0.0f);
    } else {
      scale = row_scale(part.y, factor);
    }
    if (out.codes && threadIdx.x == 0) out.scales[row] = scale.scale;
  }

#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    const int e = first + 128 * q;
    if (e >= out.padded_steps * kStep) break;
    const int64_t at = operand_at(e, row, out.rows_padded);
    if (out.codes) put_codes(out.codes + at, v[q], scale.inverse);
    else put_halves(out.values + at, v[q], scale.factor);
  }
}

// The butterflies of a Hadamard transform inside chunks of 32 * kEach values.
template <int kEach>
__device__ __forceinline__ void butterflies(float (&v)[kEach], int block) {
  const int lane = int(threadIdx.x) & 31;
#pragma unroll
  for (int stage = 1; stage < 32 * kEach; stage <<= 1) {
    if (stage >= block) break;
    if (stage >= 4 && stage < 128) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const float other = __shfl_xor_sync(~0u, v[i], stage >> 2);
        v[i] = lane & (stage >> 2) ? other - v[i] : v[i] + other;
      }
    } else {
      const int apart = stage < 4 ? stage : stage >> 5;
#pragma unroll
      for (int i = 0; i < kEach; ++i)
        if (!(i & apart)) {
          const float a = v[i], b = v[i + apart];
          v[i] = a + b;
          v[i + apart] = a - b;
        }
    }
  }
}

__device__ inline float silu_times(float gate, float up) {
  return __fmul_rn(__fdividef(gate, 1.0f + __expf(-gate)), up);
}

// One block a row, one warp a chunk of 32 * kEach values, as in prepare_rows. With kPairs Hadamard blocks are of two
// chunks: the two warps of a pair exchange halves, after which each has half of both chunks.
template <int kEach, bool kPairs>
__global__ void __launch_bounds__(1024)
    activate_rows(const float* gate, const float* up, int64_t stride, int size, int block, Operand out) {
  constexpr int kChunk = 32 * kEach, kQuads = kEach / 4;
  __shared__ float parts[32];
  __shared__ float4 exchanged[kPairs ? 32 : 1][kQuads / 2][32];
  let_next_start();
  const int row = int(blockIdx.x), lane = int(threadIdx.x) & 31, warp = int(threadIdx.x) >> 5;
  const int warps = int(blockDim.x) >> 5;
  const int64_t begin = row * stride;
  wait_for_previous();

  float v[kEach];
  {
    float4 a[kQuads], u[kQuads];
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      const int e = warp * kChunk + (32 * q + lane) * 4;
      a[q] = u[q] = {0, 0, 0, 0};
      if (e < size) {  // rows are padded to 16 with zeros
        a[q] = *reinterpret_cast<const float4*>(gate + begin + e);
        u[q] = *reinterpret_cast<const float4*>(up + begin + e);
      }
    }
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      v[4 * q] = silu_times(a[q].x, u[q].x), v[4 * q + 1] = silu_times(a[q].y, u[q].y);
      v[4 * q + 2] = silu_times(a[q].z, u[q].z), v[4 * q + 3] = silu_times(a[q].w, u[q].w);
    }
  }
  if (block > 1) {
    butterflies<kEach>(v, block);
    if constexpr (kPairs) {
      // The even warp keeps the first half of its registers and gets that of the odd one, which keeps the second.
      const bool odd = warp & 1;
#pragma unroll
      for (int q = 0; q < kQuads / 2; ++q) {
        const float* give = v + 4 * (q + kQuads / 2);
        exchanged[warp][q][lane] = odd ? make_float4(v[4 * q], v[4 * q + 1], v[4 * q + 2], v[4 * q + 3])
                                       : make_float4(give[0], give[1], give[2], give[3]);
      }
      __syncthreads();
#pragma unroll
      for (int q = 0; q < kQuads / 2; ++q) {
        const float4 got = exchanged[warp ^ 1][q][lane];
        const float theirs[4] = {got.x, got.y, got.z, got.w};
#pragma unroll
        for (int t = 0; t < 4; ++t) {
          const int i = 4 * q + t;
          const float mine = odd ? v[i + kEach / 2] : v[i];
          v[i] = mine + theirs[t];
          v[i + kEach / 2] = odd ? theirs[t] - mine : mine - theirs[t];
        }
      }
    }
    const float factor = rsqrtf(float(block));
#pragma unroll
    for (int i = 0; i < kEach; ++i) v[i] *= factor;
  }

  float inverse = 0, largest = 0;
#pragma unroll
  for (int q = 0; q < kQuads; ++q)
    largest = fmaxf(largest, magnitude({v[4 * q], v[4 * q + 1], v[4 * q + 2], v[4 * q + 3]}));
  largest = warp_max(largest);
  if (out.codes) {
    if (lane == 0) parts[warp] = largest;
    __syncthreads();
    const RowScale scale = row_scale(lane < warps ? parts[lane] : 0.0f);
    inverse = scale.inverse;
    if (threadIdx.x == 0) out.scales[row] = scale.scale;
  }
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    int e = warp * kChunk + (32 * q + lane) * 4;
    if constexpr (kPairs) {
      const int half = q / (kQuads / 2), of_half = q % (kQuads / 2) + (warp & 1) * (kQuads / 2);
      e = ((warp & ~1) + half) * kChunk + (32 * of_half + lane) * 4;
    }
    if (e >= out.padded_steps * kStep) continue;
    const float4 four = {v[4 * q], v[4 * q + 1], v[4 * q + 2], v[4 * q + 3]};
    const int64_t at = operand_at(e, row, out.rows_padded);
    if (out.codes) put_codes(out.codes + at, four, inverse);
    else put_halves(out.values + at, four, 1.0f);
  }
}

// The same of few rows, in the place of `gate`: a thread has four values and a block kPartValues of a row, as what
// takes time here is how much follows one after the other. maxima [rows, warps] <- the largest magnitudes. The same to
// the bit.
constexpr int kPartWarps = 8, kPartValues = 128 * kPartWarps;
static_assert(kPartValues >= kWidestHadamard && kMostMaxima * 128 >= kWidestRow);
__global__ void __launch_bounds__(32 * kPartWarps)
    activate_parts(float* gate, const float* up, int64_t stride, int size, int block, float* maxima) {
  __shared__ float4 exchanged[2][kPartWarps][32];
  let_next_start();
  const int row = int(blockIdx.x), lane = int(threadIdx.x) & 31, warp = int(threadIdx.x) >> 5;
  const int e = int(blockIdx.y) * kPartValues + int(threadIdx.x) * 4;
  float* const to = gate + row * stride + e;
  float4 g = {0, 0, 0, 0}, u = g;
  wait_for_previous();
  if (e < size) {  // rows are padded to 16 with zeros
    g = *reinterpret_cast<const float4*>(to);
    u = *reinterpret_cast<const float4*>(up + row * stride + e);
  }
  float v[4] = {silu_times(g.x, u.x), silu_times(g.y, u.y), silu_times(g.z, u.z), silu_times(g.w, u.w)};
  if (block > 1) {
    butterflies<4>(v, block);
    for (int apart = 1, turn = 0; 128 * apart < block; apart *= 2, turn ^= 1) {  // between warps
      exchanged[turn][warp][lane] = {v[0], v[1], v[2], v[3]};
      __syncthreads();
      const float4 got = exchanged[turn][warp ^ apart][lane];
      const float theirs[4] = {got.x, got.y, got.z, got.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = warp & apart ? theirs[i] - v[i] : v[i] + theirs[i];
    }
    const float factor = rsqrtf(float(block));
    for (float& value : v) value *= factor;
  }
  const float4 four = {v[0], v[1], v[2], v[3]};
  const float largest = warp_max(magnitude(four));
  if (e < size) *reinterpret_cast<float4*>(to) = four;
  if (lane == 0) maxima[(row * int(gridDim.y) + int(blockIdx.y)) * kPartWarps + warp] = largest;
}

__global__ void fill_rope_table(const double* frequencies, int half, int64_t context, float* table) {
  wait_for_previous();
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= context * half) return;
  double sine, cosine;
  sincos(double(i / half) * frequencies[i % half], &sine, &cosine);
  float* row = table + i / half * 2 * half;
  row[i % half] = float(cosine);
  row[half + i % half] = float(sine);
}

template <Kind kKind>
void prepare(const Cuda& device, const char* name, const RowJob& job, const Operand& out) {
  CHECK(job.size <= kWidestRow, name, " takes rows of up to ", kWidestRow, " values on CUDA, this model has ",
        job.size);
  const bool small = job.size <= kSmallRow;  // small chunks spread a row over more warps
  const int chunk = small ? 256 : 1024, chunks = (out.padded_steps * kStep + chunk - 1) / chunk;
  static_assert(kSmallRow <= 32 * 256 && kWidestRow <= 32 * 1024 && kStep * kPaddedSteps % 1024 == 0);
  const int threads = 32 * chunks;
  launch(device, name, small ? prepare_rows<kKind, 8> : prepare_rows<kKind, 32>, dim3(unsigned(out.rows)), threads, 0,
         job, out);
}

void check_activation(int size, int block) {
  CHECK(size <= kWidestRow, "activate takes rows of up to ", kWidestRow, " values on CUDA, this model has ", size);
  CHECK(block <= kWidestHadamard, "activate takes Hadamard blocks of up to ", kWidestHadamard,
        " values on CUDA, this model has ", block);
}

}  // namespace

void embed(const Cuda& device, const Matrix& matrix, const RowsView& view, int rows, float* x, int64_t stride,
           const SampleResult* drawn) {
  const int threads = matrix.in_tiles < 64 ? 128 : 256;
  launch(device, "embed", embed_rows, dim3(unsigned(rows)), threads, 0, matrix, view, rows, x, stride, drawn);
}

void norm(const Cuda& device, const float* x, int64_t stride, int size, const Vector& weight, const Vector& mean,
          double epsilon, const int32_t* chosen, const Operand& out) {
  prepare<Kind::kNorm>(device, "norm", {x, stride, weight.data, mean.data, chosen, size, float(epsilon)}, out);
}

void convert(const Cuda& device, const float* x, int64_t stride, int size, const Operand& out) {
  prepare<Kind::kPlain>(device, "convert", {x, stride, nullptr, nullptr, nullptr, size, 0.0f}, out);
}

void activate(const Cuda& device, const float* gate, const float* up, int64_t stride, int size, int block,
              const Operand& out) {
  check_activation(size, block);
  constexpr int kMost = 32;  // warps
  const int values = out.padded_steps * kStep;
  int chunk = 1024;
  auto kernel = activate_rows<32, false>;
  if (values <= kMost * 256 && block <= 256) chunk = 256, kernel = activate_rows<8, false>;
  else if (values <= kMost * 512 && block <= 512) chunk = 512, kernel = activate_rows<16, false>;
  else if (values <= kMost * 512) chunk = 512, kernel = activate_rows<16, true>;
  int chunks = (values + chunk - 1) / chunk;
  if (block > chunk) chunks += chunks % 2;  // pairs of warps
  launch(device, "activate", kernel, dim3(unsigned(out.rows)), 32 * chunks, 0, gate, up, stride, size, block, out);
}

int activate(const Cuda& device, float* gate, const float* up, int64_t stride, int size, int block, int rows,
             float* maxima) {
  check_activation(size, block);
  const int blocks = (size + kPartValues - 1) / kPartValues;
  launch(device, "activate", activate_parts, dim3(unsigned(rows), unsigned(blocks)), 32 * kPartWarps, 0, gate, up,
         stride, size, block, maxima);
  return blocks * kPartWarps;
}

void rope_table(const Cuda& device, const double* frequencies, int half, int64_t context, float* table) {
  const Buffer<double> copy(half, "RoPE frequencies");
  check(cudaMemcpyAsync(copy.get(), frequencies, size_t(copy.bytes()), cudaMemcpyHostToDevice, device.stream()),
        "the RoPE table");
  launch(device, "the RoPE table", fill_rope_table, dim3(unsigned((context * half + 255) / 256)), 256, 0, copy.get(),
         half, context, table);
  check(cudaStreamSynchronize(device.stream()), "the RoPE table");
}

void clear(void* memory, int64_t bytes) {
  check(cudaMemset(memory, 0, size_t(bytes)), "clearing memory");
  check(cudaDeviceSynchronize(), "clearing memory");
}

}  // namespace halfturn::cuda
