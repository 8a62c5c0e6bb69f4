// Sampling on the card: rows of logits become token ids there, by the rules of csrc/sampler.cpp. Includes nothing of
// CUDA's.
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "../sampler.h"
#include "cuda.h"

namespace halfturn::cuda {

constexpr int kMaxLogprobs = 20;
constexpr int kMaxVocab = 1 << 19;  // weights are summed as 64-bit integers: see sample.cu

// What one row is sampled with, made on the host for each step; the edits are a range of the step's array.
struct SampleSettings {
  float temperature = 0;
  int32_t top_k = 0;  // 0: off
  float top_p = 1, min_p = 0;
  double uniform = 0;  // the random number of this draw
  int32_t logprobs = -1;
  int32_t first_edit = 0, edits = 0;
  int32_t padding = 0;
};

struct SampleResult {
  int32_t token = 0;
  LogitsFault fault = LogitsFault::kNone;
  float largest = 0;  // of the raw logits, for the error's sentence
  float logprob = 0;
  int32_t top_tokens[kMaxLogprobs] = {};  // best first; -1 behind the last
  float top_logprobs[kMaxLogprobs] = {};
};

// Bytes of work space, which needs no initial contents.
int64_t sample_workspace_bytes(int rows, int vocab);

// Chooses one token for each row of logits [rows, stride]. All pointers are the card's. The launches are the same
// whatever the settings are: a greedy row leaves the later ones at once. The logits stay as they are.
void sample(const Cuda& device, const float* logits, int64_t stride, int rows, int vocab,
            const SampleSettings* settings, const LogitEdit* edits, void* workspace, SampleResult* results);

// A sampler's next draw as the card reads it; its edits go to the end of `edits`.
inline SampleSettings settings_of(const Draw& draw, std::vector<LogitEdit>& edits) {
  SampleSettings s;
  s.temperature = draw.temperature;
  s.top_k = int32_t(std::min<int64_t>(draw.top_k, std::numeric_limits<int32_t>::max()));
  s.top_p = draw.top_p;
  s.min_p = draw.min_p;
  s.uniform = draw.uniform;
  s.logprobs = draw.logprobs;
  s.first_edit = int32_t(edits.size());
  s.edits = int32_t(draw.edits.size());
  edits.insert(edits.end(), draw.edits.begin(), draw.edits.end());
  return s;
}

// What Sampler::sample returns, from the card's result; the sampler remembers the token. Throws Error as it does.
inline Sample finish(Sampler& sampler, const SampleResult& result, int64_t vocab) {
  check_logits(result.fault, result.largest, vocab);
  Sample sample;
  sample.token = result.token;
  sample.logprob = result.logprob;
  for (int i = 0; i < sampler.options().logprobs && result.top_tokens[i] >= 0; ++i)
    sample.top.emplace_back(result.top_tokens[i], result.top_logprobs[i]);
  sampler.took(sample.token);
  return sample;
}

}  // namespace halfturn::cuda
