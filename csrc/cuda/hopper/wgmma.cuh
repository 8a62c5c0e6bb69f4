// The instructions of compute capability 9.0 by which a warpgroup (four warps) multiplies: D [64 outputs x N rows] +=
// A [64 x K] * B [K x N], A from registers and B from shared memory. They run on their own, as copies do.
//
// In registers each warp has 16 outputs of A and D, in the fragments of mma.m16n8k32 and mma.m16n8k16 (decode.cuh). In
// shared memory a row of B is 64 or 128 bytes (one step), and its pieces of 16 bytes change places by a pattern which
// the tensor cores undo, so that the same piece of eight rows lies in all banks.
#pragma once
#include <cstdint>

namespace halfturn::cuda {

// Before the first product and whenever registers of A or D were written.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ inline void wgmma_wait() {  // for all but the last kPending groups
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// What this thread wrote to shared memory, and then others by way of a barrier, products may read.
__device__ inline void fence_for_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Piece q of a row, as bytes from the row's start. Rows begin at a multiple of 8 * kRowBytes.
template <int kRowBytes>
__device__ constexpr int swizzled(int row, int q) {
  static_assert(kRowBytes == 64 || kRowBytes == 128);
  return 16 * (kRowBytes == 64 ? q ^ ((row >> 1) & 3) : q ^ (row & 7));
}

// Describes B from `address` on, 16 bytes of K after another. The next 32 bytes of K are 2 on.
template <int kRowBytes>
__device__ inline uint64_t describe(uint32_t address) {
  constexpr uint64_t kSwizzle = kRowBytes == 64 ? 2 : 1;  // bits 62-63: a pattern of 64 or of 128 bytes
  return uint64_t((address & 0x3ffff) >> 4) | uint64_t(1) << 16 | uint64_t(8 * kRowBytes / 16) << 32 | kSwizzle << 62;
}

#define HALFTURN_D64                                                                                     \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, " \
  "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, " \
  "%62, %63"

#define HALFTURN_D128                                                                                    \
  HALFTURN_D64                                                                                           \
  ", "                                                                                                   \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, " \
  "%84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, "   \
  "%103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, "     \
  "%119, %120, %121, %122, %123, %124, %125, %126, %127"

#define HALFTURN_R4(c, i) c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3])
#define HALFTURN_R16(c, i) HALFTURN_R4(c, i), HALFTURN_R4(c, i + 4), HALFTURN_R4(c, i + 8), HALFTURN_R4(c, i + 12)
#define HALFTURN_R64(c, i) HALFTURN_R16(c, i), HALFTURN_R16(c, i + 16), HALFTURN_R16(c, i + 32), HALFTURN_R16(c, i + 48)
#define HALFTURN_A "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(1)

// d += A * B of 32 inputs, int8.
__device__ inline void wgmma(int (&d)[64], const uint32_t* a, uint64_t b) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {" HALFTURN_D64 "}, {%64, %65, %66, %67}, %68, p; }"
      : HALFTURN_R64("+r", 0)
      : HALFTURN_A);
}
__device__ inline void wgmma(int (&d)[128], const uint32_t* a, uint64_t b) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %133, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8 {" HALFTURN_D128 "}, {%128, %129, %130, %131}, %132, p; }"
      : HALFTURN_R64("+r", 0), HALFTURN_R64("+r", 64)
      : HALFTURN_A);
}

// Of 16 inputs, half with float32 sums.
__device__ inline void wgmma(float (&d)[64], const uint32_t* a, uint64_t b) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" HALFTURN_D64 "}, {%64, %65, %66, %67}, %68, p, 1, 1, 0; }"
      : HALFTURN_R64("+f", 0)
      : HALFTURN_A);
}
__device__ inline void wgmma(float (&d)[128], const uint32_t* a, uint64_t b) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %133, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 {" HALFTURN_D128
      "}, {%128, %129, %130, %131}, %132, p, 1, 1, 0; }"
      : HALFTURN_R64("+f", 0), HALFTURN_R64("+f", 64)
      : HALFTURN_A);
}

#undef HALFTURN_A
#undef HALFTURN_R64
#undef HALFTURN_R16
#undef HALFTURN_R4
#undef HALFTURN_D128
#undef HALFTURN_D64

// After wgmma_wait: keeps reads of d behind it.
template <int kCount>
__device__ inline void settled(int (&d)[kCount]) {
#pragma unroll
  for (int& v : d) asm volatile("" : "+r"(v)::"memory");
}
template <int kCount>
__device__ inline void settled(float (&d)[kCount]) {
#pragma unroll
  for (float& v : d) asm volatile("" : "+f"(v)::"memory");
}

}  // namespace halfturn::cuda
