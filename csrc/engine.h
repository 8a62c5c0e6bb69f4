// One loaded model on one device, behind plain calls: what bind.cpp hands to Python.
#pragma once
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "batch.h"
#include "model.h"
#include "network.h"
#include "sampler.h"

namespace halfturn {

struct EngineOptions {
  std::string device = "cpu";  // or "cuda"
  int threads = 0;             // of the CPU; 0: one per core
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
  // Loads a checkpoint folder. Throws Error for what is wrong with it, with the options, or with the device.
  static std::unique_ptr<Engine> open(const std::string& folder, const EngineOptions& options);
  virtual ~Engine() = default;

  // Runs the new tokens of every item, and samples where an item has a sampler. Throws Error, before anything is
  // written, for an item out of range.
  virtual std::vector<StepResult> step(const std::vector<const Item*>& items) = 0;
  // The same in halves, for devices that work while the host does something else: start() begins a step of at most
  // overlap_rows() sequences that decode, finish() waits for the oldest one that was begun. Two may be under way. An
  // item without tokens has the one that its sampler draws in the step begun before.
  virtual int64_t overlap_rows() const { return 0; }  // 0: this device has no halves
  virtual void start(const std::vector<const Item*>& items);
  virtual std::vector<StepResult> finish();
  // Writes the logits of every new token, [tokens of all items, vocab], to out.
  virtual void logits(const std::vector<const Item*>& items, float* out) = 0;
  // Writes -log p(next token) of all but each item's last token to out.
  virtual void nll(const std::vector<const Item*>& items, float* out) = 0;

  virtual int64_t pages() const = 0;         // of the KV cache
  virtual int64_t weight_bytes() const = 0;  // read for every step: decoder and head
  virtual int64_t embed_bytes() const = 0;
  virtual int64_t kv_bytes() const = 0;
  virtual int64_t workspace_bytes() const = 0;
  virtual std::string device_name() const = 0;  // "cpu", or the card
  virtual std::string isa() const = 0;          // the instruction set, or the card's architecture ("sm_89")
  virtual int threads() const = 0;
  virtual int64_t step_rows() const = 0;  // new tokens that one pass takes; more of them need several
  // Whether drawn tokens go through other kernels than a prompt's, and so leave keys and values with other last bits.
  virtual bool decodes_apart() const { return false; }
  virtual double read_bandwidth(int64_t megabytes) const = 0;  // bytes a second, measured now

  const Config& config() const { return config_; }
  const EngineOptions& options() const { return options_; }

 protected:
  // Throws Error for an option that this model doesn't allow.
  Engine(const Model& model, const EngineOptions& options);
  void check(const std::vector<const Item*>& items, bool may_lack_tokens = false) const;

  std::mutex busy_;  // the device serves one call at a time

 private:
  EngineOptions options_;
  Config config_;
  std::shared_ptr<const Checkpoint> checkpoint_;
};

// A step's items as passes of at most `most` rows, in order.
class Passes {
 public:
  Passes(const std::vector<const Item*>& items, int64_t most, bool every_row)
      : items_(items), most_(most), every_row_(every_row) {}
  // The next pass, or false when all rows have been taken.
  bool next(Batch& batch);
  // Its rows whose logits are wanted.
  const std::vector<int64_t>& wanted() const { return wanted_; }
  int64_t before() const { return before_; }  // tokens of all items before this pass

 private:
  const std::vector<const Item*>& items_;
  int64_t most_;
  bool every_row_;
  size_t at_ = 0;      // the item whose tokens come next
  int64_t taken_ = 0;  // tokens of it that earlier passes took
  int64_t before_ = 0, rows_ = 0;
  std::vector<int64_t> wanted_;
};

// What the next token of every new token is, -1 behind an item's last; and where its value goes among all of them.
struct Targets {
  std::vector<int32_t> token;
  std::vector<int64_t> place;
  explicit Targets(const std::vector<const Item*>& items);
  // out[place] <- -log p of what comes behind the new token `at`, whose logits these are.
  void write(int64_t at, const float* logits, int64_t vocab, float* out) const;
};

std::unique_ptr<Engine> open_cpu_engine(const Model& model, const EngineOptions& options);
std::unique_ptr<Engine> open_cuda_engine(const Model& model, const EngineOptions& options);
std::string cuda_problem();  // why no card can be used; empty where one can
int64_t cuda_free_memory();  // bytes on the card that "cuda" takes

}  // namespace halfturn
