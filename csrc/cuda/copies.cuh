// Asynchronous copies from global to shared memory, in pieces of 16 bytes and groups that a thread waits for.
#pragma once
#include <cstdint>

namespace halfturn::cuda {

__device__ inline void copy_16(uint32_t to, const void* from) {  // to: an address in shared memory
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ inline void copy_16(void* to, const void* from) { copy_16(uint32_t(__cvta_generic_to_shared(to)), from); }

// Zeros where not `there`.
__device__ inline void copy_16_or_zeros(uint32_t to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}

// The same as copy_16() of what a step reads once: it is the first to leave the L2 cache, so that what is small and
// read again, by other blocks or in the next layer (rows, scales, norm weights, instructions), stays there. `to` must
// be a thread's own register: ptxas 13.0 adds a part that all lanes share in the instruction itself, in a form that is
// none with a policy (scripts/check_cuda_code.py looks for those).
__device__ inline void copy_16_once(uint32_t to, const void* from) {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "l"(policy)
               : "memory");
}

// Spread over `count` threads, of which this is `thread`.
__device__ inline void start_copy(uint8_t* to, const uint8_t* from, int bytes, int thread, int count) {
  const uint32_t shared = uint32_t(__cvta_generic_to_shared(to));
  for (int i = thread * 16; i < bytes; i += count * 16) copy_16(shared + uint32_t(i), from + i);
}

// The 128 bytes around an address, into the cache that all multiprocessors share.
__device__ inline void prefetch_to_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ inline void wait_for_copies() {  // of all but the last kPending groups
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace halfturn::cuda
