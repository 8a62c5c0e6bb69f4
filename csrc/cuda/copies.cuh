// Asynchronous copies from global to shared memory, in pieces of 16 bytes and groups that a thread waits for.
#pragma once
#include <cstdint>

#include "cuda/ptx.cuh"

namespace halfturn::cuda {

__device__ inline void copy_16(void* to, const void* from) { copy_16(uint32_t(__cvta_generic_to_shared(to)), from); }

// Spread over `count` threads, of which this is `thread`.
__device__ inline void start_copy(uint8_t* to, const uint8_t* from, int bytes, int thread, int count) {
  const uint32_t shared = uint32_t(__cvta_generic_to_shared(to));
  for (int i = thread * 16; i < bytes; i += count * 16) copy_16(shared + uint32_t(i), from + i);
}

}  // namespace halfturn::cuda
