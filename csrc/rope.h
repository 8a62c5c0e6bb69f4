// Rotary position embeddings: the angles of every position, with the scalings linear, dynamic (NTK) and llama3.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "check.h"
#include "model.h"

namespace halfturn {

class Rope {
 public:
  // For positions 0 .. context-1.
  Rope(const Config& config, int64_t context);

  // Cosines, then sines, of one position: float32 [2, head_dim/2]. Thread-safe; throws Error outside the context.
  // Positions are computed when first asked for, in double precision, kPiece at a time: 128k positions must not slow
  // the load or stay in memory unused.
  const float* at(int64_t position) const {
    CHECK(position >= 0 && position < context_, "position ", position, " is outside the context of ", context_,
          ": load the model with a longer one");
    const float* piece = pieces_[size_t(position / kPiece)].load(std::memory_order_acquire);
    return (piece ? piece : build(position / kPiece)) + position % kPiece * 2 * int64_t(frequencies_.size());
  }

  int64_t context() const { return context_; }
  const std::vector<double>& frequencies() const { return frequencies_; }  // radians per position, [head_dim/2]

 private:
  static constexpr int64_t kPiece = 128;
  const float* build(int64_t piece) const;

  int64_t context_;
  std::vector<double> frequencies_;
  mutable std::vector<std::atomic<const float*>> pieces_;
  mutable std::vector<std::unique_ptr<float[]>> memory_;
  mutable std::mutex mutex_;
};

}  // namespace halfturn
