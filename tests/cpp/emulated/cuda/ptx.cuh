// csrc/cuda/ptx.cuh for the emulator: the same functions, what they say there, in C++.
#pragma once
#include <cstdint>

#define HALFTURN_LAUNCHED_MEMORY(type, alignment, name) type* const name = reinterpret_cast<type*>(emulator::memory)

namespace halfturn::cuda {

inline void wait_for_previous() {}
inline void let_next_start() {}
template <int kThreads>
void meet_at(int number) {
  emulator::meet(number, kThreads);
}
inline void hide(int&) {}

inline void start_copy(uint32_t to, const void* from) {
  const emulator::Copy copy = {emulator::memory + to, from};
  emulator::copies().open.push_back(copy);
  if (emulator::late) return;
  if (from) std::memcpy(copy.to, from, 16);
  else std::memset(copy.to, 0, 16);
}
inline void copy_16(uint32_t to, const void* from) { start_copy(to, from); }
inline void copy_16_once(uint32_t to, const void* from) { start_copy(to, from); }
inline void copy_16_once(uint32_t to, const void* from, bool there) { start_copy(to, there ? from : nullptr); }
inline void commit_copies() {
  emulator::Copies& copies = emulator::copies();
  copies.groups.push_back(std::move(copies.open));
  copies.open.clear();
}
template <int kPending>
void wait_for_copies() {
  auto& groups = emulator::copies().groups;
  for (; int(groups.size()) > kPending; groups.pop_front())
    if (emulator::late)
      for (const emulator::Copy& copy : groups.front())
        if (copy.from) std::memcpy(copy.to, copy.from, 16);
        else std::memset(copy.to, 0, 16);
}
inline void prefetch_to_l2(const void*) {}
template <class T>
T load_once(const T* p) {
  return *p;
}

inline uint32_t permute(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t out = __byte_perm(low, high, selector);
  for (int i = 0; i < 4; ++i)
    if (selector >> (4 * i) & 8) out = (out & ~(255u << (8 * i))) | ((out >> (8 * i) & 128 ? 255u : 0u) << (8 * i));
  return out;
}
inline uint32_t choose(uint32_t mask, uint32_t a, uint32_t b) { return (mask & a) | (~mask & b); }
inline uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) { return a * b + c; }
inline int add_bytes(uint32_t word, int sum) {
  for (int i = 0; i < 32; i += 8) sum += int8_t(word >> i);
  return sum;
}
inline float power_of_two(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
}
inline float reciprocal(float x) { return 1.0f / x; }
inline float max_or_nan(float a, float b) { return a != a || a > b ? a : b; }
inline float min_or_nan(float a, float b) { return a != a || a < b ? a : b; }

// sums += the products of rows g and g + 8 of a with columns 2c and 2c + 1 of b, in the order of the words.
template <class Number, class Dot>
void multiply_words(Number (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Dot dot) {
  emulator::Warp& warp = emulator::warp();
  const int lane = emulator::lane(), g = lane / 4, c = lane % 4;
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  std::memcpy(warp.words[lane], mine, sizeof mine);
  emulator::meet_warp();
  for (int i = 0; i < 4; ++i)
    for (int other = 0; other < 4; ++other)
      for (int half = 0; half < 2; ++half)
        sums[i] = dot(sums[i], warp.words[4 * g + other][2 * half + i / 2],
                      warp.words[4 * (2 * c + i % 2) + other][4 + half]);
  emulator::meet_warp();
}
inline void multiply(int (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply_words(sums, a, b0, b1, [](int sum, uint32_t x, uint32_t y) {
    for (int i = 0; i < 32; i += 8) sum += int(int8_t(x >> i)) * int(int8_t(y >> i));
    return sum;
  });
}
inline void count_common(int (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply_words(sums, a, b0, b1, [](int sum, uint32_t x, uint32_t y) { return sum + __popc(x & y); });
}
inline void count_common(int (&sums)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  count_common(sums, {a0, a1, 0, 0}, b, 0);
}
inline void multiply(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply_words(sums, a, b0, b1, [](float sum, uint32_t x, uint32_t y) {
    for (int i = 0; i < 32; i += 16)
      sum += __half2float(__ushort_as_half(uint16_t(x >> i))) * __half2float(__ushort_as_half(uint16_t(y >> i)));
    return sum;
  });
}
inline void multiply_in_place(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply(sums, a, b0, b1);
}

inline uint32_t transpose(uint32_t pair) {
  const int g = emulator::lane() / 4, c = emulator::lane() % 4;
  return emulator::share(pair, [&](auto of) {
    const auto element = [&](int row, int column) { return of(4 * row + column / 2) >> (16 * (column % 2)) & 0xffff; };
    return element(2 * c, g) | element(2 * c + 1, g) << 16;
  });
}
inline uint32_t element_at(uint32_t row, int column) {
  uint16_t half;
  std::memcpy(&half, emulator::memory + row + 2 * column, 2);
  return half;
}
inline void load_matrices(uint32_t (&r)[4], uint32_t address) {
  const int g = emulator::lane() / 4, c = emulator::lane() % 4;
  emulator::share(address, [&](auto of) {
    for (int i = 0; i < 4; ++i) r[i] = element_at(of(8 * i + g), 2 * c) | element_at(of(8 * i + g), 2 * c + 1) << 16;
    return 0;
  });
}
inline void load_transposed(uint32_t (&r)[4], uint32_t address) {
  const int g = emulator::lane() / 4, c = emulator::lane() % 4;
  emulator::share(address, [&](auto of) {
    for (int i = 0; i < 4; ++i) r[i] = element_at(of(8 * i + 2 * c), g) | element_at(of(8 * i + 2 * c + 1), g) << 16;
    return 0;
  });
}

}  // namespace halfturn::cuda
