// The CUDA device: one card, its stream and limits, and the memory on it. Includes nothing of CUDA's, so that host code
// can be compiled without its headers.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

struct CUstream_st;

namespace halfturn {

namespace cuda {
class Arena;
struct Matrix;
struct Vector;
}  // namespace cuda

class Cuda {
 public:
  using Arena = cuda::Arena;
  using Matrix = cuda::Matrix;
  using Vector = cuda::Vector;

  // Throws Error where there is no such card, or it is older than Ampere (compute capability 8.0).
  explicit Cuda(int ordinal = 0);
  ~Cuda();
  Cuda(const Cuda&) = delete;

  CUstream_st* stream() const { return stream_; }
  int ordinal() const { return ordinal_; }
  int multiprocessors() const { return multiprocessors_; }
  int capability() const { return capability_; }        // 89 for 8.9
  int shared_memory() const { return shared_memory_; }  // bytes that a block can have
  // What the memory delivers to each multiprocessor at best.
  double bytes_per_clock() const { return bytes_per_clock_; }
  const std::string& name() const { return name_; }
  std::pair<int64_t, int64_t> memory() const;  // bytes: free now, in all

  void synchronize();  // waits for the stream; throws Error with what a kernel did wrong

 private:
  int ordinal_, multiprocessors_ = 0, capability_ = 0, shared_memory_ = 0;
  double bytes_per_clock_ = 0;
  std::string name_;
  CUstream_st* stream_ = nullptr;
};

namespace cuda {

// Memory on the card that is current. Throws Error with the bytes and what they were for.
void* allocate(int64_t bytes, const char* what);
void release(void* memory) noexcept;
// Memory of the host that the card copies from and to while both go on.
void* allocate_pinned(int64_t bytes);
void release_pinned(void* memory) noexcept;

template <class T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(int64_t count, const char* what)
      : data_(static_cast<T*>(allocate(count * int64_t(sizeof(T)), what))), count_(count) {}
  Buffer(Buffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), count_(std::exchange(other.count_, 0)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(count_, other.count_);
    return *this;
  }
  ~Buffer() { release(data_); }
  T* get() const { return data_; }
  int64_t count() const { return count_; }
  int64_t bytes() const { return count_ * int64_t(sizeof(T)); }

 private:
  T* data_ = nullptr;
  int64_t count_ = 0;
};

template <class T>
class Pinned {
 public:
  explicit Pinned(int64_t count) : data_(static_cast<T*>(allocate_pinned(count * int64_t(sizeof(T))))) {}
  Pinned(const Pinned&) = delete;
  ~Pinned() { release_pinned(data_); }
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
};

// A quantized matrix as the file has it, on the card.
struct Matrix {
  int bits = 0;
  int64_t in = 0, out = 0;              // true sizes
  int64_t in_tiles = 0, out_tiles = 0;  // of 16
  int64_t groups = 1;                   // along the input, each in_tiles / groups tiles
  int64_t r4_block = 1;
  const uint32_t* codes = nullptr;   // [in_tiles, out_tiles, 8 * bits]
  const uint16_t* scales = nullptr;  // half [groups, 16 * out_tiles]
  const int8_t* levels = nullptr;    // [2^bits], behind it zeros up to 256; 16-byte aligned
  bool straight = false;             // 8 bits: the levels are min(code, 254) - 127
  bool usual = false;                // levels as the converter writes them: straight, or at 4 and 5 bits split at zero
  bool mirrored = false;             // the last level is the first one's negative, and so on
  const float* bias = nullptr;       // [out], or null
  // Sets what is known of the levels from themselves, [2^bits] on the host.
  void look_at_levels(const int8_t* table);
  int64_t bytes() const { return in_tiles * out_tiles * 32 * bits + groups * out_tiles * 32; }
};

struct Vector {
  const uint16_t* data = nullptr;  // half, zeros behind it up to a whole tile
};

// The memory of all weights.
class Arena {
 public:
  Buffer<uint8_t> memory;
};

}  // namespace cuda
}  // namespace halfturn
