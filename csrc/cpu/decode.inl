// Codes to levels: 64 weights at a time (16 outputs x 4 inputs), and their product with four activations.
// Weights holds bytes 4*output + input; Sums holds one int32 per output. What differs between instruction sets is here.
#pragma once

namespace halfturn::HALFTURN_ISA {

#if defined(__AVX512VNNI__)

constexpr int kOffset = 128;  // vpdpbusd multiplies unsigned weights by signed activations
struct Weights {
  __m512i v;
};
struct Sums {
  __m512i v;
};

struct Decoder {
  __m512i table;
  explicit Decoder(const cpu::Matrix& m) : table(_mm512_load_si512(m.table)) {}

  template <int kPlanes>
  void tile(const uint8_t* p, Weights (&w)[4]) const {
    const __m512i low = _mm512_set1_epi8(15);
    auto load = [](const uint8_t* q) { return _mm512_loadu_si512(q); };
    auto mask = [](const uint8_t* q) {
      uint64_t bits;
      std::memcpy(&bits, q, 8);
      return _cvtu64_mask64(bits);
    };
    if constexpr (kPlanes == 8) {
      for (int g = 0; g < 4; ++g) w[g].v = load(p + 64 * g);
    } else if constexpr (kPlanes >= 4) {
      for (int half = 0; half < 2; ++half) {
        __m512i z = load(p + 64 * half);
        w[2 * half].v = _mm512_and_si512(z, low);
        w[2 * half + 1].v = _mm512_and_si512(_mm512_srli_epi16(z, 4), low);
      }
      if constexpr (kPlanes == 4) {
        for (int g = 0; g < 4; ++g) w[g].v = _mm512_shuffle_epi8(table, w[g].v);
      } else if constexpr (kPlanes == 5) {
        const __m512i high = _mm512_set1_epi8(16);
        for (int g = 0; g < 4; ++g) {
          __m512i index = _mm512_mask_add_epi8(w[g].v, mask(p + 128 + 8 * g), w[g].v, high);
          w[g].v = _mm512_permutexvar_epi8(index, table);
        }
      } else {
        const __m512i z = load(p + 128), high = _mm512_set1_epi8(0x30);
        const __m512i shifted[4] = {_mm512_slli_epi16(z, 4), _mm512_slli_epi16(z, 2), z, _mm512_srli_epi16(z, 2)};
        for (int g = 0; g < 4; ++g)
          w[g].v = _mm512_permutexvar_epi8(_mm512_or_si512(w[g].v, _mm512_and_si512(shifted[g], high)), table);
      }
    } else {
      const __m512i z = load(p), two = _mm512_set1_epi8(3);
      const __m512i shifted[4] = {z, _mm512_srli_epi16(z, 2), _mm512_srli_epi16(z, 4), _mm512_srli_epi16(z, 6)};
      for (int g = 0; g < 4; ++g) {
        __m512i index = _mm512_and_si512(shifted[g], two);
        if constexpr (kPlanes == 3)
          index = _mm512_mask_add_epi8(index, mask(p + 64 + 8 * g), index, _mm512_set1_epi8(4));
        w[g].v = _mm512_shuffle_epi8(table, index);
      }
    }
  }
};

inline Sums zero_sums() { return {_mm512_setzero_si512()}; }
inline void dot(Sums& sums, const Weights& w, int32_t four) {
  sums.v = _mm512_dpbusd_epi32(sums.v, w.v, _mm512_set1_epi32(four));
}
inline void store(int32_t* p, const Sums& s) { _mm512_storeu_si512(p, s.v); }
inline void store(uint8_t* p, const Weights& w) { _mm512_storeu_si512(p, w.v); }
inline Weights load_weights(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
constexpr int kStreams = 4, kPanelTiles = 3, kPanelRows = 8;

#elif defined(__AVX2__)

constexpr int kOffset =
    0;  // maddubs with |w| and the sign moved to the activation: 2*127*127 fits 16 bits, no saturation
struct Weights {
  __m256i v[2];
};
struct Sums {
  __m256i v[2];
};

struct Decoder {
  __m256i table[4];  // 16 entries each, in both lanes
  explicit Decoder(const cpu::Matrix& m) {
    for (int i = 0; i < 4; ++i)
      table[i] = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)(m.table + 16 * i)));
  }

  // 32 bits to a byte mask: 0xff where the bit is set.
  static __m256i expand(const uint8_t* p) {
    int32_t bits;
    std::memcpy(&bits, p, 4);
    const __m256i spread = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i select = _mm256_set1_epi64x(int64_t(0x8040201008040201ull));
    __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(bits), spread);
    return _mm256_cmpeq_epi8(_mm256_and_si256(bytes, select), select);
  }

  template <int kPlanes>
  void tile(const uint8_t* p, Weights (&w)[4]) const {
    const __m256i low = _mm256_set1_epi8(15), two = _mm256_set1_epi8(3);
    for (int half = 0; half < 2; ++half) {  // outputs 0..7 and 8..15
      auto load = [&](int at) { return _mm256_loadu_si256((const __m256i*)(p + at + 32 * half)); };
      auto field = [&](__m256i z, int g) { return _mm256_and_si256(_mm256_srli_epi16(z, 2 * g), two); };
      if constexpr (kPlanes == 8) {
        for (int g = 0; g < 4; ++g) w[g].v[half] = load(64 * g);
      } else if constexpr (kPlanes >= 4) {
        __m256i index[4];
        for (int h = 0; h < 2; ++h) {
          __m256i z = load(64 * h);
          index[2 * h] = _mm256_and_si256(z, low);
          index[2 * h + 1] = _mm256_and_si256(_mm256_srli_epi16(z, 4), low);
        }
        for (int g = 0; g < 4; ++g) {
          __m256i a = _mm256_shuffle_epi8(table[0], index[g]);
          if constexpr (kPlanes == 5) {
            __m256i b = _mm256_shuffle_epi8(table[1], index[g]);
            a = _mm256_blendv_epi8(a, b, expand(p + 128 + 8 * g + 4 * half));
          } else if constexpr (kPlanes == 6) {
            __m256i f = field(load(128), g);
            __m256i odd = _mm256_slli_epi16(f, 7),
                    high = _mm256_slli_epi16(f, 6);  // blendv looks at bit 7 of each byte
            a = _mm256_blendv_epi8(a, _mm256_shuffle_epi8(table[1], index[g]), odd);
            __m256i b = _mm256_blendv_epi8(_mm256_shuffle_epi8(table[2], index[g]),
                                           _mm256_shuffle_epi8(table[3], index[g]), odd);
            a = _mm256_blendv_epi8(a, b, high);
          }
          w[g].v[half] = a;
        }
      } else {
        __m256i z = load(0);
        for (int g = 0; g < 4; ++g) {
          __m256i index = field(z, g);
          if constexpr (kPlanes == 3)
            index = _mm256_or_si256(index, _mm256_and_si256(expand(p + 64 + 8 * g + 4 * half), _mm256_set1_epi8(4)));
          w[g].v[half] = _mm256_shuffle_epi8(table[0], index);
        }
      }
    }
  }
};

inline Sums zero_sums() { return {{_mm256_setzero_si256(), _mm256_setzero_si256()}}; }
inline void dot(Sums& sums, const Weights& w, int32_t four) {
  const __m256i a = _mm256_set1_epi32(four), ones = _mm256_set1_epi16(1);
  for (int h = 0; h < 2; ++h) {
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w.v[h]), _mm256_sign_epi8(a, w.v[h]));
    sums.v[h] = _mm256_add_epi32(sums.v[h], _mm256_madd_epi16(pairs, ones));
  }
}
inline void store(int32_t* p, const Sums& s) {
  for (int h = 0; h < 2; ++h) _mm256_storeu_si256((__m256i*)(p + 8 * h), s.v[h]);
}
inline void store(uint8_t* p, const Weights& w) {
  for (int h = 0; h < 2; ++h) _mm256_storeu_si256((__m256i*)(p + 32 * h), w.v[h]);
}
inline Weights load_weights(const uint8_t* p) {
  return {{_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))}};
}
constexpr int kStreams = 2, kPanelTiles = 1, kPanelRows = 4;

#else

constexpr int kOffset = 0;
struct Weights {
  int8_t v[64];
};
struct Sums {
  int32_t v[16];
};

struct Decoder {
  const uint8_t* table;
  explicit Decoder(const cpu::Matrix& m) : table(m.table) {}

  template <int kPlanes>
  void tile(const uint8_t* p, Weights (&w)[4]) const {
    for (int g = 0; g < 4; ++g)
      for (int i = 0; i < 64; ++i) {
        int code = 0;
        if constexpr (kPlanes == 8) {
          w[g].v[i] = int8_t(p[64 * g + i]);
          continue;
        } else if constexpr (kPlanes >= 4) {
          code = (p[64 * (g / 2) + i] >> (4 * (g & 1))) & 15;
          if constexpr (kPlanes == 5) code |= ((p[128 + 8 * g + i / 8] >> (i & 7)) & 1) << 4;
          if constexpr (kPlanes == 6) code |= ((p[128 + i] >> (2 * g)) & 3) << 4;
        } else {
          code = (p[i] >> (2 * g)) & 3;
          if constexpr (kPlanes == 3) code |= ((p[64 + 8 * g + i / 8] >> (i & 7)) & 1) << 2;
        }
        w[g].v[i] = int8_t(table[code]);
      }
  }
};

inline Sums zero_sums() { return {}; }
inline void dot(Sums& sums, const Weights& w, int32_t four) {
  int8_t a[4];
  std::memcpy(a, &four, 4);
  for (int n = 0; n < 16; ++n) {
    int32_t s = 0;
    for (int i = 0; i < 4; ++i) s += int32_t(w.v[4 * n + i]) * a[i];
    sums.v[n] += s;
  }
}
inline void store(int32_t* p, const Sums& s) { std::memcpy(p, s.v, sizeof(s.v)); }
inline void store(uint8_t* p, const Weights& w) { std::memcpy(p, w.v, 64); }
inline Weights load_weights(const uint8_t* p) {
  Weights w;
  std::memcpy(w.v, p, 64);
  return w;
}
constexpr int kStreams = 1, kPanelTiles = 1, kPanelRows = 4;

#endif

}  // namespace halfturn::HALFTURN_ISA
