// A quantized matrix in the order in which the CPU kernels read it, and what they read and write beside it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "../model.h"

namespace halfturn {
class Cpu;
}

namespace halfturn::cpu {

struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <class T>
using Buffer = std::unique_ptr<T[], Free>;

// Memory aligned to a cache line; untouched pages cost nothing. Throws Error with the bytes.
void* allocate(size_t bytes);
template <class T>
Buffer<T> buffer(int64_t count) {
  return Buffer<T>(static_cast<T*>(allocate(size_t(count) * sizeof(T))));
}

// One block of memory for all weights of a model, on huge pages where the system has them: streams of weights cross few
// page borders.
class Arena {
 public:
  explicit Arena(int64_t bytes);  // throws Error with the bytes where they can't be had
  ~Arena();
  Arena(const Arena&) = delete;
  uint8_t* take(int64_t bytes);  // aligned to a cache line; throws Error when the block is used up

 private:
  uint8_t* data_ = nullptr;
  int64_t mapped_ = 0, used_ = 0, size_ = 0;
};

// A vector of floats, e.g. the scale of a norm.
struct Vector {
  Buffer<float> data;
};

// Tiles of 16 outputs x 16 inputs, all the input tiles of one output tile in a row. A tile is four vectors of 64
// weights, vector g holding the inputs 4g..4g+3: byte 4*output + input. Their codes are stored as planes, low bits
// first:
//   4-bit plane, 128 bytes: byte p of half h holds vector 2h in its low and vector 2h+1 in its high nibble
//   2-bit plane,  64 bytes: byte p holds vector g in the bits 2g, 2g+1
//   1-bit plane,  32 bytes: bit p of the 64-bit word g belongs to vector g
// so 2 = [2], 3 = [2,1], 4 = [4], 5 = [4,1], 6 = [4,2]. Widths 7 and 8 are stored as levels, 256 bytes.
struct Matrix {
  int64_t in = 0, out = 0;
  int64_t k_tiles = 0, n_tiles = 0;
  int bits = 0;            // as in the file
  int planes = 0;          // as stored here: 2..6, or 8 for levels
  int64_t tile_bytes = 0;  // of one tile here
  int64_t groups = 1, group_tiles = 0;
  int64_t r4_block = 1;
  alignas(64) uint8_t table[64] = {};  // level + offset of each code, repeated to fill the table
  uint8_t* data = nullptr;             // [n_tiles, k_tiles, tile_bytes], in the model's arena
  Buffer<float> scales;                // [groups, 16*n_tiles]
  Buffer<float> bias;                  // [16*n_tiles], or null

  const uint8_t* tile(int64_t n) const { return data + n * k_tiles * tile_bytes; }
  int64_t bytes() const;
};

// Bytes of the arena that pack takes.
int64_t packed_bytes(const Linear& linear);

// Copies `linear` into that order, on all threads. `offset` is added to the levels: 128 where the instruction set
// multiplies unsigned weights, else 0.
Matrix pack(Cpu& cpu, const Linear& linear, int offset, Arena& arena);

// Rows that enter a product. A row has 16*k_tiles elements, zeros behind the true ones.
struct Activations {
  int64_t rows = 0;
  int64_t stride = 0;             // elements from row to row
  const int8_t* codes = nullptr;  // [rows, stride]
  const float* scales = nullptr;  // [rows]
  const int32_t* sums = nullptr;  // [rows, sums_stride]: sum of the codes before input tile t
  int64_t sums_stride = 0;
  const float* values = nullptr;  // [rows, stride], f16 mode: representable in half precision
};

struct Output {
  float* data = nullptr;
  int64_t stride = 0;  // floats from row to row
  bool add = false;    // add to what is there
};

// Bytes of a thread's scratch that the products with this matrix need.
int64_t matmul_scratch(const Matrix& matrix);

}  // namespace halfturn::cpu
