// Attention over the KV cache.
//
// Attention takes the keys in chunks of kChunk and those in blocks of kKeyBlock positions, which start at multiples of
// these whatever the queries are, and every sum of a query row runs over dimensions or positions in ascending order
// with explicit fma. So a row's result does not depend, to the bit, on which rows are computed with it, whether codes
// were unpacked beforehand, or which thread took which chunk.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <type_traits>

#include "attention_scratch.h"
#include "elementwise.inl"
#include "simd.h"

namespace halfturn::HALFTURN_ISA {

// ---- Panels: up to 32 rows of 32 codes, as KvBlock keeps them ----
// load(row, column, v) gives, for kStep rows from `row` on, the columns column.. and column+16.. as unscaled floats.

struct FloatPanel {
  static constexpr int kStep = 1;
  const float* p;
  explicit FloatPanel(const void* start) : p(static_cast<const float*>(start)) {}
  void load(int64_t row, int64_t column, F (&v)[1][2]) const {
    v[0][0] = HALFTURN_ISA::load(p + row * 32 + column);
    v[0][1] = HALFTURN_ISA::load(p + row * 32 + column + 16);
  }
};

struct HalfPanel {
  static constexpr int kStep = 1;
  const uint16_t* p;
  explicit HalfPanel(const void* start) : p(static_cast<const uint16_t*>(start)) {}
  void load(int64_t row, int64_t column, F (&v)[1][2]) const {
    v[0][0] = load_half(p + row * 32 + column);
    v[0][1] = load_half(p + row * 32 + column + 16);
  }
};

struct BytePanel {
  static constexpr int kStep = 1;
  const int8_t* p;
  explicit BytePanel(const void* start) : p(static_cast<const int8_t*>(start)) {}
  void load(int64_t row, int64_t column, F (&v)[1][2]) const {
    v[0][0] = load_int8(p + row * 32 + column);
    v[0][1] = load_int8(p + row * 32 + column + 16);
  }
};

// kWidth bytes to the floats of their low and high halves, two's complement.
inline void load_nibbles(const uint8_t* p, F& low, F& high) {
#if defined(__AVX512F__)
  // A table of 16 floats is one permutation, which looks at the low four bits only.
  const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
  __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
  low = (F)_mm512_permutexvar_ps(bytes, table);
  high = (F)_mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), table);
#elif defined(__AVX2__)
  __m256i bytes = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
  low = (F)_mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(bytes, 28), 28));
  high = (F)_mm256_cvtepi32_ps(_mm256_srai_epi32(bytes, 4));
#else
  I bytes;
  for (int i = 0; i < kWidth; ++i) bytes[i] = int8_t(p[i]);
  low = __builtin_convertvector((bytes << 28) >> 28, F);
  high = __builtin_convertvector(bytes >> 4, F);
#endif
}

struct KeyNibblePanel {  // a byte holds two rows
  static constexpr int kStep = 2;
  const uint8_t* p;
  explicit KeyNibblePanel(const void* start) : p(static_cast<const uint8_t*>(start)) {}
  void load(int64_t row, int64_t column, F (&v)[2][2]) const {
    load_nibbles(p + row * 16 + column, v[0][0], v[1][0]);
    load_nibbles(p + row * 16 + column + 16, v[0][1], v[1][1]);
  }
};

struct ValueNibblePanel {  // a byte holds columns i and i+16
  static constexpr int kStep = 1;
  const uint8_t* p;
  explicit ValueNibblePanel(const void* start) : p(static_cast<const uint8_t*>(start)) {}
  void load(int64_t row, int64_t column, F (&v)[1][2]) const { load_nibbles(p + row * 16 + column, v[0][0], v[0][1]); }
};

template <class Panel>
inline void unpack(const void* codes, int64_t rows, float* out) {
  const Panel panel(codes);
  for (int64_t row = 0; row < rows; row += Panel::kStep)
    for (int64_t column = 0; column < 16; column += kWidth) {
      F v[Panel::kStep][2];
      panel.load(row, column, v);
      for (int s = 0; s < Panel::kStep; ++s) {
        store(out + (row + s) * 32 + column, v[s][0]);
        store(out + (row + s) * 32 + column + 16, v[s][1]);
      }
    }
}

// sums[r] += a[r][0..rows) times the columns column.. and column+16.. of the panel.
template <int kRows, class Panel>
inline void multiply(const float* a, int64_t a_stride, const Panel& panel, int64_t rows, int64_t column,
                     F (&sums)[kRows][2]) {
  for (int64_t row = 0; row < rows; row += Panel::kStep) {
    F v[Panel::kStep][2];
    panel.load(row, column, v);
    for (int s = 0; s < Panel::kStep; ++s)
      for (int r = 0; r < kRows; ++r) {
        F x = splat(a[r * a_stride + row + s]);
        sums[r][0] = fma(x, v[s][0], sums[r][0]);
        sums[r][1] = fma(x, v[s][1], sums[r][1]);
      }
  }
}

// ---- One page ----

// The query rows that a kernel call works on, in its scratch memory. Row r is query token r / group.
struct Rows {
  int64_t head_dim, v_dim, groups;
  float* q;        // [rows, head_dim], scaled
  float* scores;   // [rows, kKeyBlock]: scores, then weights
  float* out;      // [rows, v_dim], not yet divided by the sum: this and what follows are of one chunk
  float* sums;     // [rows, kWidth], by lane
  float* maximum;  // [rows]
};

constexpr int kTileRows = kWidth == 16 ? 8 : 4;  // accumulators: two vectors a row, of 32 or 16 registers

// Calls work.template operator()<kRows>() for kRows = rows, 1 .. kTileRows.
template <int kRows = kTileRows, class Work>
inline void with_rows(int64_t rows, Work&& work) {
  if constexpr (kRows > 1)
    if (rows < kRows) return with_rows<kRows - 1>(rows, work);
  work.template operator()<kRows>();
}

// scores[row .. row+kRows)[position .. position+32) of the key block <- q times one page's keys. The scale of a key's
// 32 codes is applied to their partial sum.
template <int kRows, class Panel>
void score_page(const Rows& x, int64_t row, int64_t position, const uint8_t* codes, int64_t group_bytes,
                const uint16_t* scales) {
  const float* q = x.q + row * x.head_dim;
  float* scores = x.scores + row * cpu::kKeyBlock + position;
  for (int64_t g = 0; g < x.groups; ++g) {
    const Panel panel(codes + g * group_bytes);
    const int64_t dims = std::min<int64_t>(32, x.head_dim - g * 32);
    for (int64_t column = 0; column < 16; column += kWidth) {
      F sums[kRows][2] = {};
      multiply<kRows>(q + g * 32, x.head_dim, panel, dims, column, sums);
      for (int half = 0; half < 2; ++half) {
        const int64_t at = column + half * 16;
        const F scale = scales ? load_half(scales + g * 32 + at) : splat(1.0f);
        for (int r = 0; r < kRows; ++r) {
          float* score = scores + r * cpu::kKeyBlock + at;
          store(score, g ? fma(sums[r][half], scale, load(score)) : sums[r][half] * scale);
        }
      }
    }
  }
}

// out[row .. row+kRows) += weights times the first `positions` values of one page. The scales go into the weights.
template <int kRows, class Panel>
void add_page(const Rows& x, int64_t row, int64_t position, int64_t positions, const uint8_t* codes,
              int64_t group_bytes, const uint16_t* scales) {
  const float* weights = x.scores + row * cpu::kKeyBlock + position;
  int64_t stride = cpu::kKeyBlock;
  float scaled[kRows * 32];
  for (int64_t g = 0; g < x.groups; ++g) {
    const float* a = weights;
    if (scales) {
      for (int64_t at = 0; at < 32; at += kWidth) {
        const F scale = load_half(scales + g * 32 + at);
        for (int r = 0; r < kRows; ++r) store(scaled + r * 32 + at, load(weights + r * cpu::kKeyBlock + at) * scale);
      }
      a = scaled;
      stride = 32;
    }
    const Panel panel(codes + g * group_bytes);
    for (int64_t column = 0; column < 16; column += kWidth) {
      float* out = x.out + row * x.v_dim + g * 32 + column;
      F sums[kRows][2];
      for (int r = 0; r < kRows; ++r) {
        sums[r][0] = load(out + r * x.v_dim);
        sums[r][1] = load(out + r * x.v_dim + 16);
      }
      multiply<kRows>(a, stride, panel, positions, column, sums);
      for (int r = 0; r < kRows; ++r) {
        store(out + r * x.v_dim, sums[r][0]);
        store(out + r * x.v_dim + 16, sums[r][1]);
      }
    }
  }
}

// 2^x for x <= 0, relative error under 2e-7 (the polynomial is Cephes exp2f's). Below 2^-100 it is 0: weights that
// small change nothing, and their products with scales would be subnormal, which is slow.
inline F power_of_two(F x) {
#if defined(__AVX512F__)
  const F n = (F)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  x = max(x, splat(-101.0f));
  const F shifted = x + 12582912.0f;  // adding 1.5 * 2^23 rounds to the nearest integer
  const F n = shifted - 12582912.0f;
#endif
  const F r = x - n;
  F p = splat(1.535336188319500e-4f);
  for (float c : {1.339887440266574e-3f, 9.618437357674640e-3f, 5.550332471162809e-2f, 2.402264791363012e-1f,
                  6.931472028550421e-1f, 1.0f})
    p = fma(p, r, splat(c));
#if defined(__AVX512F__)
  const __mmask16 visible = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-100.0f), _CMP_GE_OQ);
  return (F)_mm512_maskz_scalef_ps(visible, (__m512)p, (__m512)n);
#else
  const F power = (F)((I)p + (((I)shifted - 0x4b400000) << 23));
  return x >= splat(-100.0f) ? power : F{};
#endif
}

// Softmax of one row over a key block, continued from the blocks before: scores[0..valid), in units of log 2, become
// weights relative to the largest score so far, those up to `width` become 0.
inline void soften(const Rows& x, int64_t row, int64_t valid, int64_t width) {
  float* scores = x.scores + row * cpu::kKeyBlock;
  const int64_t end = (std::max<int64_t>(valid, 0) + kWidth - 1) / kWidth * kWidth;
  for (int64_t i = end; i < width; i += kWidth) store(scores + i, F{});
  if (end == 0) return;
  if (valid < end) {
    I lane;
    for (int i = 0; i < kWidth; ++i) lane[i] = i;
    const F hidden = splat(-std::numeric_limits<float>::infinity());
    float* last = scores + end - kWidth;
    store(last, lane < int32_t(valid + kWidth - end) ? load(last) : hidden);
  }

  F largest = load(scores);
  for (int64_t i = kWidth; i < end; i += kWidth) largest = max(largest, load(scores + i));
  const float highest = maximum(largest), before = x.maximum[row];
  float* sums = x.sums + row * kWidth;
  if (highest > before) {
    x.maximum[row] = highest;
    const F factor = power_of_two(splat(before - highest));
    store(sums, load(sums) * factor);
    float* out = x.out + row * x.v_dim;
    for (int64_t i = 0; i < x.v_dim; i += kWidth) store(out + i, load(out + i) * factor);
  }
  const F reference = splat(x.maximum[row]);
  F total = load(sums);
  for (int64_t i = 0; i < end; i += kWidth) {
    const F weight = power_of_two(load(scores + i) - reference);
    store(scores + i, weight);
    total += weight;
  }
  store(sums, total);
}

// ---- Attention ----

// What does not depend on the query rows.
struct Context {
  const KvPool& pool;
  const int32_t* pages;
  int64_t layer, kv_head, group;
  float* keys;    // [head_dim, 32], one page unpacked
  float* values;  // [groups, 32, 32]
};

// Asks for memory that is used about a key block later. Pages of one sequence lie far apart, so that the processor's
// own prefetching starts anew in each (and with it the search for its address).
inline void prefetch(const uint8_t* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i);
}

// Query tokens [position, position + count) and the key positions [begin, end) they meet.
struct Range {
  int64_t position, count, begin, end;
};

// Attention of one range. kUnpack: codes are unpacked once and then used by all tiles of rows; otherwise each tile
// reads the codes.
template <class Keys, class Values, bool kUnpack>
void attend(const Context& c, const Rows& x, const Range& range) {
  using KeyPanel = std::conditional_t<kUnpack, FloatPanel, Keys>;
  using ValuePanel = std::conditional_t<kUnpack, FloatPanel, Values>;
  const int64_t rows = range.count * c.group, end = range.end;
  const auto last_of_tile = [&](int64_t row) {
    return range.position + (std::min(row + kTileRows, rows) - 1) / c.group;
  };
  const int64_t k_group = kUnpack ? 4096 : c.pool.k_bits() * 128, v_group = kUnpack ? 4096 : c.pool.v_bits() * 128;
  const auto block_of = [&](int64_t at) { return c.pool.block(c.layer, c.pages[at / kPageSize], c.kv_head); };

  for (int64_t start = range.begin; start < end; start += cpu::kKeyBlock) {
    const int64_t width = std::min(cpu::kKeyBlock, (end - start + kPageSize - 1) / kPageSize * kPageSize);
    for (int64_t at = 0; at < width; at += kPageSize) {
      const KvBlock block = block_of(start + at);
      if (!kUnpack) prefetch(block.v, c.pool.v_bytes());
      if (kUnpack) unpack<Keys>(block.k, x.head_dim, c.keys);
      const auto* codes = kUnpack ? reinterpret_cast<const uint8_t*>(c.keys) : block.k;
      const uint16_t* scales = c.pool.k_bits() < 16 ? block.k_scales : nullptr;
      for (int64_t row = 0; row < rows; row += kTileRows)
        if (start + at <= last_of_tile(row))
          with_rows(rows - row, [&]<int kRows> { score_page<kRows, KeyPanel>(x, row, at, codes, k_group, scales); });
    }
    for (int64_t row = 0; row < rows; ++row)
      soften(x, row, std::min(width, range.position + row / c.group + 1 - start), width);
    for (int64_t at = 0; at < width; at += kPageSize) {
      const KvBlock block = block_of(start + at);
      const int64_t later = start + at + cpu::kKeyBlock;
      if (!kUnpack && later < range.position + range.count) prefetch(block_of(later).k, c.pool.k_bytes());
      if (kUnpack) unpack<Values>(block.v, x.groups * kPageSize, c.values);
      const auto* codes = kUnpack ? reinterpret_cast<const uint8_t*>(c.values) : block.v;
      const uint16_t* scales = c.pool.v_bits() < 16 ? block.v_scales : nullptr;
      for (int64_t row = 0; row < rows; row += kTileRows) {
        // Positions behind the last query hold what an earlier request left there; 0 times that might not be 0.
        const int64_t positions = std::min(kPageSize, last_of_tile(row) + 1 - start - at);
        if (positions > 0)
          with_rows(rows - row,
                    [&]<int kRows> { add_page<kRows, ValuePanel>(x, row, at, positions, codes, v_group, scales); });
      }
    }
  }
}

template <class Keys, class Values>
void attend(const Context& c, const Rows& x, const Range& range) {
  if (range.count * c.group <= 2 * kTileRows) attend<Keys, Values, false>(c, x, range);
  else attend<Keys, Values, true>(c, x, range);
}

template <class Keys>
void attend(const Context& c, const Rows& x, const Range& range) {
  switch (c.pool.v_bits()) {
    case 4: return attend<Keys, ValueNibblePanel>(c, x, range);
    case 8: return attend<Keys, BytePanel>(c, x, range);
    default: return attend<Keys, HalfPanel>(c, x, range);
  }
}

inline void attend(const Context& c, const Rows& x, const Range& range) {
  const int64_t rows = range.count * c.group;
  std::fill(x.out, x.out + rows * x.v_dim, 0.0f);
  std::fill(x.sums, x.sums + rows * kWidth, 0.0f);
  std::fill(x.maximum, x.maximum + rows, -std::numeric_limits<float>::infinity());
  switch (c.pool.k_bits()) {
    case 4: return attend<KeyNibblePanel>(c, x, range);
    case 8: return attend<BytePanel>(c, x, range);
    default: return attend<HalfPanel>(c, x, range);
  }
}

// What chunks have added up to for one row: [v_dim] values, kWidth sums, one maximum.
inline void begin_total(const KvPool& pool, float* total) {
  std::fill(total, total + pool.v_dim() + kWidth, 0.0f);
  total[pool.v_dim() + kWidth] = -std::numeric_limits<float>::infinity();
}

inline void add_chunk(const KvPool& pool, const float* values, const float* sums, float maximum, float* total) {
  const int64_t dim = pool.v_dim();
  if (maximum == -std::numeric_limits<float>::infinity()) return;  // the row sees nothing of this chunk
  float& before = total[dim + kWidth];
  const float largest = std::max(before, maximum);
  const F old_factor = power_of_two(splat(before - largest)), factor = power_of_two(splat(maximum - largest));
  for (int64_t i = 0; i < dim; i += kWidth)
    store(total + i, fma(load(total + i), old_factor, load(values + i) * factor));
  store(total + dim, fma(load(total + dim), old_factor, load(sums) * factor));
  before = largest;
}

inline void finish_total(const KvPool& pool, const float* total, float* out) {
  const F factor = splat(1.0f / sum(load(total + pool.v_dim())));
  map_row(pool.head_dim(), total, total, out, [&](F v, F) { return v * factor; });
}

// The parts of a scratch memory.
struct Workplace {
  Rows rows;
  float* totals;
  float *keys, *values;
  Workplace(const KvPool& pool, int64_t capacity, float* scratch) {
    const auto take = [&](int64_t floats) {
      float* taken = scratch;
      scratch += (floats + 15) / 16 * 16;
      return taken;
    };
    const int64_t dim = pool.head_dim(), v_dim = pool.v_dim();
    float *q = take(capacity * dim), *scores = take(capacity * cpu::kKeyBlock), *out = take(capacity * v_dim);
    float *sums = take(capacity * kWidth), *maximum = take(capacity);
    rows = {dim, v_dim, pool.groups(), q, scores, out, sums, maximum};
    totals = take(capacity * attention_state(pool));
    keys = take(kPageSize * dim);
    values = take(kPageSize * v_dim);
  }
};

// Queries scaled for weights that are powers of two.
inline void scale_queries(const Rows& x, int64_t count, int64_t group, const float* q, int64_t stride) {
  const F scale = splat(float(std::numbers::log2e / std::sqrt(double(x.head_dim))));
  const int64_t size = group * x.head_dim;
  for (int64_t i = 0; i < count; ++i)
    map_row(size, q + i * stride, q + i * stride, x.q + i * size, [&](F v, F) { return v * scale; });
}

void attention(const KvPool& pool, int64_t layer, int64_t kv_head, int64_t group, const int32_t* pages,
               int64_t position, int64_t count, const float* q, int64_t stride, float* out, float* scratch) {
  const int64_t tokens = std::max<int64_t>(cpu::kQueryRows / group, 1), state = attention_state(pool);
  const Workplace place(pool, tokens * group, scratch);
  const Rows& x = place.rows;
  const Context c{pool, pages, layer, kv_head, group, place.keys, place.values};

  for (int64_t first = 0; first < count; first += tokens) {
    const int64_t now = std::min(tokens, count - first), rows = now * group, end = position + first + now;
    scale_queries(x, now, group, q + first * stride, stride);
    for (int64_t r = 0; r < rows; ++r) begin_total(pool, place.totals + r * state);
    for (int64_t begin = 0; begin < end; begin += cpu::kChunk) {
      attend(c, x, {position + first, now, begin, std::min(end, begin + cpu::kChunk)});
      for (int64_t r = 0; r < rows; ++r)
        add_chunk(pool, x.out + r * x.v_dim, x.sums + r * kWidth, x.maximum[r], place.totals + r * state);
    }
    for (int64_t r = 0; r < rows; ++r)
      finish_total(pool, place.totals + r * state, out + (first + r / group) * stride + r % group * x.head_dim);
  }
}

void attention_chunk(const KvPool& pool, int64_t layer, int64_t kv_head, int64_t group, const int32_t* pages,
                     int64_t position, const float* q, int64_t chunk, float* states, float* scratch) {
  const Workplace place(pool, group, scratch);
  const Rows& x = place.rows;
  const int64_t state = attention_state(pool), begin = chunk * cpu::kChunk;
  scale_queries(x, 1, group, q, 0);
  attend({pool, pages, layer, kv_head, group, place.keys, place.values}, x,
         {position, 1, begin, std::min(position + 1, begin + cpu::kChunk)});
  for (int64_t r = 0; r < group; ++r) {
    float* to = states + r * state;
    std::copy(x.out + r * x.v_dim, x.out + (r + 1) * x.v_dim, to);
    std::copy(x.sums + r * kWidth, x.sums + (r + 1) * kWidth, to + x.v_dim);
    to[x.v_dim + kWidth] = x.maximum[r];
  }
}

void attention_merge(const KvPool& pool, int64_t group, int64_t chunks, const float* states, float* out,
                     float* scratch) {
  const int64_t state = attention_state(pool), v_dim = pool.v_dim();
  for (int64_t r = 0; r < group; ++r) {
    begin_total(pool, scratch);
    for (int64_t i = 0; i < chunks; ++i) {
      const float* from = states + (i * group + r) * state;
      add_chunk(pool, from, from + v_dim, from[v_dim + kWidth], scratch);
    }
    finish_total(pool, scratch, out + r * pool.head_dim());
  }
}

}  // namespace halfturn::HALFTURN_ISA
