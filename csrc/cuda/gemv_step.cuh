// What a lane of the GEMV's warps takes of one step: activations, and codes from a warp's ring.
#pragma once
#include "decode.cuh"

namespace halfturn::cuda {

// One lane's activations of one step and eight rows: words i of its tile, in half two words each.
template <bool kInt8>
struct Inputs {
  uint32_t w[kInt8 ? 4 : 8];
  __device__ void load(const uint4* p) {
    const uint4 a = p[0];
    w[0] = a.x, w[1] = a.y, w[2] = a.z, w[3] = a.w;
    if constexpr (!kInt8) {
      const uint4 b = p[1];
      w[4] = b.x, w[5] = b.y, w[6] = b.z, w[7] = b.w;
    }
  }
  // To the order of Table::decode_parted(): the even elements of two runs, then the odd ones.
  __device__ void part() {
#pragma unroll
    for (int i = 0; i < (kInt8 ? 4 : 8); i += kInt8 ? 2 : 4) {
      if constexpr (kInt8) {
        const uint32_t even = permute(w[i], w[i + 1], 0x6420), odd = permute(w[i], w[i + 1], 0x7531);
        w[i] = even, w[i + 1] = odd;
      } else {
        const uint32_t a = permute(w[i], w[i + 1], 0x5410), b = permute(w[i + 2], w[i + 3], 0x5410);
        const uint32_t c = permute(w[i], w[i + 1], 0x7632), d = permute(w[i + 2], w[i + 3], 0x7632);
        w[i] = a, w[i + 1] = b, w[i + 2] = c, w[i + 3] = d;
      }
    }
  }
  __device__ void keep(bool yes) {
    for (uint32_t& v : w) v = yes ? v : 0;
  }
};

// A step of a pair of tiles: four rows of two tiles, one row for each c of the lanes (g, c).
template <int kBits, bool kTurned = false>
struct Pair {
  // Bytes. Lanes that read together meet no bank twice: behind each row is a gap, or its pieces change places.
  static constexpr int kRow = 64 * kBits, kPitch = kRow + (kTurned ? 0 : 32);
  static constexpr int kBytes = 4 * kPitch;
  static constexpr bool kParted = kBits < 4;
  Codes<kBits> codes[2];

  // Where a row's piece of 16 bytes is, if its pieces change places.
  __device__ static int place(int piece, int row) { return kTurned ? piece ^ 2 * row : piece; }
  // row: in shared memory, the step's row c. Of small widths a lane reads 16 bytes of one tile, which are of two
  // neighbouring outputs; otherwise the same place of both tiles.
  __device__ void load(const uint8_t* row, int g, int c) {
    if constexpr (kParted) {
      const uint8_t* tile = row + (g >> 2) * (32 * kBits);
      const uint4 two =
          kTurned ? reinterpret_cast<const uint4*>(row)[place(g, c)] : reinterpret_cast<const uint4*>(tile)[g & 3];
      codes[0].two[0] = two.x, codes[0].two[1] = two.y, codes[1].two[0] = two.z, codes[1].two[1] = two.w;
      if constexpr (kBits == 3) {
        const uint2 one = reinterpret_cast<const uint2*>(tile + 64)[g & 3];
        codes[0].one = one.x, codes[1].one = one.y;
      }
    } else {
#pragma unroll
      for (int q = 0; q < 2; ++q) codes[q].load_shared(reinterpret_cast<const uint32_t*>(row + q * (32 * kBits)), g);
    }
  }
  // Of the pair's 32 outputs, the lower one that lane (g, c) has in codes[q]; the other is 8 behind.
  __device__ static int output(int q, int g) { return kParted ? 16 * (g >> 2) + 2 * (g & 3) + q : 16 * q + g; }
};

}  // namespace halfturn::cuda
