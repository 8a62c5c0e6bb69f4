// Runs CUDA kernels on a CPU, thread by thread: included ahead of every source (nvcc -x c++ -include emulator.h), with
// this folder ahead of csrc/, so that its cuda/ptx.cuh takes the place of that one.
//
// The threads of a block are fibers. One runs until it has to wait for others: in a barrier, or in anything that a warp
// does together (shuffles, products). Blocks run one after the other. Asynchronous copies arrive at once, or when they
// are waited for and not before (emulator::late), so that a kernel that reads too early or writes too early is found.
#pragma once
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <vector>

#undef __device__
#undef __host__
#undef __global__
#undef __shared__
#undef __forceinline__
#undef __noinline__
#undef __launch_bounds__
#undef __grid_constant__
#undef __align__
#define __device__
#define __host__
#define __global__
#define __shared__ static
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))

extern dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the fiber that runs

namespace emulator {

struct Barrier {
  int arrived = 0;
  std::vector<int> waiting;  // fibers
};
struct Warp {
  Barrier barrier;
  uint32_t words[32][6];  // what the lanes give each other
};
struct Copy {
  uint8_t* to;
  const void* from;  // null: zeros
};
struct Copies {  // of a thread
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> open;
};

extern uint8_t* memory;  // shared memory that the launch asked for
extern bool late;

Warp& warp();
Copies& copies();
void meet(int number, int threads);  // barrier 0 is the block's
void meet_warp();
void run_blocks(dim3 grid, int threads, size_t memory_bytes, const std::function<void()>& kernel);

inline int lane() { return int(threadIdx.x) & 31; }

// Every lane gives a value and sees those of all.
template <class T, class See>
auto share(T value, See see) {
  static_assert(sizeof(T) <= sizeof warp().words[0]);
  std::memcpy(warp().words[lane()], &value, sizeof value);
  meet_warp();
  const auto result = see([](int lane) {
    T theirs;
    std::memcpy(&theirs, warp().words[lane], sizeof theirs);
    return theirs;
  });
  meet_warp();
  return result;
}
template <class T>
T from_lane(T value, int lane) {
  return share(value, [&](auto of) { return of(lane & 31); });
}
template <class Ask>
unsigned lanes(Ask ask) {
  unsigned mask = 0;
  for (int i = 0; i < 32; ++i) mask |= unsigned(ask(i)) << i;
  return mask;
}

template <class... Parameters, class... Arguments>
cudaError_t launch(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), const Arguments&... arguments) {
  run_blocks(config->gridDim, int(config->blockDim.x), config->dynamicSmemBytes, [&] { kernel(arguments...); });
  return cudaSuccess;
}

}  // namespace emulator

#define cudaLaunchKernelEx emulator::launch
#define cudaFuncSetAttribute(...) cudaSuccess

inline void __syncthreads() { emulator::meet(0, int(blockDim.x)); }
inline void __syncwarp() { emulator::meet_warp(); }
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulator::from_lane(value, lane);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int other) {
  return emulator::from_lane(value, emulator::lane() ^ other);
}
template <class T>
T __shfl_up_sync(unsigned, T value, int by) {
  return emulator::from_lane(value, emulator::lane() < by ? emulator::lane() : emulator::lane() - by);
}
template <class T>
T __shfl_down_sync(unsigned, T value, int by) {
  return emulator::from_lane(value, emulator::lane() + by > 31 ? emulator::lane() : emulator::lane() + by);
}
inline unsigned __ballot_sync(unsigned, bool yes) {
  return emulator::share(yes, [](auto of) { return emulator::lanes(of); });
}
inline bool __any_sync(unsigned mask, bool yes) { return __ballot_sync(mask, yes) != 0; }
inline unsigned __match_any_sync(unsigned, unsigned value) {
  return emulator::share(value, [&](auto of) { return emulator::lanes([&](int i) { return of(i) == value; }); });
}
template <class T>
T atomicAdd(T* at, T value) {  // one fiber runs at a time
  const T before = *at;
  *at += value;
  return before;
}
inline int __reduce_add_sync(unsigned, int value) {
  for (int other = 16; other; other /= 2) value += __shfl_xor_sync(~0u, value, other);
  return value;
}
inline unsigned __reduce_max_sync(unsigned, unsigned value) {
  for (int other = 16; other; other /= 2) value = std::max(value, __shfl_xor_sync(~0u, value, other));
  return value;
}

template <class To, class From>
To emulated_bits(From from) {
  To to;
  static_assert(sizeof to == sizeof from);
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline float __uint_as_float(unsigned v) { return emulated_bits<float>(v); }
inline float __int_as_float(int v) { return emulated_bits<float>(v); }
inline unsigned __float_as_uint(float v) { return emulated_bits<unsigned>(v); }
inline int __float_as_int(float v) { return emulated_bits<int>(v); }

// Compiled without contraction, so that these are what they say.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __int2float_rn(int v) { return float(v); }
inline unsigned long long __float2ull_rz(float v) { return static_cast<unsigned long long>(v); }
inline unsigned long long __double2ull_rz(double v) { return static_cast<unsigned long long>(v); }
inline unsigned long long __double2ull_ru(double v) { return static_cast<unsigned long long>(std::ceil(v)); }
inline unsigned __funnelshift_l(unsigned low, unsigned high, int by) {
  return unsigned(((static_cast<unsigned long long>(high) << 32 | low) << (by & 31)) >> 32);
}
inline int __popc(unsigned v) { return std::popcount(v); }
inline int __ffs(int v) { return v ? std::countr_zero(unsigned(v)) + 1 : 0; }
inline float __expf(float v) { return std::exp(v); }
inline float rsqrtf(float v) { return 1.0f / std::sqrt(v); }
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned at = selector >> (4 * i) & 7;
    out |= ((at < 4 ? low : high) >> (at % 4 * 8) & 255) << (8 * i);
  }
  return out;
}
inline unsigned __vneg4(unsigned v) {
  unsigned out = 0;
  for (int i = 0; i < 32; i += 8) out |= (-(v >> i) & 255) << i;
  return out;
}
inline size_t __cvta_generic_to_shared(const void* p) {
  return size_t(static_cast<const uint8_t*>(p) - emulator::memory);
}

using std::isfinite;
using std::isnan;
using std::max;
using std::min;
