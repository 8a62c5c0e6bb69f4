#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <iterator>
#include <limits>

#include "check.h"
#include "cpu/cpu.h"
#include "cpu/kernels.h"

// Comparing is bound by memory, for which four lanes do; exponentials come from the kernels.
#define HALFTURN_ISA sampling
#include "cpu/simd.h"

namespace halfturn {

namespace {

using namespace sampling;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kBlock = kSumBlock;  // logits whose maximum or sum is kept

struct Candidate {
  float weight;  // a logit or something proportional to the probability
  int32_t token;
};

// Best first; equal ones in the order of their ids.
bool better(const Candidate& a, const Candidate& b) {
  return a.weight != b.weight ? a.weight > b.weight : a.token < b.token;
}

// Work space of one thread, kept between calls.
struct Work {
  std::vector<float> adjusted, weights, maxima, ordered;
  std::vector<double> sums;
  std::vector<Candidate> candidates;
};
thread_local Work work;

bool any(I mask) {
  int64_t halves[sizeof(I) / 8], all = 0;
  std::memcpy(halves, &mask, sizeof(I));
  for (int64_t half : halves) all |= half;
  return all != 0;
}

// Largest number, ignoring NaN; and whether there is a NaN.
struct Peak {
  float maximum = -kInfinity;
  bool nan = false;
};
Peak find_peak(const float* x, int64_t size) {
  F largest[4] = {splat(-kInfinity), splat(-kInfinity), splat(-kInfinity), splat(-kInfinity)};
  I nan{};
  int64_t i = 0;
  for (; i + 4 * kWidth <= size; i += 4 * kWidth)
    for (int s = 0; s < 4; ++s) {
      F v = load(x + i + s * kWidth);
      largest[s] = max(v, largest[s]);  // of (NaN, b) it takes b
      nan |= v != v;
    }
  Peak peak{maximum(max(max(largest[0], largest[1]), max(largest[2], largest[3]))), any(nan)};
  for (; i < size; ++i) {
    peak.nan |= std::isnan(x[i]);
    peak.maximum = x[i] > peak.maximum ? x[i] : peak.maximum;
  }
  return peak;
}

// Calls found(i) for every x[i] >= cut in [begin, end), in order.
template <class Found>
void at_least(const float* x, int64_t begin, int64_t end, float cut, Found&& found) {
  int64_t i = begin;
  for (; i + 4 * kWidth <= end; i += 4 * kWidth) {
    I hit{};
    for (int s = 0; s < 4; ++s) hit |= load(x + i + s * kWidth) >= splat(cut);
    if (any(hit))
      for (int64_t j = i; j < i + 4 * kWidth; ++j)
        if (x[j] >= cut) found(j);
  }
  for (; i < end; ++i)
    if (x[i] >= cut) found(i);
}

int32_t first_of(const float* x, int64_t size, float value) {
  for (int64_t begin = 0; begin < size; begin += 1024) {
    int64_t at = size;
    at_least(x, begin, std::min(size, begin + 1024), value, [&](int64_t i) { at = std::min(at, i); });
    if (at < size) return int32_t(at);
  }
  return 0;
}

// The `count` largest of x that are not -inf, best first. The count-th largest of the blocks' maxima is a lower bound
// of the count-th largest element, so that few elements are looked at twice.
void find_best(const float* x, int64_t size, int64_t count, std::vector<Candidate>& best) {
  best.clear();
  const int64_t blocks = (size + kBlock - 1) / kBlock;
  work.maxima.resize(size_t(blocks));
  for (int64_t b = 0; b < blocks; ++b)
    work.maxima[size_t(b)] = find_peak(x + b * kBlock, std::min(kBlock, size - b * kBlock)).maximum;
  float cut = std::numeric_limits<float>::lowest();
  if (count <= blocks) {
    work.ordered = work.maxima;
    std::nth_element(work.ordered.begin(), work.ordered.begin() + count - 1, work.ordered.end(), std::greater<>());
    cut = std::max(cut, work.ordered[size_t(count) - 1]);
  }
  for (int64_t b = 0; b < blocks; ++b)
    if (work.maxima[size_t(b)] >= cut)
      at_least(x, b * kBlock, std::min(size, (b + 1) * kBlock), cut,
               [&](int64_t i) { best.push_back({x[i], int32_t(i)}); });
  if (int64_t(best.size()) > count) {
    std::nth_element(best.begin(), best.begin() + count, best.end(), better);
    best.resize(size_t(count));
  }
  std::sort(best.begin(), best.end(), better);
}

float weight_of(float logit, float maximum, float temperature) {
  float lanes[kWidth];
  store(lanes, exp(splat((logit - maximum) / temperature)));
  return lanes[0];
}

// Leaves the smallest set of best candidates whose weights (0 < weight <= 1) reach `mass`; all of them if they do not.
// Candidates are put into buckets by the leading bits of their weights, so that only those of one bucket need sorting.
void keep_nucleus(std::vector<Candidate>& candidates, double mass) {
  constexpr int kShift = 18;  // 32 buckets per power of two
  double masses[(0x3f800000 >> kShift) + 1] = {};
  const auto bucket_of = [](const Candidate& c) {
    uint32_t bits;
    std::memcpy(&bits, &c.weight, sizeof bits);
    return int(bits >> kShift);
  };
  for (const Candidate& c : candidates) masses[bucket_of(c)] += double(c.weight);

  int edge = int(std::size(masses)) - 1;
  double reached = 0;
  while (edge >= 0 && reached + masses[edge] < mass) reached += masses[edge--];
  if (edge < 0) return;

  const auto inside = std::stable_partition(candidates.begin(), candidates.end(),
                                            [&](const Candidate& c) { return bucket_of(c) > edge; });
  const auto last = std::partition(inside, candidates.end(), [&](const Candidate& c) { return bucket_of(c) == edge; });
  std::sort(inside, last, better);
  auto end = inside;
  while (end != last && reached < mass) reached += double((end++)->weight);
  candidates.erase(end, candidates.end());
}

int32_t pick(const std::vector<Candidate>& candidates, double uniform) {
  double total = 0;
  for (const Candidate& c : candidates) total += double(c.weight);
  double left = uniform * total;
  for (const Candidate& c : candidates)
    if ((left -= double(c.weight)) < 0) return c.token;
  return candidates.front().token;  // rounding: u * total was not below the running sum
}

// From all tokens: first the block, then the token inside it.
int32_t pick(const float* weights, const double* sums, int64_t size, double total, double uniform) {
  double left = uniform * total;
  int64_t block = 0, last = (size + kBlock - 1) / kBlock - 1;
  while (block < last && left >= sums[block]) left -= sums[block++];
  int64_t chosen = -1;
  for (int64_t i = block * kBlock; i < std::min(size, (block + 1) * kBlock); ++i)
    if (weights[i] > 0) {
      chosen = i;
      if ((left -= double(weights[i])) < 0) break;
    }
  while (chosen < 0 || !(weights[chosen] > 0))
    chosen = (chosen < 0 ? block * kBlock : chosen) - 1;  // an empty last block
  return int32_t(chosen);
}

int32_t draw(const SamplerOptions& o, const float* logits, int64_t vocab, float maximum, double uniform) {
  std::vector<Candidate>& candidates = work.candidates;
  double total = 0;
  if (o.top_k > 0 && o.top_k < vocab) {
    find_best(logits, vocab, o.top_k, candidates);
    for (Candidate& c : candidates) total += double(c.weight = weight_of(c.weight, maximum, o.temperature));
    if (o.min_p > 0) std::erase_if(candidates, [&](const Candidate& c) { return c.weight < o.min_p; });
  } else {
    work.weights.resize(size_t(vocab));
    work.sums.resize(size_t((vocab + kBlock - 1) / kBlock));
    total = best_kernels().exponentials(logits, vocab, maximum, o.temperature, work.weights.data(), work.sums.data());
    if (o.top_p == 1.0f && o.min_p == 0.0f) return pick(work.weights.data(), work.sums.data(), vocab, total, uniform);
    // Tokens below this weight together have less than 1 - top_p of the mass, so none of them is in the nucleus.
    const float outside = float((1.0 - double(o.top_p)) * total / double(vocab));
    const float cut = std::max({outside, o.min_p, std::numeric_limits<float>::min()});
    candidates.clear();
    at_least(work.weights.data(), 0, vocab, cut,
             [&](int64_t i) { candidates.push_back({work.weights[size_t(i)], int32_t(i)}); });
  }
  if (o.top_p < 1.0f) keep_nucleus(candidates, double(o.top_p) * total);
  return pick(candidates, uniform);
}

uint64_t mix(uint64_t x) {  // the output function of splitmix64
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

void check_token(int32_t token, int64_t vocab, const char* what) {
  CHECK(token >= 0 && token < vocab, what, " names token ", token, ", but the vocabulary has ", vocab, " tokens");
}

}  // namespace

void check_logits(LogitsFault fault, float largest, int64_t vocab) {
  CHECK(fault != LogitsFault::kNotNumbers,
        "the model returned logits that are not numbers: its weights or scales are broken");
  CHECK(fault != LogitsFault::kInfinite, "the largest of the model's ", vocab, " logits is ", largest,
        ": its weights or scales are broken");
  CHECK(fault != LogitsFault::kAllBanned, "every one of the ", vocab, " tokens is banned, so that none can be chosen");
}

Sampler::Sampler(SamplerOptions options) : options_(std::move(options)) {
  const SamplerOptions& o = options_;
  CHECK(std::isfinite(o.temperature) && o.temperature >= 0, "temperature is ", o.temperature,
        ": use 0 (greedy) or more");
  CHECK(o.top_k >= 0, "top_k is ", o.top_k, ": use 0 (off) or the number of tokens to keep");
  CHECK(o.top_p > 0 && o.top_p <= 1, "top_p is ", o.top_p, ": use more than 0, and 1 for off");
  CHECK(o.min_p >= 0 && o.min_p <= 1, "min_p is ", o.min_p, ": use 0 (off) to 1");
  CHECK(std::isfinite(o.repetition_penalty) && o.repetition_penalty > 0, "repetition_penalty is ", o.repetition_penalty,
        ": use more than 0, and 1 for off");
  CHECK(std::isfinite(o.presence_penalty) && std::isfinite(o.frequency_penalty), "presence_penalty is ",
        o.presence_penalty, " and frequency_penalty ", o.frequency_penalty, ": both must be finite");
  CHECK(o.logprobs >= -1 && o.logprobs <= 20, "logprobs is ", o.logprobs, ": use 0 to 20, or -1 for off");
  for (const auto& [token, bias] : o.logit_bias)
    CHECK(bias < kInfinity, "logit_bias of token ", token, " is ", bias, ": use a finite number");
  penalties_ = o.repetition_penalty != 1.0f || o.presence_penalty != 0.0f || o.frequency_penalty != 0.0f;
}

void Sampler::accept(const std::vector<int32_t>& tokens) {
  if (penalties_)
    for (int32_t token : tokens) seen_.try_emplace(token, 0);
}

const float* Sampler::adjust(const float* logits, int64_t vocab) const {
  const SamplerOptions& o = options_;
  if (o.logit_bias.empty() && o.banned.empty() && seen_.empty()) return logits;
  work.adjusted.assign(logits, logits + vocab);
  for (const auto& [token, bias] : o.logit_bias) {
    check_token(token, vocab, "logit_bias");
    work.adjusted[size_t(token)] += bias;
  }
  for (int32_t token : o.banned) {
    check_token(token, vocab, "a ban");
    work.adjusted[size_t(token)] = -kInfinity;
  }
  for (const auto& [token, times] : seen_) {
    check_token(token, vocab, "the prompt");
    float& logit = work.adjusted[size_t(token)];
    logit = logit > 0 ? logit / o.repetition_penalty : logit * o.repetition_penalty;
    if (times > 0) logit -= o.presence_penalty + o.frequency_penalty * float(times);
    logit = std::min(logit, std::numeric_limits<float>::max());  // small penalties make large numbers
  }
  return work.adjusted.data();
}

double Sampler::uniform(int ahead) const {
  constexpr uint64_t kStep = 0x9e3779b97f4a7c15;
  const uint64_t bits = mix(mix(options_.seed + kStep) + (sampled_ + 1 + uint64_t(ahead)) * kStep);
  return double(bits >> 11) * 0x1p-53;
}

Sample Sampler::sample(const float* logits, int64_t vocab) {
  const Peak raw = find_peak(logits, vocab);
  const LogitsFault broken = raw.nan                       ? LogitsFault::kNotNumbers
                             : !std::isfinite(raw.maximum) ? LogitsFault::kInfinite
                                                           : LogitsFault::kNone;
  check_logits(broken, raw.maximum, vocab);
  const float* adjusted = adjust(logits, vocab);
  const float maximum = adjusted == logits ? raw.maximum : find_peak(adjusted, vocab).maximum;
  check_logits(maximum > -kInfinity ? LogitsFault::kNone : LogitsFault::kAllBanned, raw.maximum, vocab);

  Sample result;
  result.token = options_.temperature == 0 ? first_of(adjusted, vocab, maximum)
                                           : draw(options_, adjusted, vocab, maximum, uniform());
  if (options_.logprobs >= 0) {
    const double log_sum =
        double(raw.maximum) + std::log(best_kernels().exponentials(logits, vocab, raw.maximum, 1.0f, nullptr, nullptr));
    result.logprob = float(double(logits[result.token]) - log_sum);
    if (options_.logprobs > 0) {
      find_best(logits, vocab, options_.logprobs, work.candidates);
      for (const Candidate& c : work.candidates) result.top.emplace_back(c.token, float(double(c.weight) - log_sum));
    }
  }
  took(result.token);
  return result;
}

Draw Sampler::next_draw(int64_t vocab, int ahead) const {
  const SamplerOptions& o = options_;
  CHECK(ahead == 0 || !penalties_, "a sampler with penalties has to know the ", ahead, " tokens before its next one");
  Draw draw{o.temperature, o.top_k, o.top_p, o.min_p, o.logprobs, uniform(ahead), {}};
  std::unordered_map<int32_t, size_t> places;  // of the tokens that a bias or a ban names
  const auto edit_of = [&](int32_t token, const char* what) -> LogitEdit& {
    check_token(token, vocab, what);
    const auto [place, added] = places.try_emplace(token, draw.edits.size());
    if (added) draw.edits.push_back({token});
    return draw.edits[place->second];
  };
  for (const auto& [token, bias] : o.logit_bias) edit_of(token, "logit_bias").bias += bias;
  for (int32_t token : o.banned) edit_of(token, "a ban").bias = -kInfinity;
  draw.edits.reserve(draw.edits.size() + seen_.size());
  for (const auto& [token, times] : seen_) {
    check_token(token, vocab, "the prompt");
    const auto place = places.find(token);
    if (place == places.end()) draw.edits.push_back({token});
    LogitEdit& edit = place == places.end() ? draw.edits.back() : draw.edits[place->second];
    edit.repetition = o.repetition_penalty;
    if (times > 0) edit.penalty = o.presence_penalty + o.frequency_penalty * float(times);
  }
  return draw;
}

void Sampler::took(int32_t token) {
  ++sampled_;
  if (penalties_) ++seen_[token];
}

}  // namespace halfturn
