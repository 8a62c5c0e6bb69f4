// One loaded model on one device, behind plain calls: what bind.cpp hands to Python.
#pragma once
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "batch.h"
#include "cpu/workspace.h"
#include "pages.h"
#include "rope.h"
#include "sampler.h"

namespace halfturn {

struct EngineOptions {
  int threads = 0;  // 0: one per core
  std::string mode = "a8", isa = "auto";
  int k_bits = 8, v_bits = 8;
  int64_t context = 4096;    // positions of one sequence
  int64_t kv_tokens = 4096;  // positions of all sequences together
};

// A token, or the reason why this item got none while the others did.
struct StepResult {
  std::optional<Sample> sample;
  std::string error;
};

class Engine {
 public:
  Engine(const std::string& folder, const EngineOptions& options);

  // Runs the new tokens of every item, and samples where an item has a sampler. Throws Error, before anything is
  // written, for an item out of range.
  std::vector<StepResult> step(const std::vector<const Item*>& items);
  // Writes the logits of every new token, [tokens of all items, vocab], to out.
  void logits(const std::vector<const Item*>& items, float* out);
  // Writes -log p(next token) of all but each item's last token to out.
  void nll(const std::vector<const Item*>& items, float* out);

  const Config& config() const { return net_.config; }
  const std::string& config_json() const { return config_json_; }
  const EngineOptions& options() const { return options_; }
  const Cpu& cpu() const { return cpu_; }
  const KvPool& kv() const { return *kv_; }
  int64_t weight_bytes() const;  // read for every step: decoder and head
  int64_t embed_bytes() const { return net_.embed.codes.bytes() + net_.embed.scales.bytes(); }
  int64_t workspace_bytes() const { return work_->bytes(); }

 private:
  // Called with the logits of `count` consecutive new tokens: their index among all items' tokens, and [count, stride].
  using Consume = std::function<void(int64_t first, int64_t count, const float* logits, int64_t stride)>;
  void check(const std::vector<const Item*>& items) const;
  void run(const std::vector<const Item*>& items, bool every_row, const Consume& consume);

  std::mutex busy_;  // the workspace and the thread pool serve one call at a time
  EngineOptions options_;
  std::string config_json_;
  Cpu cpu_;
  std::shared_ptr<const Checkpoint> checkpoint_;
  Network<Cpu> net_;
  std::unique_ptr<KvPool> kv_;
  std::unique_ptr<Rope> rope_;
  std::unique_ptr<Workspace<Cpu>> work_;
};

}  // namespace halfturn
