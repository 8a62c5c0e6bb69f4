#include "cuda.h"

#include <cuda_runtime_api.h>

#include <algorithm>

#include "../check.h"
#include "status.h"

namespace halfturn {

Cuda::Cuda(int ordinal) : ordinal_(ordinal) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  CHECK(status == cudaSuccess && count > 0, "there is no CUDA card that can be used (", cudaGetErrorString(status),
        "): use device=\"cpu\"");
  CHECK(ordinal >= 0 && ordinal < count, "there is no card ", ordinal, ", this machine has ", count);
  cuda::check(cudaSetDevice(ordinal), "choosing the card");
  cudaDeviceProp properties;
  cuda::check(cudaGetDeviceProperties(&properties, ordinal), "asking the card what it can do");
  name_ = properties.name;
  shared_memory_ = int(properties.sharedMemPerBlockOptin);
  capability_ = 10 * properties.major + properties.minor;
  CHECK(capability_ >= 80, "the card ", name_, " has compute capability ", properties.major, ".", properties.minor,
        ", Halfturn needs 8.0 (RTX 30, A100) or newer: use device=\"cpu\"");
  multiprocessors_ = properties.multiProcessorCount;
  const auto ask = [&](cudaDeviceAttr what) {
    int value = 0;
    cuda::check(cudaDeviceGetAttribute(&value, what, ordinal), "asking the card what it can do");
    return double(value);
  };
  // Both edges of the memory's clock carry data. A driver that does not tell the clocks leaves little.
  const double memory_rate = 2 * ask(cudaDevAttrMemoryClockRate) * ask(cudaDevAttrGlobalMemoryBusWidth) / 8;
  const double clock = ask(cudaDevAttrClockRate);
  bytes_per_clock_ = memory_rate > 0 && clock > 0 ? memory_rate / clock / multiprocessors_ : 1;
  cuda::check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "making a stream");
}

Cuda::~Cuda() { cudaStreamDestroy(stream_); }

std::pair<int64_t, int64_t> Cuda::memory() const {
  size_t free = 0, all = 0;
  cuda::check(cudaMemGetInfo(&free, &all), "asking for free memory");
  return {int64_t(free), int64_t(all)};
}

void Cuda::synchronize() { cuda::check(cudaStreamSynchronize(stream_), "a step"); }

namespace cuda {

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  CHECK(status != cudaErrorMemoryAllocation, "out of memory on the card, for ", what,
        ": use a smaller context, fewer requests at once or fewer bits in the KV cache");
  CHECK(false, "CUDA failed in ", what, ": ", cudaGetErrorString(status));
}

void Matrix::look_at_levels(const int8_t* table) {
  const int count = 1 << bits, half = count / 2;
  straight = bits == 8;
  for (int i = 0; i < count && straight; ++i) straight = table[i] == std::min(i, 254) - 127;
  const bool splits = std::all_of(table, table + half, [](int level) { return level <= 0 && level >= -127; }) &&
                      std::all_of(table + half, table + count, [](int level) { return level >= 0; });
  mirrored = true;
  for (int i = 0; i < half; ++i) mirrored = mirrored && table[i] == -table[count - 1 - i];
  usual = bits == 8 ? straight : bits == 4 || bits == 5 ? splits : true;
}

void* allocate(int64_t bytes, const char* what) {
  void* memory = nullptr;
  const cudaError_t status = cudaMalloc(&memory, size_t(bytes ? bytes : 16));
  if (status == cudaErrorMemoryAllocation) {
    size_t free = 0, all = 0;
    cudaGetLastError();
    cudaMemGetInfo(&free, &all);
    CHECK(false, what, " needs ", bytes, " bytes on the card, which has ", free, " of ", all,
          " free: use a smaller context or model, or close what else runs there");
  }
  check(status, what);
  return memory;
}

void release(void* memory) noexcept {
  if (memory) cudaFree(memory);
}

void* allocate_pinned(int64_t bytes) {
  void* memory = nullptr;
  check(cudaHostAlloc(&memory, size_t(bytes), cudaHostAllocDefault), "memory that the card can read");
  return memory;
}

void release_pinned(void* memory) noexcept {
  if (memory) cudaFreeHost(memory);
}

}  // namespace cuda
}  // namespace halfturn
