#include "engine.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "check.h"
#include "codec/half.h"
#include "cpu/kernels.h"
#include "forward.h"

namespace halfturn {
namespace {

Cpu::Vector load_vector(const View& view) {
  Cpu::Vector vector{cpu::buffer<float>(view.elements())};
  for (int64_t i = 0; i < view.elements(); ++i) vector.data[i] = half_to_float(view.as<uint16_t>()[i]);
  return vector;
}

Network<Cpu> load_network(Cpu& cpu, const Model& model) {
  Network<Cpu> net;
  int64_t bytes = cpu::packed_bytes(model.head);
  for (const Layer& l : model.layers)
    for (const Linear* linear : {&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down}) bytes += cpu::packed_bytes(*linear);
  net.arena = std::make_unique<cpu::Arena>(bytes);
  auto pack = [&](const Linear& linear) {
    cpu::Matrix packed = cpu::pack(cpu, linear, cpu.kernels().offset, *net.arena);
    release(model, linear.codes);  // the file's copy is not read again
    return packed;
  };
  net.config = model.config;
  net.embed = model.embed;
  for (const Layer& l : model.layers)
    net.layers.push_back({load_vector(l.attention_norm), load_vector(l.mlp_norm), pack(l.q), pack(l.k), pack(l.v),
                          pack(l.o), pack(l.gate), pack(l.up), pack(l.down)});
  net.norm = load_vector(model.norm);
  net.head = pack(model.head);
  return net;
}

float log_sum_exp(const float* logits, int64_t size) {
  const float top = *std::max_element(logits, logits + size);
  double sum = 0;
  for (int64_t i = 0; i < size; ++i) sum += std::exp(logits[i] - top);
  return top + float(std::log(sum));
}

}  // namespace

Engine::Engine(const std::string& folder, const EngineOptions& options)
    : options_(options), cpu_(options.threads, isa_from_name(options.isa)) {
  CHECK(options.mode == "a8" || options.mode == "f16", "mode is \"", options.mode, "\", it must be a8 or f16");
  const Model model = load_model(folder);
  const Config& c = model.config;
  CHECK(options.context >= 1 && options.context <= c.context_limit(), "context is ", options.context,
        ", this model has positions for 1 to ", c.context_limit());
  CHECK(options.kv_tokens >= 1 && options.kv_tokens <= int64_t(1) << 31, "kv_tokens is ", options.kv_tokens,
        ", it must be between 1 and ", int64_t(1) << 31);
  config_json_ = model.config_json;
  checkpoint_ = model.checkpoint;
  kv_ = std::make_unique<KvPool>(c.layers, c.kv_heads, c.head_dim, options.k_bits, options.v_bits,
                                 (options.kv_tokens + kPageSize - 1) / kPageSize, c.rotated);
  net_ = load_network(cpu_, model);
  rope_ = std::make_unique<Rope>(c, options.context);
  work_ = std::make_unique<Workspace<Cpu>>(cpu_, net_, *kv_, options.mode == "a8");
}

int64_t Engine::weight_bytes() const {
  int64_t bytes = net_.head.bytes();
  for (const auto& l : net_.layers)
    for (const cpu::Matrix* m : {&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down}) bytes += m->bytes();
  return bytes;
}

void Engine::check(const std::vector<const Item*>& items) const {
  for (size_t i = 0; i < items.size(); ++i) {
    const Item& item = *items[i];
    const int64_t end = item.position + int64_t(item.tokens.size());
    CHECK(!item.tokens.empty(), "item ", i, " of the step has no tokens");
    CHECK(item.position >= 0 && end <= options_.context, "item ", i, " covers the positions ", item.position, " to ",
          end, ", the context has ", options_.context);
    CHECK(int64_t(item.pages.size()) * kPageSize >= end, "item ", i, " ends at position ", end, ", its ",
          item.pages.size(), " pages hold ", int64_t(item.pages.size()) * kPageSize);
    for (int32_t token : item.tokens)
      CHECK(token >= 0 && token < net_.config.vocab, "token ", token, " is outside the vocabulary of ",
            net_.config.vocab);
    for (int32_t page : item.pages)
      CHECK(page >= 0 && page < kv_->pages(), "page ", page, " is outside the pool of ", kv_->pages());
  }
}

void Engine::run(const std::vector<const Item*>& items, bool every_row, const Consume& consume) {
  std::lock_guard lock(busy_);
  check(items);
  size_t at = 0;       // the item whose tokens come next
  int64_t taken = 0;   // tokens of it that earlier passes took
  int64_t before = 0;  // tokens of all items before this pass
  while (at < items.size()) {
    Batch batch;
    std::vector<int64_t> wanted;  // rows whose logits are asked for
    while (at < items.size() && batch.rows() < kMaxRows) {
      const Item& item = *items[at];
      const int64_t left = int64_t(item.tokens.size()) - taken, count = std::min(left, kMaxRows - batch.rows());
      batch.spans.push_back({batch.rows(), count, item.position + taken, item.pages.data()});
      batch.tokens.insert(batch.tokens.end(), item.tokens.begin() + taken, item.tokens.begin() + taken + count);
      if (every_row)
        for (int64_t r = batch.rows() - count; r < batch.rows(); ++r) wanted.push_back(r);
      else if (count == left && item.sampler) wanted.push_back(batch.rows() - 1);
      taken += count;
      if (count == left) {
        ++at;
        taken = 0;
      }
    }
    forward(cpu_, net_, *rope_, *kv_, batch, *work_);
    for (size_t first = 0; first < wanted.size(); first += kMaxHeadRows) {
      const int64_t count = std::min<int64_t>(kMaxHeadRows, int64_t(wanted.size() - first));
      head(cpu_, net_, wanted.data() + first, count, *work_);
      for (int64_t i = 0, run_length; i < count; i += run_length) {  // consecutive rows together
        run_length = 1;
        while (i + run_length < count &&
               wanted[first + size_t(i + run_length)] == wanted[first + size_t(i)] + run_length)
          ++run_length;
        consume(before + wanted[first + size_t(i)], run_length, work_->logits.get() + i * work_->vocab, work_->vocab);
      }
    }
    before += batch.rows();
  }
}

std::vector<StepResult> Engine::step(const std::vector<const Item*>& items) {
  std::vector<StepResult> results(items.size());
  std::vector<int64_t> ends;  // index of each item's last token
  for (const Item* item : items) ends.push_back((ends.empty() ? -1 : ends.back()) + int64_t(item->tokens.size()));
  run(items, false, [&](int64_t first, int64_t count, const float* logits, int64_t stride) {
    cpu_.parallel(count, [&](int64_t i, int) {
      const size_t item = size_t(std::lower_bound(ends.begin(), ends.end(), first + i) - ends.begin());
      try {
        results[item].sample = items[item]->sampler->sample(logits + i * stride, net_.config.vocab);
      } catch (const std::exception& error) {  // must not leave a worker thread
        results[item].error = error.what();
      }
    });
  });
  return results;
}

void Engine::logits(const std::vector<const Item*>& items, float* out) {
  const int64_t vocab = net_.config.vocab;
  run(items, true, [&](int64_t first, int64_t count, const float* logits, int64_t stride) {
    cpu_.parallel(count, [&](int64_t i, int) {
      std::memcpy(out + (first + i) * vocab, logits + i * stride, size_t(vocab) * sizeof(float));
    });
  });
}

void Engine::nll(const std::vector<const Item*>& items, float* out) {
  std::vector<int32_t> targets;  // the token that follows each token, -1 behind an item's last
  std::vector<int64_t> where;    // where its value goes
  int64_t written = 0;
  for (const Item* item : items)
    for (size_t i = 0; i < item->tokens.size(); ++i) {
      const bool last = i + 1 == item->tokens.size();
      targets.push_back(last ? -1 : item->tokens[i + 1]);
      where.push_back(last ? -1 : written++);
    }
  run(items, true, [&](int64_t first, int64_t count, const float* logits, int64_t stride) {
    cpu_.parallel(count, [&](int64_t i, int) {
      const size_t row = size_t(first + i);
      const float* l = logits + i * stride;
      if (targets[row] >= 0) out[where[row]] = log_sum_exp(l, net_.config.vocab) - l[targets[row]];
    });
  });
}

}  // namespace halfturn
