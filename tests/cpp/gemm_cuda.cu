// Products of packed matrices on the card behind C functions, for tests/gemm_cuda.py and scripts/bench_kernels.py.
#include <algorithm>
#include <memory>
#include <random>
#include <vector>

#include "cuda/copies.cuh"
#include "cuda/gemm.h"
#include "cuda/gemv.h"
#include "cuda/launch.cuh"

using namespace halfturn;
using cuda::Buffer;
using cuda::Operand;
using cuda::Output;

static std::string message;
static std::unique_ptr<Cuda> device;

// Runs work(); the message of an Error is kept for error_message().
template <class Work>
static auto guarded(Work work) -> decltype(work()) {
  message.clear();
  try {
    if (!device) device = std::make_unique<Cuda>();
    return work();
  } catch (const Error& error) {
    message = error.what();
    return decltype(work())();
  }
}

template <class T>
static Buffer<T> upload(const T* from, int64_t count) {
  Buffer<T> to(count, "a test");
  cuda::check(cudaMemcpy(to.get(), from, size_t(to.bytes()), cudaMemcpyHostToDevice), "a test");
  cuda::check(cudaDeviceSynchronize(), "a test");  // a copy from ordinary memory may return before it has arrived
  return to;
}

struct Held {
  Buffer<uint32_t> codes;
  Buffer<uint16_t> scales;
  Buffer<int8_t> levels;
  Buffer<float> bias;
  cuda::Matrix matrix;
};

static std::unique_ptr<Held> hold(int64_t bits, int64_t in, int64_t out, int64_t groups, const uint32_t* codes,
                                  const uint16_t* scales, const int8_t* levels, const float* bias) {
  auto held = std::make_unique<Held>();
  cuda::Matrix& m = held->matrix;
  m.bits = int(bits), m.in = in, m.out = out, m.groups = groups;
  m.in_tiles = (in + 15) / 16, m.out_tiles = (out + 15) / 16;
  held->codes = upload(codes, m.in_tiles * m.out_tiles * 8 * bits);
  held->scales = upload(scales, groups * m.out_tiles * 16);
  std::vector<int8_t> table(256);
  std::copy(levels, levels + (1 << bits), table.begin());
  m.look_at_levels(levels);
  held->levels = upload(table.data(), 256);
  if (bias) held->bias = upload(bias, out);
  m.codes = held->codes.get(), m.scales = held->scales.get(), m.levels = held->levels.get();
  m.bias = bias ? held->bias.get() : nullptr;
  return held;
}

enum Kind { kGemv, kGemm, kGemvOfRows };  // the last makes its operand itself

static void multiply(Kind kind, const cuda::Matrix* matrices, const Output* outputs, int count, const Operand& x,
                     int tiling, const cuda::RowSource& source = {}) {
  if (kind != kGemm) return gemv(*device, matrices, outputs, count, x, kind == kGemvOfRows ? &source : nullptr);
  gemm(*device, matrices, outputs, count, x, tiling);
}

// The same with outputs y[i] [rows, strides[i]] on the host, which are read and written.
static void multiply_into(Kind kind, Held* const* matrices, int64_t count, const Operand& x,
                          const cuda::RowSource& source, int tiling, float* const* y, const int64_t* strides,
                          bool add) {
  std::vector<cuda::Matrix> list;
  std::vector<Output> outputs;
  std::vector<Buffer<float>> memory;
  for (int64_t i = 0; i < count; ++i) {
    memory.push_back(upload(y[i], x.rows * strides[i]));
    list.push_back(matrices[i]->matrix);
    outputs.push_back({memory.back().get(), strides[i], add});
  }
  multiply(kind, list.data(), outputs.data(), int(count), x, tiling, source);
  device->synchronize();
  for (int64_t i = 0; i < count; ++i)
    cuda::check(cudaMemcpy(y[i], memory[size_t(i)].get(), size_t(memory[size_t(i)].bytes()), cudaMemcpyDeviceToHost),
                "a test");
}

static int64_t l2_bytes() {
  int bytes = 0;
  cuda::check(cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, device->ordinal()), "a measurement");
  return bytes;
}

// Seconds of one of the `each` launches of run(), `repeats` times, as one graph or one by one.
template <class Run>
static void time_launches(const Run& run, int64_t each, bool graph, int64_t repeats, double* seconds) {
  constexpr const char* kName = "a measurement";
  run();
  device->synchronize();
  cudaGraphExec_t executable = nullptr;
  if (graph) {
    cudaGraph_t captured = nullptr;
    cuda::check(cudaStreamBeginCapture(device->stream(), cudaStreamCaptureModeThreadLocal), kName);
    run();
    cuda::check(cudaStreamEndCapture(device->stream(), &captured), kName);
    cuda::check(cudaGraphInstantiate(&executable, captured, 0), kName);
    cudaGraphDestroy(captured);
    cuda::check(cudaGraphLaunch(executable, device->stream()), kName);
  }
  cudaEvent_t begin, end;
  cuda::check(cudaEventCreate(&begin), kName);
  cuda::check(cudaEventCreate(&end), kName);
  for (int64_t i = 0; i < repeats; ++i) {
    cuda::check(cudaEventRecord(begin, device->stream()), kName);
    if (graph) cuda::check(cudaGraphLaunch(executable, device->stream()), kName);
    else run();
    cuda::check(cudaEventRecord(end, device->stream()), kName);
    device->synchronize();
    float milliseconds = 0;
    cuda::check(cudaEventElapsedTime(&milliseconds, begin, end), kName);
    seconds[i] = double(milliseconds) * 1e-3 / double(each);
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  if (executable) cudaGraphExecDestroy(executable);
}

// Reads the block's part of the codes through a ring in shared memory that is full before it waits for the kernel ahead
// of it, then a row, and writes something.
constexpr int kReadingThreads = 512, kReadingPieces = 8;  // pieces of 16 bytes of a thread on their way
constexpr size_t kReadingBytes = size_t(kReadingThreads) * kReadingPieces * 16;
static __global__ void read_alone(const uint4* codes, int64_t pieces, const float* x, int in, float* y) {
  HALFTURN_LAUNCHED_MEMORY(uint4, 16, ring);
  cuda::let_next_start();
  const int64_t end = pieces * (blockIdx.x + 1) / gridDim.x;
  int64_t next = pieces * blockIdx.x / gridDim.x + threadIdx.x;
  int slot = 0;
  const auto start_copy = [&] {
    if (next < end) cuda::copy_16(ring + slot * kReadingThreads + threadIdx.x, codes + next);
    cuda::commit_copies();
    next += kReadingThreads;
    slot = (slot + 1) % kReadingPieces;
  };
  for (int i = 0; i < kReadingPieces; ++i) start_copy();
  cuda::wait_for_previous();
  float sum = 0;
  for (int i = 4 * int(threadIdx.x); i + 3 < in; i += 4 * kReadingThreads) {
    const float4 four = *reinterpret_cast<const float4*>(x + i);
    sum += four.x + four.y + four.z + four.w;
  }
  while (next < end) {
    cuda::wait_for_copies<kReadingPieces - 1>();
    start_copy();
  }
  cuda::wait_for_copies<0>();
  __syncthreads();
  if (threadIdx.x < 32) y[32 * blockIdx.x + threadIdx.x] = sum + float(ring[threadIdx.x].x);
}

extern "C" {

const char* error_message() { return message.c_str(); }

Held* matrix_new(int64_t bits, int64_t in, int64_t out, int64_t groups, const uint32_t* codes, const uint16_t* scales,
                 const int8_t* levels, const float* bias) {
  return guarded([&] { return hold(bits, in, out, groups, codes, scales, levels, bias).release(); });
}
void matrix_free(Held* held) { delete held; }

// y[i] [rows, strides[i]] is read and written. x is an operand's memory: int8 with scales, or half without.
void product(int64_t kind, Held* const* matrices, int64_t count, const void* x, const float* x_scales, int64_t rows,
             int64_t rows_padded, int64_t steps, float* const* y, const int64_t* strides, int64_t add, int64_t tiling) {
  guarded([&] {
    Operand operand;
    operand.rows = int(rows), operand.rows_padded = int(rows_padded), operand.steps = int(steps);
    operand.padded_steps = cuda::pad_steps(steps);
    const int64_t values = steps * rows_padded * cuda::kStep;
    const int64_t room = operand.padded_steps * rows_padded * cuda::kStep;
    Buffer<int8_t> codes;
    Buffer<float> scales;
    Buffer<uint16_t> halves;
    if (x_scales) {
      std::vector<int8_t> padded(size_t(room), 0);
      std::copy_n(static_cast<const int8_t*>(x), values, padded.begin());
      codes = upload(padded.data(), room), scales = upload(x_scales, rows_padded);
      operand.codes = codes.get(), operand.scales = scales.get();
    } else {
      std::vector<uint16_t> padded(size_t(room), 0);
      std::copy_n(static_cast<const uint16_t*>(x), values, padded.begin());
      halves = upload(padded.data(), room);
      operand.values = halves.get();
    }
    multiply_into(Kind(kind), matrices, count, operand, {}, int(tiling), y, strides, add != 0);
  });
}

// The same at up to two rows x [rows, stride] of floats, of which the product makes its operand itself: RMSNorm of them
// with `norm`, times weight and less mean (half [in], or null), or as they are, with their largest magnitudes in
// `parts` parts where there are any (maxima [rows, parts]).
void product_of_rows(Held* const* matrices, int64_t count, const float* x, int64_t rows, int64_t stride, int64_t half,
                     int64_t norm, const uint16_t* weight, const uint16_t* mean, const float* maxima, int64_t parts,
                     float* const* y, const int64_t* strides) {
  guarded([&] {
    const int64_t in = matrices[0]->matrix.in;
    int8_t codes = 0;
    uint16_t values = 0;
    Operand operand;
    if (half) operand.values = &values;
    else operand.codes = &codes;
    operand.rows = operand.rows_padded = int(rows), operand.steps = int((in + cuda::kStep - 1) / cuda::kStep);
    operand.padded_steps = cuda::pad_steps(operand.steps);
    CHECK(cuda::gemv_takes_rows(*device, rows, in, norm != 0, half == 0), "the card takes no such rows");
    const Buffer<float> there = upload(x, rows * stride);
    Buffer<uint16_t> weight_there, mean_there;
    Buffer<float> maxima_there;
    if (weight) weight_there = upload(weight, stride);
    if (mean) mean_there = upload(mean, stride);
    if (maxima) maxima_there = upload(maxima, rows * parts);
    const cuda::RowSource source = {there.get(), stride, norm != 0, weight_there.get(), mean_there.get(),
                                    int(in),     1e-5f,  nullptr,   maxima_there.get(), int(parts)};
    multiply_into(kGemvOfRows, matrices, count, operand, source, -1, y, strides, false);
  });
}

// Seconds of one launch, for `repeats` runs of about `launches` launches each. Every launch multiplies the next set of
// matrices of the sizes outs[count], out of more memory than the card's cache holds twice.
void time_product(int64_t kind, int64_t half, int64_t tiling, int64_t bits, int64_t in, const int64_t* outs,
                  int64_t count, int64_t rows, int64_t launches, int64_t graph, int64_t repeats, double* seconds) {
  guarded([&] {
    std::mt19937 random(1);
    const int64_t in_tiles = (in + 15) / 16;
    int64_t all_outs = 0, set_bytes = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t tiles = (outs[i] + 15) / 16;
      all_outs += 16 * tiles, set_bytes += in_tiles * tiles * 32 * bits;
    }
    const int64_t sets = std::max<int64_t>(2, 3 * l2_bytes() / set_bytes + 1);
    std::vector<int8_t> levels(256);
    for (int i = 0; i < 1 << bits; ++i)
      levels[size_t(i)] = int8_t(bits == 8 ? std::min(i, 254) - 127 : 2 * i + 1 - (1 << bits));
    std::vector<std::unique_ptr<Held>> held;
    std::vector<std::vector<cuda::Matrix>> list(static_cast<size_t>(sets));
    for (auto& set : list)
      for (int64_t i = 0; i < count; ++i) {
        const int64_t out_tiles = (outs[i] + 15) / 16;
        std::vector<uint32_t> codes(size_t(in_tiles * out_tiles * 8 * bits));
        uint32_t state = uint32_t(random());
        for (uint32_t& v : codes) v = state = state * 1664525u + 1013904223u;
        if (bits == 8)
          for (uint32_t& v : codes) v &= 0xfefefefe;  // no code of 255
        const std::vector<uint16_t> scales(size_t(out_tiles * 16), 0x1400);
        held.push_back(hold(bits, in, outs[i], 1, codes.data(), scales.data(), levels.data(), nullptr));
        set.push_back(held.back()->matrix);
      }

    Operand x;
    x.rows = int(rows), x.rows_padded = int((rows + 7) / 8 * 8), x.steps = int((in + cuda::kStep - 1) / cuda::kStep);
    x.padded_steps = cuda::pad_steps(x.steps);
    const int64_t values = int64_t(x.padded_steps) * x.rows_padded * cuda::kStep;
    std::vector<int8_t> codes(half ? 0 : size_t(values));
    for (int8_t& v : codes) v = int8_t(int(random() % 255) - 127);
    std::vector<uint16_t> halves(half ? size_t(values) : 0);
    for (uint16_t& v : halves) v = uint16_t((random() & 0x83ff) | 0x3800);
    const std::vector<float> scales(size_t(x.rows_padded), 0.01f);
    const Buffer<int8_t> codes_there = upload(codes.data(), int64_t(codes.size()));
    const Buffer<uint16_t> halves_there = upload(halves.data(), int64_t(halves.size()));
    const Buffer<float> scales_there = upload(scales.data(), int64_t(scales.size()));
    if (half) x.values = halves_there.get();
    else x.codes = codes_there.get(), x.scales = scales_there.get();
    std::vector<float> floats(kind == kGemvOfRows ? size_t(rows * in) : 0);
    for (float& v : floats) v = float(int(random() % 255)) - 127.0f;
    const Buffer<float> floats_there = upload(floats.data(), int64_t(floats.size()));
    const std::vector<uint16_t> means(size_t(in), 0x3800);
    const Buffer<uint16_t> means_there = upload(means.data(), in);
    const bool norms = in <= 8192;
    const uint16_t* const mean = norms && !half ? means_there.get() : nullptr;
    const cuda::RowSource source = {floats_there.get(), in, norms, nullptr, mean, int(in), 1e-5f};
    const Buffer<float> y(rows * all_outs, "a measurement");
    std::vector<Output> outputs;
    for (int64_t i = 0, at = 0; i < count; at += rows * outs[i++]) outputs.push_back({y.get() + at, outs[i], false});

    const int64_t each = std::max<int64_t>(launches, std::min<int64_t>(sets, 64));
    int64_t next = 0;
    const auto run = [&] {
      for (int64_t i = 0; i < each; ++i)
        multiply(Kind(kind), list[size_t(next++ % sets)].data(), outputs.data(), int(count), x, int(tiling), source);
    };
    time_launches(run, each, graph != 0, repeats, seconds);
  });
}

// Seconds of one launch of a kernel that only reads `bytes` of weights, in one block a multiprocessor, and a row of
// `in` floats: the least that a GEMV launched in the same way could take.
void time_reading(int64_t bytes, int64_t in, int64_t launches, int64_t graph, int64_t repeats, double* seconds) {
  guarded([&] {
    const int64_t sets = std::max<int64_t>(2, 3 * l2_bytes() / bytes + 1);
    const int64_t each = std::max(launches, std::min<int64_t>(sets, 64));
    const Buffer<uint4> weights(sets * (bytes / 16), "a measurement");
    const Buffer<float> x(in, "a measurement"), y(32 * device->multiprocessors(), "a measurement");
    cuda::check(cudaMemset(weights.get(), 1, size_t(weights.bytes())), "a measurement");
    cuda::check(cudaMemset(x.get(), 0, size_t(x.bytes())), "a measurement");
    cuda::check(cudaDeviceSynchronize(), "a measurement");
    const size_t shared = std::max(kReadingBytes, size_t(device->shared_memory() / 2 + 1024));  // one block's
    int64_t next = 0;
    const auto run = [&] {
      for (int64_t i = 0; i < each; ++i)
        cuda::launch(*device, "reading", read_alone, dim3(unsigned(device->multiprocessors())), kReadingThreads, shared,
                     weights.get() + (next++ % sets) * (bytes / 16), bytes / 16, x.get(), int(in), y.get());
    };
    time_launches(run, each, graph != 0, repeats, seconds);
  });
}

// Bytes read and written per second by copies within the card's memory.
void time_copy(int64_t bytes, int64_t repeats, double* rates) {
  guarded([&] {
    const Buffer<char> from(bytes, "a measurement"), to(bytes, "a measurement");
    cudaEvent_t begin, end;
    cuda::check(cudaEventCreate(&begin), "a measurement");
    cuda::check(cudaEventCreate(&end), "a measurement");
    for (int64_t i = -2; i < repeats; ++i) {
      cuda::check(cudaEventRecord(begin, device->stream()), "a measurement");
      cuda::check(cudaMemcpyAsync(to.get(), from.get(), size_t(bytes), cudaMemcpyDeviceToDevice, device->stream()),
                  "a measurement");
      cuda::check(cudaEventRecord(end, device->stream()), "a measurement");
      device->synchronize();
      float milliseconds = 0;
      cuda::check(cudaEventElapsedTime(&milliseconds, begin, end), "a measurement");
      if (i >= 0) rates[i] = 2.0 * double(bytes) / (double(milliseconds) * 1e-3);
    }
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
  });
}

// -2: this card or library has no kernels of compute capability 9.0; -1: it would use others; or the tiling.
int64_t hopper_tiling(int64_t half, int64_t bits, const int64_t* outs, int64_t count, int64_t rows) {
  return guarded([&]() -> int64_t {
    CHECK(count <= cuda::kGemmMatrices, "a launch takes ", cuda::kGemmMatrices, " matrices, not ", count);
    cuda::GemmParts parts;
    for (int64_t i = 0; i < count; ++i) {
      cuda::Matrix& m = parts.matrix[i];
      m.bits = int(bits), m.out = outs[i], m.out_tiles = (outs[i] + 15) / 16, m.straight = bits == 8;
    }
    Operand x;
    int8_t code = 0;
    x.rows = int(rows), x.codes = half ? nullptr : &code;
    if (!hopper_takes(*device, parts.matrix[0])) return -2;
    const int tiling = cuda::hopper_tiling(*device, parts, x);
    return tiling < 0 ? -1 : cuda::kGemmTilings + tiling;
  });
}

const char* device_name() {
  return guarded([&] { return device->name().c_str(); });
}

}  // extern "C"
