// One request's sampler: turns a row of logits into the next token.
#pragma once
#include <cstdint>
#include <unordered_map>
#include <utility>
#include <vector>

namespace halfturn {

struct SamplerOptions {
  float temperature = 1.0f;  // 0: the most probable token
  int64_t top_k = 0;         // 0: off
  float top_p = 1.0f;
  float min_p = 0.0f;               // relative to the most probable token
  float repetition_penalty = 1.0f;  // over prompt and generated tokens
  float presence_penalty = 0.0f;    // over generated tokens
  float frequency_penalty = 0.0f;   // the same, times their count
  std::vector<std::pair<int32_t, float>> logit_bias;
  uint64_t seed = 0;
  int logprobs = -1;            // -1: off; n: of the chosen token and of the n best
  std::vector<int32_t> banned;  // tokens that are never chosen; see Sampler::ban
};

struct Sample {
  int32_t token = 0;
  float logprob = 0.0f;                        // natural log, of the raw logits; 0 where logprobs are off
  std::vector<std::pair<int32_t, float>> top;  // the most probable tokens and their log probabilities, best first
};

// What changes one token's logit, in this order: bias added (-inf: a ban), then divided by the repetition penalty if
// above 0, else multiplied by it, then the penalty subtracted.
struct LogitEdit {
  int32_t token = 0;
  float bias = 0.0f;
  float repetition = 1.0f;
  float penalty = 0.0f;
};

// All that the next choice of a sampler depends on besides the logits.
struct Draw {
  float temperature = 0.0f;
  int64_t top_k = 0;
  float top_p = 1.0f, min_p = 0.0f;
  int logprobs = -1;
  double uniform = 0.0;          // the random number, in [0, 1)
  std::vector<LogitEdit> edits;  // one for each token that has any, in no order
};

// Why there is no choice. check_logits throws Error with its sentence; `largest` is the largest of the raw logits.
enum class LogitsFault : int32_t { kNone, kNotNumbers, kInfinite, kAllBanned };
void check_logits(LogitsFault fault, float largest, int64_t vocab);

class Sampler {
 public:
  // Throws Error naming the option that is out of range.
  explicit Sampler(SamplerOptions options);

  // Tells the sampler the prompt's tokens, for the repetition penalty.
  void accept(const std::vector<int32_t>& tokens);
  // Replaces the tokens whose probability is zero from the next call of sample on.
  void ban(std::vector<int32_t> tokens) { options_.banned = std::move(tokens); }

  // Chooses a token and remembers it. The choice depends on the options, the tokens so far, and the logits only: the
  // random number is a hash of the seed and the number of tokens chosen before. Throws Error if logits are not numbers
  // or no token may be chosen.
  Sample sample(const float* logits, int64_t vocab);

  // The two halves of sample() where the choice is made elsewhere: what to choose with, and what was chosen. `ahead`
  // tokens before it are being chosen and not yet known; throws Error if a penalty has to know them.
  Draw next_draw(int64_t vocab, int ahead = 0) const;
  void took(int32_t token);

  // Whether choices depend on the tokens chosen before.
  bool remembers() const { return penalties_; }
  const SamplerOptions& options() const { return options_; }

 private:
  const float* adjust(const float* logits, int64_t vocab) const;
  double uniform(int ahead = 0) const;

  SamplerOptions options_;
  bool penalties_;                             // any penalty is on, so that tokens are worth remembering
  uint64_t sampled_ = 0;                       // tokens chosen so far
  std::unordered_map<int32_t, int32_t> seen_;  // token -> times it was generated; 0: in the prompt only
};

}  // namespace halfturn
