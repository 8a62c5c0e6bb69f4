// The engine on the CPU.
#include <algorithm>
#include <cstring>
#include <functional>

#include "../check.h"
#include "../codec/half.h"
#include "../engine.h"
#include "../forward.h"
#include "../pages.h"
#include "../rope.h"
#include "bandwidth.h"
#include "kernels.h"
#include "ops.h"

namespace halfturn {
namespace {

Cpu::Vector load_vector(const View& view) {  // with zeros behind it, to a whole tile
  if (!view) return {};
  const int64_t padded = round_up(view.elements(), kTile);
  Cpu::Vector vector{cpu::buffer<float>(padded)};
  std::fill(vector.data.get() + view.elements(), vector.data.get() + padded, 0.0f);
  for (int64_t i = 0; i < view.elements(); ++i) vector.data[i] = half_to_float(view.as<uint16_t>()[i]);
  return vector;
}

// Adds W mean to the bias of W, whose inputs come without it.
void make_up_for_mean(Cpu& cpu, const Cpu::Vector& mean, cpu::Matrix& w) {
  const int64_t scratch_bytes = round_up(cpu::matmul_scratch(w), 64);
  const auto scratch = cpu::buffer<uint8_t>(cpu.threads() * scratch_bytes);
  auto bias = cpu::buffer<float>(w.n_tiles * kTile);
  cpu::Activations x;
  x.rows = 1;
  x.stride = w.k_tiles * kTile;
  x.values = mean.data.get();
  cpu.parallel(w.n_tiles, [&](int64_t tile, int thread) {
    cpu.kernels().matmul_f16(w, x, tile, 1, {bias.get(), 0, false}, scratch.get() + thread * scratch_bytes);
  });
  w.bias = std::move(bias);
}

Network<Cpu> load_network(Cpu& cpu, const Model& model, bool a8) {
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
  const auto norm = [&](const Norm& norm, std::initializer_list<cpu::Matrix*> readers) {
    NetworkNorm<Cpu> loaded{load_vector(norm.weight), a8 ? load_vector(norm.mean) : Cpu::Vector{}};
    if (loaded.mean.data)
      for (cpu::Matrix* reader : readers) make_up_for_mean(cpu, loaded.mean, *reader);
    return loaded;
  };
  net.config = model.config;
  net.embed = model.embed;
  for (const Layer& l : model.layers) {
    net.layers.push_back({{}, {}, pack(l.q), pack(l.k), pack(l.v), pack(l.o), pack(l.gate), pack(l.up), pack(l.down)});
    NetworkLayer<Cpu>& layer = net.layers.back();
    layer.attention_norm = norm(l.attention_norm, {&layer.q, &layer.k, &layer.v});
    layer.mlp_norm = norm(l.mlp_norm, {&layer.gate, &layer.up});
  }
  net.head = pack(model.head);
  net.norm = norm(model.norm, {&net.head});
  return net;
}

class CpuEngine : public Engine {
 public:
  CpuEngine(const Model& model, const EngineOptions& options)
      : Engine(model, options), cpu_(options.threads, isa_from_name(options.isa)) {
    const Config& c = model.config;
    kv_ = std::make_unique<KvPool>(c.layers, c.kv_heads, c.head_dim, options.k_bits, options.v_bits,
                                   (options.kv_tokens + kPageSize - 1) / kPageSize, c.rotated);
    net_ = load_network(cpu_, model, options.mode == "a8");
    rope_ = std::make_unique<Rope>(c, options.context);
    work_ = std::make_unique<Workspace<Cpu>>(cpu_, net_, *kv_, options.mode == "a8");
  }

  std::vector<StepResult> step(const std::vector<const Item*>& items) override;
  void logits(const std::vector<const Item*>& items, float* out) override;
  void nll(const std::vector<const Item*>& items, float* out) override;

  int64_t pages() const override { return kv_->pages(); }
  int64_t weight_bytes() const override {
    int64_t bytes = net_.head.bytes();
    for (const auto& l : net_.layers)
      for (const cpu::Matrix* m : {&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down}) bytes += m->bytes();
    return bytes;
  }
  int64_t embed_bytes() const override { return net_.embed.codes.bytes() + net_.embed.scales.bytes(); }
  int64_t kv_bytes() const override { return kv_->bytes(); }
  int64_t workspace_bytes() const override { return work_->bytes(); }
  std::string device_name() const override { return "cpu"; }
  std::string isa() const override { return isa_name(cpu_.isa()); }
  int threads() const override { return cpu_.threads(); }
  int64_t step_rows() const override { return kMaxRows; }
  double read_bandwidth(int64_t megabytes) const override {
    return halfturn::read_bandwidth(cpu_.threads(), megabytes);
  }

 private:
  // Called with the logits of `count` consecutive new tokens: their index among all items' tokens, and [count, stride].
  using Consume = std::function<void(int64_t first, int64_t count, const float* logits, int64_t stride)>;
  void run(const std::vector<const Item*>& items, bool every_row, const Consume& consume);

  Cpu cpu_;
  Network<Cpu> net_;
  std::unique_ptr<KvPool> kv_;
  std::unique_ptr<Rope> rope_;
  std::unique_ptr<Workspace<Cpu>> work_;
};

void CpuEngine::run(const std::vector<const Item*>& items, bool every_row, const Consume& consume) {
  std::lock_guard lock(busy_);
  check(items);
  Passes passes(items, kMaxRows, every_row);
  for (Batch batch; passes.next(batch);) {
    const std::vector<int64_t>& wanted = passes.wanted();
    forward(cpu_, net_, *rope_, *kv_, batch, *work_);
    for (size_t first = 0; first < wanted.size(); first += kMaxHeadRows) {
      const int64_t count = std::min<int64_t>(kMaxHeadRows, int64_t(wanted.size() - first));
      head(cpu_, net_, wanted.data() + first, count, *work_);
      for (int64_t i = 0, run_length; i < count; i += run_length) {  // consecutive rows together
        run_length = 1;
        while (i + run_length < count &&
               wanted[first + size_t(i + run_length)] == wanted[first + size_t(i)] + run_length)
          ++run_length;
        consume(passes.before() + wanted[first + size_t(i)], run_length, work_->logits.get() + i * work_->vocab,
                work_->vocab);
      }
    }
  }
}

std::vector<StepResult> CpuEngine::step(const std::vector<const Item*>& items) {
  std::vector<StepResult> results(items.size());
  std::vector<int64_t> ends;  // index of each item's last token
  for (const Item* item : items) ends.push_back((ends.empty() ? -1 : ends.back()) + int64_t(item->tokens.size()));
  run(items, false, [&](int64_t first, int64_t count, const float* logits, int64_t stride) {
    cpu_.parallel(count, [&](int64_t i, int) {
      const size_t item = size_t(std::lower_bound(ends.begin(), ends.end(), first + i) - ends.begin());
      try {
        results[item].sample = items[item]->sampler->sample(logits + i * stride, config().vocab);
      } catch (const std::exception& error) {  // must not leave a worker thread
        results[item].error = error.what();
      }
    });
  });
  return results;
}

void CpuEngine::logits(const std::vector<const Item*>& items, float* out) {
  const int64_t vocab = config().vocab;
  run(items, true, [&](int64_t first, int64_t count, const float* logits, int64_t stride) {
    cpu_.parallel(count, [&](int64_t i, int) {
      std::memcpy(out + (first + i) * vocab, logits + i * stride, size_t(vocab) * sizeof(float));
    });
  });
}

void CpuEngine::nll(const std::vector<const Item*>& items, float* out) {
  const Targets targets(items);
  run(items, true, [&](int64_t first, int64_t count, const float* logits, int64_t stride) {
    cpu_.parallel(count, [&](int64_t i, int) { targets.write(first + i, logits + i * stride, config().vocab, out); });
  });
}

}  // namespace

std::unique_ptr<Engine> open_cpu_engine(const Model& model, const EngineOptions& options) {
  return std::make_unique<CpuEngine>(model, options);
}

}  // namespace halfturn
