// What a step needs between operations on the card, allocated once for the largest step.
#pragma once
#include "../batch.h"
#include "../network.h"
#include "attention.h"
#include "cuda.h"
#include "gemv.h"
#include "kv.h"
#include "operand.h"
#include "sample.h"

namespace halfturn {

template <class Device>
struct Workspace;

namespace cuda {

// The KV pages on the card.
class KvCache {
 public:
  // As for KvPool.
  KvCache(const Config& config, int k_bits, int v_bits, int64_t pages);
  static KvView view_of(const Config& config, int k_bits, int v_bits);  // without memory
  const KvView& view() const { return view_; }
  int64_t pages() const { return pages_; }
  int64_t bytes() const { return memory_.bytes(); }

 private:
  KvView view_;
  int64_t pages_;
  Buffer<uint8_t> memory_;
};

// Cosines and sines of every position: float32 [context, 2, head_dim/2].
class RopeTable {
 public:
  RopeTable(const Cuda& device, const Config& config, int64_t context);
  const float* get() const { return table_.get(); }
  int64_t bytes() const { return table_.bytes(); }

 private:
  Buffer<float> table_;
};

}  // namespace cuda

template <>
struct Workspace<Cuda> {
  static constexpr int kRows = 1024;           // of one pass; longer prompts take several
  static constexpr int kHeadRows = 64;         // rows of logits at a time
  static constexpr int kPartialChunks = 2048;  // chunks of keys whose attention is kept at a time, of all rows together

  // Without `allocate` only sizes are computed.
  Workspace(const Config& config, const cuda::KvView& kv, int64_t context, bool a8, bool allocate = true);

  // What one pass is, on the card and, at the same places, in memory of the host; of which there are two, so that the
  // host can prepare a pass while the card has yet to copy the one before it.
  struct Inputs {
    int32_t *tokens, *positions, *sequences;  // [kRows]
    int32_t* chosen;                          // [kHeadRows]: rows whose logits are wanted
    cuda::FlashTile* tiles;                   // [kRows]
    cuda::SampleSettings* settings;           // [kHeadRows]
    int32_t* pages;                           // [sequences, page_stride]; last, as a pass may use few
  };
  int64_t input_bytes(int64_t sequences_used) const {  // that a pass has to copy
    return pages_begin_ + sequences_used * page_stride * int64_t(sizeof(int32_t));
  }
  cuda::RowsView rows_view(int64_t first = 0) const {
    return {device.tokens + first, device.positions + first, device.sequences + first, device.pages, page_stride};
  }
  // Points at rows of `size` inputs.
  cuda::Operand operand(int64_t rows, int64_t size) const;
  int64_t bytes() const { return bytes_; }

  bool a8;
  int64_t hidden, q_size, kv_size, mlp_size, vocab;  // row strides: dimensions rounded up to 16
  int page_stride;                                   // pages of the longest sequence
  int64_t sequences;                                 // the most that one pass can have

  // Of the pass that runs: its rows, the first of them decoding, and how far those reach.
  int rows = 0, decode_rows = 0, max_chunks = 1, tiles = 0;
  bool row_each = true;           // no two of those that decode are of one sequence
  cuda::RowSource source;         // of the next products, if they make their operand themselves
  const float* rotary = nullptr;  // of the next attention, if it does what rope_and_store() does

  cuda::Buffer<float> x;
  // Of attention, the MLP and the head; each is done with before the next begins, so they lie in the same memory.
  float *q = nullptr, *k = nullptr, *v = nullptr, *attended = nullptr, *partial = nullptr;
  float *gate = nullptr, *up = nullptr;
  float* logits = nullptr;
  uint8_t* sample_memory = nullptr;
  cuda::Buffer<uint8_t> shared;
  cuda::Buffer<int8_t> codes;     // a8
  cuda::Buffer<uint16_t> values;  // f16
  cuda::Buffer<float> scales, maxima;
  cuda::Buffer<uint8_t> input_memory;
  cuda::Buffer<cuda::SampleResult> results;
  std::unique_ptr<cuda::Pinned<uint8_t>> host_memory[2];
  std::unique_ptr<cuda::Pinned<cuda::SampleResult>> host_results[2];
  Inputs device = {}, host = {};
  int turn = 0;  // which of the two `host` is
  void take_turn(int which);

 private:
  Inputs inputs_in(uint8_t* memory);
  int64_t place_shared(uint8_t* memory, const Config& config, int64_t partial_floats);
  int64_t pages_begin_ = 0, bytes_ = 0;
};

}  // namespace halfturn
