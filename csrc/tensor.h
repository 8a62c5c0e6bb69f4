// View: dtype, shape and pointer of memory that somebody else owns.
#pragma once
#include <cstdint>
#include <vector>

namespace halfturn {

enum class DType : uint8_t { kF16, kF32, kI8, kU32 };

constexpr int64_t size_of(DType type) {
  switch (type) {
    case DType::kF16: return 2;
    case DType::kF32: return 4;
    case DType::kI8: return 1;
    case DType::kU32: return 4;
  }
  return 0;
}

struct View {
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;
  const void* data = nullptr;

  explicit operator bool() const { return data != nullptr; }
  int64_t elements() const {
    int64_t n = 1;
    for (int64_t d : shape) n *= d;
    return n;
  }
  int64_t bytes() const { return elements() * size_of(dtype); }
  template <class T>
  const T* as() const {
    return static_cast<const T*>(data);
  }
};

}  // namespace halfturn
