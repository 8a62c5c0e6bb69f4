#include "rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace halfturn {

namespace {

// The formulas are those of transformers' modeling_rope_utils.py.
std::vector<double> frequencies(const Config& config, int64_t context) {
  const RopeScaling& scaling = config.rope_scaling;
  const double dim = double(config.head_dim), trained = double(config.max_positions);

  double theta = config.rope_theta;
  // transformers recomputes theta whenever a sequence passes the trained length, for all of its keys. Keys in a cache
  // are rotated already, so one theta has to serve every length: the one of the longest sequence that is allowed.
  if (scaling.type == RopeScaling::Type::kDynamic && double(context) > trained)
    theta *= std::pow(scaling.factor * double(context) / trained - (scaling.factor - 1.0), dim / (dim - 2.0));

  std::vector<double> result(size_t(config.head_dim / 2));
  for (size_t i = 0; i < result.size(); ++i) {
    double f = std::pow(theta, -2.0 * double(i) / dim);
    if (scaling.type == RopeScaling::Type::kLinear) f /= scaling.factor;
    if (scaling.type == RopeScaling::Type::kLlama3) {
      const double turns = scaling.original_context * f / (2.0 * std::numbers::pi);  // within the original context
      const double smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor);
      const double kept = turns > scaling.high_freq_factor ? 1.0 : turns < scaling.low_freq_factor ? 0.0 : smooth;
      f *= kept + (1.0 - kept) / scaling.factor;
    }
    result[i] = f;
  }
  return result;
}

}  // namespace

Rope::Rope(const Config& config, int64_t context)
    : context_(context),
      frequencies_(halfturn::frequencies(config, context)),
      pieces_(size_t((context + kPiece - 1) / kPiece)),
      memory_(pieces_.size()) {}

const float* Rope::build(int64_t piece) const {
  std::lock_guard lock(mutex_);
  auto& memory = memory_[size_t(piece)];
  if (!memory) {
    const size_t half = frequencies_.size();
    memory = std::make_unique_for_overwrite<float[]>(size_t(kPiece) * 2 * half);
    for (size_t p = 0; p < size_t(kPiece); ++p) {
      float* row = memory.get() + p * 2 * half;
      for (size_t i = 0; i < half; ++i) {
        const double angle = double(size_t(piece * kPiece) + p) * frequencies_[i];
        row[i] = float(std::cos(angle));
        row[half + i] = float(std::sin(angle));
      }
    }
    pieces_[size_t(piece)].store(memory.get(), std::memory_order_release);
  }
  return memory.get();
}

}  // namespace halfturn
