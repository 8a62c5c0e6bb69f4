// Products with quantized matrices.
//   1-8 rows: weights are decoded into registers and used at once, several output tiles (streams of memory) at a time.
//   more:     a panel of output tiles is decoded into scratch once, then multiplied by blocks of rows.
// Integer sums are exact in any order and every path ends in the same float expression, so a row's result does not
// depend on the rows beside it.
#pragma once
#include "decode.inl"

namespace halfturn::HALFTURN_ISA {

static void quantize_row(const float* x, int64_t size, int64_t padded, int8_t* codes, float* scale, int32_t* sums) {
  const int64_t whole = size / kWidth * kWidth;
  // Magnitudes are in the order of their bits, and NaN is above them: it must reach the scale, not get lost.
  I top = {};
  for (int64_t i = 0; i < whole; i += kWidth) {
    const I bits = (I)abs(load(x + i));
    top = bits > top ? bits : top;
  }
  int32_t most = 0;
  for (int l = 0; l < kWidth; ++l) most = std::max(most, top[l]);
  for (int64_t i = whole; i < size; ++i) most = std::max(most, std::bit_cast<int32_t>(std::fabs(x[i])));
  const float largest = std::bit_cast<float>(most);
  const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
  *scale = largest / 127.0f;
  for (int64_t i = 0; i < whole; i += kWidth) {
    // Adding 1.5 * 2^23 rounds to the nearest integer.
    I rounded = (I)(load(x + i) * inverse + 12582912.0f) - 0x4b400000;
#if defined(__AVX512F__)
    _mm_storeu_si128((__m128i*)(codes + i), _mm512_cvtepi32_epi8((__m512i)rounded));
#else
    for (int l = 0; l < kWidth; ++l) codes[i + l] = int8_t(rounded[l]);
#endif
  }
  for (int64_t i = whole; i < size; ++i) codes[i] = int8_t(std::nearbyint(x[i] * inverse));
  for (int64_t i = size; i < padded; ++i) codes[i] = 0;
  int32_t total = 0;
  sums[0] = 0;
  for (int64_t t = 0; t < padded / 16; ++t) {
    int32_t part = 0;
    for (int i = 0; i < 16; ++i) part += codes[16 * t + i];
    sums[t + 1] = total += part;
  }
}

static uint64_t read_bytes(const uint8_t* p, int64_t bytes) {
  I sums[4] = {};
  const int64_t quarter = bytes / 4;
  for (int64_t i = 0; i < quarter; i += int64_t(sizeof(I)))
    for (int s = 0; s < 4; ++s) {
      I v;
      std::memcpy(&v, p + s * quarter + i, sizeof(I));
      sums[s] += v;
    }
  I all = sums[0] + sums[1] + sums[2] + sums[3];
  uint64_t total = 0;
  for (int l = 0; l < kWidth; ++l) total += uint32_t(all[l]);
  return total;
}

inline int32_t four_at(const int8_t* p) {
  int32_t v;
  std::memcpy(&v, p, 4);
  return v;
}

// The float steps that end every path. They are functions of their own, never inlined, so that the compiler makes one
// choice of fused or separate multiply and add for all paths.

constexpr int kParts = 16 / kWidth;  // vectors that hold the outputs of one tile

// One tile's integer sums of one group of inputs, scaled, into y (added where it is not the first group).
[[gnu::noinline]] static void scale_sums(const int32_t* sums, int32_t correction, const float* scales, bool first,
                                         float* y) {
  for (int p = 0; p < 16; p += kWidth) {
    I s;
    std::memcpy(&s, sums + p, sizeof(I));
    F value = __builtin_convertvector(s - correction, F) * load(scales + p);
    store(y + p, first ? value : load(y + p) + value);
  }
}

// The finished outputs of one tile and row.
[[gnu::noinline]] static void finish(const float* y, float row_scale, const cpu::Matrix& m, int64_t n, float* out,
                                     bool add) {
  for (int p = 0; p < 16; p += kWidth) {
    F value = load(y + p) * row_scale;
    if (m.bias) value += load(m.bias.get() + 16 * n + p);
    store(out + p, add ? load(out + p) + value : value);
  }
}

constexpr int64_t kAhead = 12;  // tiles

// Asks for what follows tile k of one of kTiles neighbouring streams: some tiles ahead in the same stream, or at the
// start of the one that follows it in the next call.
template <int kPlanes, int kTiles>
[[gnu::always_inline]] inline void prefetch(const cpu::Matrix& m, const uint8_t* tile, int64_t k) {
  tile += kAhead * m.tile_bytes + (k + kAhead < m.k_tiles ? 0 : (kTiles - 1) * m.k_tiles * m.tile_bytes);
  __builtin_prefetch(tile);
  if constexpr (kPlanes >= 3) __builtin_prefetch(tile + 64);
  if constexpr (kPlanes >= 5) __builtin_prefetch(tile + 128);
  if constexpr (kPlanes >= 8) __builtin_prefetch(tile + 192);
}

template <int kPlanes, int kRows, int kTiles>
static void few_rows(const cpu::Matrix& m, const cpu::Activations& x, int64_t n, const cpu::Output& out) {
  const Decoder decoder(m);
  const int8_t* codes[kRows];
  for (int r = 0; r < kRows; ++r) codes[r] = x.codes + std::min<int64_t>(r, x.rows - 1) * x.stride;
  float y[kRows][kTiles][16];
  for (int64_t group = 0; group < m.groups; ++group) {
    const int64_t begin = group * m.group_tiles, end = begin + m.group_tiles;
    Sums sums[kRows][kTiles];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int t = 0; t < kTiles; ++t) sums[r][t] = zero_sums();
    for (int64_t k = begin; k < end; ++k) {
#pragma GCC unroll 8
      for (int t = 0; t < kTiles; ++t) {
        const uint8_t* tile = m.tile(n + t) + k * m.tile_bytes;
        prefetch<kPlanes, kTiles>(m, tile, k);
        Weights w[4];
        decoder.template tile<kPlanes>(tile, w);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
          for (int g = 0; g < 4; ++g) dot(sums[r][t], w[g], four_at(codes[r] + 16 * k + 4 * g));
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      if (r >= x.rows) break;
      const int32_t* before = x.sums + r * x.sums_stride;
#pragma GCC unroll 8
      for (int t = 0; t < kTiles; ++t) {
        int32_t tile_sums[16];
        store(tile_sums, sums[r][t]);
        scale_sums(tile_sums, kOffset * (before[end] - before[begin]),
                   m.scales.get() + (group * m.n_tiles + n + t) * 16, group == 0, y[r][t]);
      }
    }
  }
  for (int r = 0; r < kRows && r < x.rows; ++r)
    for (int t = 0; t < kTiles; ++t)
      finish(y[r][t], x.scales[r], m, n + t, out.data + r * out.stride + (n + t) * 16, out.add);
}

template <int kPlanes, int kRows>
static void few_rows_tiles(const cpu::Matrix& m, const cpu::Activations& x, int64_t tile, int64_t tiles,
                           const cpu::Output& out) {
  constexpr int kTiles = kRows >= 8 ? std::min(kStreams, 2) : kStreams;  // sums that fit the registers
  int64_t n = tile;
  for (; n + kTiles <= tile + tiles; n += kTiles) few_rows<kPlanes, kRows, kTiles>(m, x, n, out);
  for (; n < tile + tiles; ++n) few_rows<kPlanes, kRows, 1>(m, x, n, out);
}

template <int kPlanes, int kTiles>
static void decode_panel(const cpu::Matrix& m, int64_t n, uint8_t* panel) {
  const Decoder decoder(m);
  for (int64_t k = 0; k < m.k_tiles; ++k)
    for (int t = 0; t < kTiles; ++t) {
      const uint8_t* tile = m.tile(n + t) + k * m.tile_bytes;
      prefetch<kPlanes, kTiles>(m, tile, k);
      Weights w[4];
      decoder.template tile<kPlanes>(tile, w);
      for (int g = 0; g < 4; ++g) store(panel + ((4 * k + g) * kTiles + t) * 64, w[g]);
    }
}

template <int kRows, int kTiles>
static void panel_rows(const cpu::Matrix& m, const cpu::Activations& x, int64_t row, const uint8_t* panel, int64_t n,
                       const cpu::Output& out) {
  const int8_t* codes = x.codes + row * x.stride;
  float y[kRows][kTiles][16];
  for (int64_t group = 0; group < m.groups; ++group) {
    const int64_t begin = group * m.group_tiles, end = begin + m.group_tiles;
    Sums sums[kRows][kTiles];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int t = 0; t < kTiles; ++t) sums[r][t] = zero_sums();
    for (int64_t k = 4 * begin; k < 4 * end; ++k) {
      Weights w[kTiles];
#pragma GCC unroll 8
      for (int t = 0; t < kTiles; ++t) w[t] = load_weights(panel + (k * kTiles + t) * 64);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const int32_t four = four_at(codes + r * x.stride + 4 * k);
#pragma GCC unroll 8
        for (int t = 0; t < kTiles; ++t) dot(sums[r][t], w[t], four);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const int32_t* before = x.sums + (row + r) * x.sums_stride;
#pragma GCC unroll 8
      for (int t = 0; t < kTiles; ++t) {
        int32_t tile_sums[16];
        store(tile_sums, sums[r][t]);
        scale_sums(tile_sums, kOffset * (before[end] - before[begin]),
                   m.scales.get() + (group * m.n_tiles + n + t) * 16, group == 0, y[r][t]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < kTiles; ++t)
      finish(y[r][t], x.scales[row + r], m, n + t, out.data + (row + r) * out.stride + (n + t) * 16, out.add);
}

template <int kPlanes, int kTiles>
static void many_rows(const cpu::Matrix& m, const cpu::Activations& x, int64_t n, const cpu::Output& out,
                      uint8_t* panel) {
  decode_panel<kPlanes, kTiles>(m, n, panel);
  int64_t row = 0;
  for (; row + kPanelRows <= x.rows; row += kPanelRows) panel_rows<kPanelRows, kTiles>(m, x, row, panel, n, out);
  for (; row + 4 <= x.rows; row += 4) panel_rows<4, kTiles>(m, x, row, panel, n, out);
  for (; row + 2 <= x.rows; row += 2) panel_rows<2, kTiles>(m, x, row, panel, n, out);
  for (; row < x.rows; ++row) panel_rows<1, kTiles>(m, x, row, panel, n, out);
}

template <int kPlanes>
static void matmul_planes(const cpu::Matrix& m, const cpu::Activations& x, int64_t tile, int64_t tiles,
                          const cpu::Output& out, uint8_t* scratch) {
  if (x.rows <= 1) return few_rows_tiles<kPlanes, 1>(m, x, tile, tiles, out);
  if (x.rows <= 2) return few_rows_tiles<kPlanes, 2>(m, x, tile, tiles, out);
  if (x.rows <= 4) return few_rows_tiles<kPlanes, 4>(m, x, tile, tiles, out);
  if (x.rows <= 8) return few_rows_tiles<kPlanes, 8>(m, x, tile, tiles, out);
  int64_t n = tile;
  for (; n + kPanelTiles <= tile + tiles; n += kPanelTiles) many_rows<kPlanes, kPanelTiles>(m, x, n, out, scratch);
  for (; n < tile + tiles; ++n) many_rows<kPlanes, 1>(m, x, n, out, scratch);
}

static void matmul_a8(const cpu::Matrix& m, const cpu::Activations& x, int64_t tile, int64_t tiles, cpu::Output out,
                      uint8_t* scratch) {
  switch (m.planes) {
    case 2: return matmul_planes<2>(m, x, tile, tiles, out, scratch);
    case 3: return matmul_planes<3>(m, x, tile, tiles, out, scratch);
    case 4: return matmul_planes<4>(m, x, tile, tiles, out, scratch);
    case 5: return matmul_planes<5>(m, x, tile, tiles, out, scratch);
    case 6: return matmul_planes<6>(m, x, tile, tiles, out, scratch);
    case 8: return matmul_planes<8>(m, x, tile, tiles, out, scratch);
  }
}

// The reference: levels and activations as floats, summed over the inputs in their order. -----------------------------

[[gnu::noinline]] static void scale_floats(const F* sums, const float* scales, float* y) {
  for (int p = 0; p < kParts; ++p) store(y + p * kWidth, load(y + p * kWidth) + sums[p] * load(scales + p * kWidth));
}

template <int kRows>
static void float_rows(const cpu::Matrix& m, const cpu::Activations& x, int64_t row, const float* panel, int64_t n,
                       const cpu::Output& out) {
  float y[kRows][16] = {};
  for (int64_t group = 0; group < m.groups; ++group) {
    F sums[kRows][kParts] = {};
    for (int64_t k = group * m.group_tiles * 16; k < (group + 1) * m.group_tiles * 16; ++k)
      for (int p = 0; p < kParts; ++p) {
        const F w = load(panel + k * 16 + p * kWidth);
        for (int r = 0; r < kRows; ++r) sums[r][p] += w * x.values[(row + r) * x.stride + k];
      }
    for (int r = 0; r < kRows; ++r) scale_floats(sums[r], m.scales.get() + (group * m.n_tiles + n) * 16, y[r]);
  }
  for (int r = 0; r < kRows; ++r) finish(y[r], 1.0f, m, n, out.data + (row + r) * out.stride + n * 16, out.add);
}

template <int kPlanes>
static void float_panel(const cpu::Matrix& m, int64_t n, float* panel) {
  const Decoder decoder(m);
  for (int64_t k = 0; k < m.k_tiles; ++k) {
    Weights w[4];
    decoder.template tile<kPlanes>(m.tile(n) + k * m.tile_bytes, w);
    for (int g = 0; g < 4; ++g) {
      uint8_t bytes[64];
      store(bytes, w[g]);
      for (int p = 0; p < kParts; ++p) {
        I four;
        std::memcpy(&four, bytes + 4 * p * kWidth, sizeof(I));
        for (int i = 0; i < 4; ++i) {
          I level = kOffset ? ((four >> (8 * i)) & 255) - kOffset : (four << (24 - 8 * i)) >> 24;
          store(panel + (16 * k + 4 * g + i) * 16 + p * kWidth, __builtin_convertvector(level, F));
        }
      }
    }
  }
}

static void matmul_f16(const cpu::Matrix& m, const cpu::Activations& x, int64_t tile, int64_t tiles, cpu::Output out,
                       uint8_t* scratch) {
  auto* panel = reinterpret_cast<float*>(scratch);
  for (int64_t n = tile; n < tile + tiles; ++n) {
    switch (m.planes) {
      case 2: float_panel<2>(m, n, panel); break;
      case 3: float_panel<3>(m, n, panel); break;
      case 4: float_panel<4>(m, n, panel); break;
      case 5: float_panel<5>(m, n, panel); break;
      case 6: float_panel<6>(m, n, panel); break;
      case 8: float_panel<8>(m, n, panel); break;
    }
    int64_t row = 0;
    for (; row + 8 <= x.rows; row += 8) float_rows<8>(m, x, row, panel, n, out);
    for (; row < x.rows; ++row) float_rows<1>(m, x, row, panel, n, out);
  }
}

}  // namespace halfturn::HALFTURN_ISA
