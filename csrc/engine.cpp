#include "engine.h"

#include <algorithm>
#include <cmath>

#include "check.h"
#include "pages.h"

namespace halfturn {

std::unique_ptr<Engine> Engine::open(const std::string& folder, const EngineOptions& options) {
  CHECK(options.device == "cpu" || options.device == "cuda", "device is \"", options.device,
        "\", it must be cpu or cuda");
  const Model model = load_model(folder);
  return options.device == "cuda" ? open_cuda_engine(model, options) : open_cpu_engine(model, options);
}

Engine::Engine(const Model& model, const EngineOptions& options)
    : options_(options), config_(model.config), checkpoint_(model.checkpoint) {
  CHECK(options.mode == "a8" || options.mode == "f16", "mode is \"", options.mode, "\", it must be a8 or f16");
  CHECK(options.context >= 1 && options.context <= config_.context_limit(), "context is ", options.context,
        ", this model has positions for 1 to ", config_.context_limit());
  CHECK(options.kv_tokens >= 1 && options.kv_tokens <= int64_t(1) << 31, "kv_tokens is ", options.kv_tokens,
        ", it must be between 1 and ", int64_t(1) << 31);
}

void Engine::start(const std::vector<const Item*>&) { CHECK(false, options_.device, " runs steps as a whole only"); }

std::vector<StepResult> Engine::finish() { throw Error("no step was started"); }

void Engine::check(const std::vector<const Item*>& items, bool may_lack_tokens) const {
  for (size_t i = 0; i < items.size(); ++i) {
    const Item& item = *items[i];
    CHECK(!item.tokens.empty() || may_lack_tokens, "item ", i, " of the step has no tokens");
    const int64_t end = item.position + std::max<int64_t>(1, int64_t(item.tokens.size()));
    CHECK(item.position >= 0 && end <= options_.context, "item ", i, " covers the positions ", item.position, " to ",
          end, ", the context has ", options_.context);
    CHECK(int64_t(item.pages.size()) * kPageSize >= end, "item ", i, " ends at position ", end, ", its ",
          item.pages.size(), " pages hold ", int64_t(item.pages.size()) * kPageSize);
    for (int32_t token : item.tokens)
      CHECK(token >= 0 && token < config_.vocab, "token ", token, " is outside the vocabulary of ", config_.vocab);
    for (int32_t page : item.pages)
      CHECK(page >= 0 && page < pages(), "page ", page, " is outside the pool of ", pages());
  }
}

bool Passes::next(Batch& batch) {
  before_ += rows_;
  batch = Batch{};
  wanted_.clear();
  while (at_ < items_.size() && batch.rows() < most_) {
    const Item& item = *items_[at_];
    const int64_t left = int64_t(item.tokens.size()) - taken_, count = std::min(left, most_ - batch.rows());
    batch.spans.push_back({batch.rows(), count, item.position + taken_, item.pages.data(), item.prompt});
    batch.tokens.insert(batch.tokens.end(), item.tokens.begin() + taken_, item.tokens.begin() + taken_ + count);
    if (every_row_)
      for (int64_t r = batch.rows() - count; r < batch.rows(); ++r) wanted_.push_back(r);
    else if (count == left && item.sampler) wanted_.push_back(batch.rows() - 1);
    taken_ += count;
    if (count == left) {
      ++at_;
      taken_ = 0;
    }
  }
  rows_ = batch.rows();
  return rows_ > 0;
}

Targets::Targets(const std::vector<const Item*>& items) {
  int64_t written = 0;
  for (const Item* item : items)
    for (size_t i = 0; i < item->tokens.size(); ++i) {
      const bool last = i + 1 == item->tokens.size();
      token.push_back(last ? -1 : item->tokens[i + 1]);
      place.push_back(last ? -1 : written++);
    }
}

void Targets::write(int64_t at, const float* logits, int64_t vocab, float* out) const {
  const int32_t target = token[size_t(at)];
  if (target < 0) return;
  const float top = *std::max_element(logits, logits + vocab);
  double sum = 0;
  for (int64_t i = 0; i < vocab; ++i) sum += double(std::exp(logits[i] - top));
  out[place[size_t(at)]] = top + float(std::log(sum)) - logits[target];
}

}  // namespace halfturn
