// Every instruction that the kernels outside hopper/ spell out in PTX. tests/cpp/emulated/cuda/ptx.cuh has the same
// functions in C++, with which the kernels run on a CPU.
#pragma once
#include <cuda_fp16.h>

#include <cstdint>

// The shared memory that a launch asks for, as an array.
#define HALFTURN_LAUNCHED_MEMORY(type, alignment, name) \
  extern __shared__ __align__(alignment)                \
  type name[]

namespace halfturn::cuda {

// ---- Launches that overlap (launch.cuh) ----

__device__ inline void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ inline void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Some warps of a block meet: kThreads of them at barrier `number`, from 1 on.
template <int kThreads>
__device__ inline void meet_at(int number) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "n"(kThreads) : "memory");
}

// What a number is can't be seen from here on.
__device__ inline void hide(int& number) { asm volatile("" : "+r"(number)); }

// ---- Asynchronous copies (copies.cuh) ----

__device__ inline void copy_16(uint32_t to, const void* from) {  // to: an address in shared memory
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

// The same as copy_16() of what a step reads once, and all of: it comes from memory in whole lines of 128 bytes, and is
// the first to leave the L2 cache, so that what is small and read again, by other blocks or in the next layer (rows,
// scales, norm weights, instructions), stays there. `to` must be a thread's own register: ptxas 13.0 adds a part that
// all lanes share in the instruction itself, in a form that is none with a policy (scripts/check_cuda_code.py looks for
// those).
__device__ inline uint64_t evict_first() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ inline void copy_16_once(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "l"(evict_first())
               : "memory");
}
// Zeros where not `there`.
__device__ inline void copy_16_once(uint32_t to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(to), "l"(from),
               "r"(there ? 16 : 0), "l"(evict_first())
               : "memory");
}

__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ inline void wait_for_copies() {  // of all but the last kPending groups
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// The 128 bytes around an address, into the cache that all multiprocessors share.
__device__ inline void prefetch_to_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Weights are read once: they should not push anything else out of the first cache.
__device__ inline uint32_t load_once(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}
__device__ inline uint2 load_once(const uint2* p) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}
__device__ inline uint4 load_once(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// ---- Numbers ----

// Bytes of (low, high) picked by the four low nibbles of `selector`, each 0..7; with a nibble's highest bit set, the
// sign of that byte.
__device__ inline uint32_t permute(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t out;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(low), "r"(high), "r"(selector));
  return out;
}

// The bits of a where mask is 1, of b where it is 0: one instruction, of which the compiler makes two.
__device__ inline uint32_t choose(uint32_t mask, uint32_t a, uint32_t b) {
  uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, 0xe4;" : "=r"(out) : "r"(a), "r"(b), "r"(mask));
  return out;
}

__device__ inline uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t out;
  asm("mad.lo.u32 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
  return out;
}

// sum + the four signed bytes of a word.
__device__ inline int add_bytes(uint32_t word, int sum) { return __dp4a(int(word), 0x01010101, sum); }

// 2^x, relative error under 2^-22; results below 2^-126 are 0.
__device__ inline float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x to one unit in the last place.
__device__ inline float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The larger and the smaller number; NaN if one of them is, where fmaxf() and fminf() take the other.
__device__ inline float max_or_nan(float a, float b) {
  float c;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}
__device__ inline float min_or_nan(float a, float b) {
  float c;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}

// ---- Products of a warp: lane (g, c) = (lane / 4, lane % 4) ----

// sums [16, 8] += a [16, 32] * b [32, 8], int8. Words of a: rows g and g + 8 of the columns 4c .. 4c + 3, then both 16
// columns on; of b, rows 4c .. and 16 on of column g. Sums: (g, 2c), (g, 2c + 1), (g + 8, 2c), (g + 8, 2c + 1).
__device__ inline void multiply(int (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// sums [16, 8] += how many bits are 1 in both a row of a [16, 128] and a column of b [128, 8]. Words of a: rows g and
// g + 8 of the columns 32c .. 32c + 31; of b, those rows of column g. Sums as above. Of a [16, 256] and b [256, 8],
// each word is followed by that 128 on.
__device__ inline void count_common(int (&sums)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  asm volatile(
      "mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%0, %1, %2, %3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(a0), "r"(a1), "r"(b));
}
__device__ inline void count_common(int (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// sums [16, 8] += a [16, 16] * b [16, 8], halves, with float32 sums: two halves a word, 2c and 8 on.
__device__ inline void multiply(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same, which the compiler leaves in its place among others: the order that they are written in was measured.
__device__ inline void multiply_in_place(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// An 8 x 8 matrix of halves, of which each lane has two neighbours, to its transpose.
__device__ inline uint32_t transpose(uint32_t pair) {
  uint32_t out;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(pair));
  return out;
}

// Four matrices of 8 x 8 halves; `address` is one lane's row of them.
__device__ inline void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ inline void load_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

}  // namespace halfturn::cuda
