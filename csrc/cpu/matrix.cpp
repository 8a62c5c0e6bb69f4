#include "matrix.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "../check.h"
#include "../codec/grid.h"
#include "../codec/half.h"
#include "cpu.h"

namespace halfturn::cpu {

void* allocate(size_t bytes) {
  size_t rounded = (bytes + 63) / 64 * 64;
  void* p = std::aligned_alloc(64, rounded ? rounded : 64);
  CHECK(p, "out of memory: ", bytes, " bytes more were needed; use a smaller context or model");
  return p;
}

Arena::Arena(int64_t bytes) : size_(bytes) {
  constexpr int64_t kHuge = 2 << 20;
  mapped_ = bytes + kHuge;
  void* p = mmap(nullptr, size_t(mapped_), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  CHECK(p != MAP_FAILED, "out of memory: the weights need ", bytes, " bytes; use a smaller model");
  data_ = static_cast<uint8_t*>(p);
  used_ = int64_t(round_up(int64_t(reinterpret_cast<uintptr_t>(p)), kHuge) - int64_t(reinterpret_cast<uintptr_t>(p)));
  size_ += used_;
#if defined(MADV_HUGEPAGE)
  madvise(data_ + used_, size_t(bytes), MADV_HUGEPAGE);
#endif
}

Arena::~Arena() { munmap(data_, size_t(mapped_)); }

uint8_t* Arena::take(int64_t bytes) {
  const int64_t rounded = round_up(bytes, 64);
  CHECK(used_ + rounded <= size_, "the arena has ", size_ - used_, " bytes left, ", rounded, " were asked for");
  uint8_t* p = data_ + used_;
  used_ += rounded;
  return p;
}

int64_t Matrix::bytes() const {
  return n_tiles * k_tiles * tile_bytes + groups * n_tiles * kTile * int64_t(sizeof(float));
}

int64_t matmul_scratch(const Matrix& matrix) { return matrix.k_tiles * 16 * 16 * 4 * int64_t(sizeof(float)); }

namespace {

int stored_planes(int bits) { return bits >= 7 ? 8 : bits; }

// The codes of one tile of the file, in its order t = 0..255 (FORMAT.md, Tiles).
void read_codes(const uint32_t* words, int bits, uint8_t* codes) {
  std::memset(codes, 0, 256);
  for (int shift = 0; shift < bits;) {
    const int plane = grid::plane_width(bits, shift);
    const auto* bytes = reinterpret_cast<const uint8_t*>(words);
    const int per_byte = 8 / plane, mask = (1 << plane) - 1;
    for (int i = 0; i < 32 * plane; ++i)
      for (int f = 0; f < per_byte; ++f)
        codes[i * per_byte + f] |= uint8_t(((bytes[i] >> (f * plane)) & mask) << shift);
    words += 8 * plane;
    shift += plane;
  }
}

// From the file's order within a tile to four vectors of 64: inputs come in pairs in both, so pairs are moved.
void order_for_cpu(const uint8_t* codes, uint8_t* vectors) {
  for (int q = 0; q < 8; ++q)
    for (int c = 0; c < 4; ++c)
      for (int h = 0; h < 2; ++h)
        for (int kh = 0; kh < 2; ++kh) {
          int from = 8 * (4 * q + c) + 4 * h + 2 * kh;
          int to = 64 * (2 * kh + c / 2) + 4 * (q + 8 * h) + 2 * (c & 1);
          std::memcpy(vectors + to, codes + from, 2);
        }
}

void write_planes(const uint8_t* v, int planes, uint8_t* out) {
  int shift = 0;
  if (planes >= 4) {
    for (int half = 0; half < 2; ++half)
      for (int p = 0; p < 64; ++p)
        out[64 * half + p] = uint8_t((v[128 * half + p] & 15) | ((v[128 * half + 64 + p] & 15) << 4));
    out += 128;
    shift = 4;
    planes -= 4;
  }
  if (planes >= 2) {
    for (int p = 0; p < 64; ++p) {
      int byte = 0;
      for (int g = 0; g < 4; ++g) byte |= ((v[64 * g + p] >> shift) & 3) << (2 * g);
      out[p] = uint8_t(byte);
    }
    out += 64;
    shift += 2;
    planes -= 2;
  }
  if (planes == 1) {
    for (int i = 0; i < 32; ++i) {
      uint64_t eight;
      std::memcpy(&eight, v + 8 * i, 8);
      eight = (eight >> shift) & 0x0101010101010101ull;
      out[i] = uint8_t((eight * 0x0102040810204080ull) >> 56);  // gathers the low bit of each byte
    }
  }
}

}  // namespace

int64_t packed_bytes(const Linear& linear) {
  return round_up(linear.in_padded / kTile * (linear.out_padded / kTile) * 32 * stored_planes(linear.bits), 64);
}

Matrix pack(Cpu& cpu, const Linear& linear, int offset, Arena& arena) {
  Matrix m;
  m.in = linear.in;
  m.out = linear.out;
  m.k_tiles = linear.in_padded / kTile;
  m.n_tiles = linear.out_padded / kTile;
  m.bits = linear.bits;
  m.planes = stored_planes(linear.bits);
  m.tile_bytes = 32 * m.planes;
  m.groups = linear.groups;
  m.group_tiles = m.k_tiles / m.groups;
  m.r4_block = linear.r4_block;

  const auto* levels = linear.levels.as<int8_t>();
  uint8_t all[256];
  for (int i = 0; i < 256; ++i) all[i] = uint8_t(levels[i & ((1 << linear.bits) - 1)] + offset);
  std::memcpy(m.table, all, sizeof(m.table));

  m.data = arena.take(packed_bytes(linear));
  const auto* words = linear.codes.as<uint32_t>();
  constexpr int64_t kStrip = 8;  // output tiles a task: neighbours in the file
  cpu.parallel((m.n_tiles + kStrip - 1) / kStrip, [&](int64_t strip, int) {
    int64_t end = std::min(m.n_tiles, (strip + 1) * kStrip);
    alignas(64) uint8_t codes[256], vectors[256];
    for (int64_t k = 0; k < m.k_tiles; ++k)
      for (int64_t n = strip * kStrip; n < end; ++n) {
        read_codes(words + (k * m.n_tiles + n) * 8 * linear.bits, linear.bits, codes);
        order_for_cpu(codes, vectors);
        uint8_t* out = m.data + (n * m.k_tiles + k) * m.tile_bytes;
        if (m.planes == 8)
          for (int i = 0; i < 256; ++i) out[i] = all[vectors[i]];
        else write_planes(vectors, m.planes, out);
      }
  });

  const int64_t padded = m.n_tiles * kTile;
  m.scales = buffer<float>(m.groups * padded);
  const auto* scales = linear.scales.as<uint16_t>();
  for (int64_t i = 0; i < m.groups * padded; ++i) m.scales[i] = half_to_float(scales[i]);
  if (linear.bias) {
    m.bias = buffer<float>(padded);
    std::memset(m.bias.get(), 0, size_t(padded) * sizeof(float));
    std::memcpy(m.bias.get(), linear.bias.data, size_t(linear.out) * sizeof(float));
  }
  return m;
}

}  // namespace halfturn::cpu
