// The engine on a card. A step of decoding is one CUDA graph: the same launches for every step of as many rows.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <deque>
#include <map>
#include <numeric>
#include <thread>

#include "../check.h"
#include "../engine.h"
#include "../forward.h"
#include "event.h"
#include "loader.h"
#include "ops.h"
#include "rows.h"
#include "status.h"

namespace halfturn {

namespace {

using namespace cuda;
using Work = Workspace<Cuda>;

int loader_threads() { return int(std::clamp(std::thread::hardware_concurrency(), 1u, 8u)); }

int64_t whole_pages(int64_t tokens) { return (tokens + kPageSize - 1) / kPageSize; }

// Throws Error with the bytes of each part if a model doesn't fit the card.
void check_room(const Cuda& device, const Model& model, const EngineOptions& o) {
  const Config& c = model.config;
  const KvView kv = KvCache::view_of(c, o.k_bits, o.v_bits);
  const bool a8 = o.mode == "a8";
  const int64_t weights = network_bytes(model, a8), pages = whole_pages(o.kv_tokens), cache = kv.page_bytes * pages;
  const int64_t work = Work(c, kv, o.context, a8, false).bytes() + o.context * c.head_dim * 4;
  const int64_t free = device.memory().first, left = free - weights - work;
  const int64_t fits = std::max<int64_t>(0, left / kv.page_bytes) * kPageSize;
  CHECK(weights + cache + work <= free, "the model doesn't fit the card ", device.name(), ": weights ", weights,
        " bytes, KV cache of ", o.kv_tokens, " tokens ", cache, ", workspace ", work, ", together ",
        weights + cache + work, "; free are ", free,
        fits > 0 ? sentence(": a KV cache of ", fits, " tokens would fit (kv_tokens, context)")
                 : std::string(": use fewer bits per weight, or device=\"cpu\""));
}

class CudaEngine : public Engine {
 public:
  CudaEngine(const Model& model, const EngineOptions& options)
      : Engine(model, options),
        kv_((check_room(device_, model, options), model.config), options.k_bits, options.v_bits,
            whole_pages(options.kv_tokens)),
        net_(load_network(device_, model, options.mode == "a8", loader_threads())),
        rope_(device_, model.config, options.context),
        work_(model.config, kv_.view(), options.context, options.mode == "a8"),
        edits_(kEdits, "changes of logits") {}
  ~CudaEngine() override {
    cudaStreamSynchronize(device_.stream());  // steps may be under way
    for (auto& [key, graph] : graphs_) cudaGraphExecDestroy(graph);
  }

  std::vector<StepResult> step(const std::vector<const Item*>& items) override;
  int64_t overlap_rows() const override { return kGraphRows; }
  void start(const std::vector<const Item*>& items) override;
  std::vector<StepResult> finish() override;
  void logits(const std::vector<const Item*>& items, float* out) override;
  void nll(const std::vector<const Item*>& items, float* out) override;

  int64_t pages() const override { return kv_.pages(); }
  int64_t weight_bytes() const override {
    int64_t bytes = net_.head.bytes();
    for (const auto& l : net_.layers)
      for (const Matrix* m : {&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down}) bytes += m->bytes();
    return bytes;
  }
  int64_t embed_bytes() const override { return net_.embedding.bytes(); }
  int64_t kv_bytes() const override { return kv_.bytes(); }
  int64_t workspace_bytes() const override { return work_.bytes() + rope_.bytes() + edits_.bytes(); }
  std::string device_name() const override { return device_.name(); }
  std::string isa() const override { return sentence("sm_", device_.capability()); }
  int threads() const override { return 1; }
  int64_t step_rows() const override { return Work::kRows; }
  bool decodes_apart() const override { return true; }
  double read_bandwidth(int64_t megabytes) const override;

 private:
  static constexpr int64_t kEdits = 1 << 16;
  static constexpr int kGraphRows = Work::kHeadRows;

  // A step that was started: whose tokens it draws, in the order of its rows.
  struct Flight {
    std::vector<Sampler*> samplers;
    int turn = 0;                       // of the workspace's
    std::vector<SampleResult> results;  // once settled, else empty
  };

  void set_up(const Batch& batch, int rows);
  void choose(const std::vector<int64_t>& rows, size_t first, int count);
  void send(int64_t sequences);
  void set_up_sampling(const std::vector<const Item*>& items, size_t first, int count, int ahead = 0);
  void forward_pass(const Batch& batch) { forward(device_, net_, rope_, kv_, batch, work_); }
  void sample_rows(int count);
  void fetch(int count);
  cudaGraphExec_t capture(const Batch& batch);
  void run_graph(const Batch& batch);
  void run_decoding(const Batch& batch, const std::vector<const Item*>& items, size_t first, int ahead = 0);
  void settle();
  StepResult result_of(Sampler& sampler, const SampleResult& drawn) const;
  template <class Consume>
  void every_logit(const std::vector<const Item*>& items, Consume consume);

  Cuda device_;
  KvCache kv_;
  Network<Cuda> net_;
  RopeTable rope_;
  Work work_;
  Buffer<LogitEdit> edits_;
  std::vector<LogitEdit> host_edits_;
  std::map<std::pair<int, int>, cudaGraphExec_t> graphs_;                 // by rows and chunks
  int steps_without_graph_ = 0;                                           // to come, after there was no memory for one
  std::deque<Flight> flights_;                                            // oldest first
  const cuda::Event done_[2] = {cuda::make_event(), cuda::make_event()};  // by turn: its results are on the host
};

// Rows that decode come first, in the order of their spans; `rows` counts those of padding too.
void CudaEngine::set_up(const Batch& batch, int rows) {
  Work& w = work_;
  CHECK(int64_t(batch.spans.size()) <= w.sequences, "a step has ", batch.spans.size(), " sequences, at a context of ",
        options().context, " it can have ", w.sequences);
  w.rows = rows;
  w.decode_rows = 0;
  w.row_each = true;
  w.tiles = 0;
  w.max_chunks = 1;
  for (int r = 0; r < rows; ++r) w.host.positions[r] = -1, w.host.tokens[r] = 0, w.host.sequences[r] = 0;
  for (size_t s = 0; s < batch.spans.size(); ++s) {
    const Span& span = batch.spans[s];
    const int64_t pages = whole_pages(span.position + span.count);
    std::copy_n(span.pages, pages, w.host.pages + int64_t(s) * w.page_stride);
    for (int64_t i = 0; i < span.count; ++i) {
      const int64_t r = span.begin + i;
      w.host.tokens[r] = batch.tokens[size_t(r)];
      w.host.positions[r] = int32_t(span.position + i);
      w.host.sequences[r] = int32_t(s);
    }
    if (!span.prompt && span.begin == w.decode_rows) {
      w.decode_rows += int(span.count);
      w.row_each = w.row_each && span.count == 1;
      w.max_chunks = std::max(w.max_chunks, chunks_of(int(span.position + span.count - 1)));
      continue;
    }
    for (int64_t i = 0; i < span.count; i += kFlashRows)
      w.host.tiles[w.tiles++] = {int32_t(span.begin + i), int32_t(std::min<int64_t>(kFlashRows, span.count - i)),
                                 int32_t(span.position + i), int32_t(s)};
  }
}

void CudaEngine::choose(const std::vector<int64_t>& rows, size_t first, int count) {
  for (int i = 0; i < count; ++i) work_.host.chosen[i] = int32_t(rows[first + size_t(i)]);
}

void CudaEngine::send(int64_t sequences) {
  cuda::check(cudaMemcpyAsync(work_.input_memory.get(), work_.host_memory[work_.turn]->get(),
                              size_t(work_.input_bytes(sequences)), cudaMemcpyHostToDevice, device_.stream()),
              "copying a step's inputs");
}

// Settings of `count` items' samplers, and the edits that go with them; `ahead` as in Sampler::next_draw.
void CudaEngine::set_up_sampling(const std::vector<const Item*>& items, size_t first, int count, int ahead) {
  host_edits_.clear();
  for (int i = 0; i < count; ++i)
    work_.host.settings[i] =
        settings_of(items[first + size_t(i)]->sampler->next_draw(config().vocab, ahead), host_edits_);
  const int64_t edits = int64_t(host_edits_.size());
  if (edits > edits_.count()) {
    device_.synchronize();
    for (auto& [key, graph] : graphs_) cudaGraphExecDestroy(graph);  // they know the old memory
    graphs_.clear();
    edits_ = {};
    edits_ = Buffer<LogitEdit>(2 * edits, "changes of logits");
  }
  if (edits)
    cuda::check(cudaMemcpyAsync(edits_.get(), host_edits_.data(), size_t(edits) * sizeof(LogitEdit),
                                cudaMemcpyHostToDevice, device_.stream()),
                "copying changes of logits");
}

// Logits of the chosen rows, then their tokens.
void CudaEngine::sample_rows(int count) {
  head(device_, net_, count, work_);
  sample(device_, work_.logits, work_.vocab, count, int(config().vocab), work_.device.settings, edits_.get(),
         work_.sample_memory, work_.results.get());
}

// The tokens to the host.
void CudaEngine::fetch(int count) {
  cuda::check(cudaMemcpyAsync(work_.host_results[work_.turn]->get(), work_.results.get(),
                              size_t(count) * sizeof(SampleResult), cudaMemcpyDeviceToHost, device_.stream()),
              "copying tokens");
}

int bucket(int count) {  // of rows, for which one graph serves
  for (int size : {1, 2, 4, 8, 16, 24, 32, 48})
    if (count <= size) return size;
  return 64;
}

// The graph of one decoding step, or null where the card has no memory left for it.
cudaGraphExec_t CudaEngine::capture(const Batch& batch) {
  constexpr const char* kName = "capturing a step";
  cudaGraph_t captured = nullptr;
  cudaGraphExec_t graph = nullptr;
  cuda::check(cudaStreamBeginCapture(device_.stream(), cudaStreamCaptureModeThreadLocal), kName);
  try {
    forward_pass(batch);
    sample_rows(work_.rows);
  } catch (...) {
    cudaStreamEndCapture(device_.stream(), &captured);
    if (captured) cudaGraphDestroy(captured);
    throw;
  }
  cudaError_t status = cudaStreamEndCapture(device_.stream(), &captured);
  if (status == cudaSuccess) status = cudaGraphInstantiate(&graph, captured, 0);
  if (status == cudaSuccess)
    status = cudaGraphUpload(graph, device_.stream());  // or the first launch would need memory
  if (captured) cudaGraphDestroy(captured);
  if (status == cudaSuccess) return graph;
  if (graph) cudaGraphExecDestroy(graph);
  cudaGetLastError();
  if (status != cudaErrorMemoryAllocation) cuda::check(status, kName);
  return nullptr;
}

// One decoding step: every row a sequence of its own. A graph is captured for every number of rows and reach; where
// memory is short, the step's kernels are launched one by one, which is slower.
void CudaEngine::run_graph(const Batch& batch) {
  int chunks = 1;
  while (chunks < work_.max_chunks) chunks *= 2;
  work_.max_chunks = chunks;
  work_.decode_rows = work_.rows;
  const std::pair key(work_.rows, chunks);
  auto found = graphs_.find(key);
  if (found == graphs_.end() && --steps_without_graph_ < 0) {
    if (cudaGraphExec_t graph = capture(batch)) found = graphs_.emplace(key, graph).first;
    else steps_without_graph_ = 100;  // before the next try
  }
  if (found != graphs_.end()) {
    cuda::check(cudaGraphLaunch(found->second, device_.stream()), "a decoding step");
  } else {
    forward_pass(batch);
    sample_rows(work_.rows);
  }
}

// Begins one step of `batch`, all of which decode: its rows are of the items behind items[first], each with a sampler.
void CudaEngine::run_decoding(const Batch& batch, const std::vector<const Item*>& items, size_t first, int ahead) {
  const int rows = int(batch.rows()), padded = bucket(rows);
  set_up(batch, padded);
  for (int i = 0; i < padded; ++i) work_.host.chosen[i] = i, work_.host.settings[i] = {};
  set_up_sampling(items, first, rows, ahead);
  send(rows);
  run_graph(batch);
}

StepResult CudaEngine::result_of(Sampler& sampler, const SampleResult& drawn) const {
  StepResult result;
  try {
    result.sample = cuda::finish(sampler, drawn, config().vocab);
  } catch (const std::exception& error) {
    result.error = error.what();
  }
  return result;
}

// Waits for the steps under way, and keeps their results: what comes next may use all memory as it likes.
void CudaEngine::settle() {
  if (flights_.empty()) return;
  device_.synchronize();
  for (Flight& flight : flights_) {
    const SampleResult* results = work_.host_results[flight.turn]->get();
    if (flight.results.empty()) flight.results.assign(results, results + flight.samplers.size());
  }
}

void CudaEngine::start(const std::vector<const Item*>& items) {
  std::lock_guard lock(busy_);
  CHECK(flights_.size() < 2, "two steps are under way already: finish() one before the next");
  CHECK(!items.empty() && items.size() <= size_t(kGraphRows), "a step in halves takes 1 to ", kGraphRows,
        " items, not ", items.size());
  check(items, true);
  cuda::check(cudaSetDevice(device_.ordinal()), "choosing the card");
  Flight flight;
  Batch batch;
  int ahead = 0;
  for (size_t i = 0; i < items.size(); ++i) {
    const Item& item = *items[i];
    CHECK(item.sampler && !item.prompt && item.tokens.size() <= 1, "item ", i,
          " of a step in halves is one token of a sequence that decodes, and has a sampler");
    CHECK(item.tokens.empty() == items[0]->tokens.empty(), "a step in halves has tokens for all items or for none");
    int32_t token = 0;
    if (!item.tokens.empty()) {
      token = item.tokens[0];
    } else {
      CHECK(!flights_.empty(), "item ", i, " has no token, and no step is under way that draws it");
      const Flight& last = flights_.back();
      const auto found = std::find(last.samplers.begin(), last.samplers.end(), item.sampler);
      CHECK(found != last.samplers.end(), "item ", i, " has no token, and the step under way draws none for it");
      const auto row = found - last.samplers.begin();
      token = last.results.empty()
                  ? int32_t(-1 - row)
                  : std::clamp<int32_t>(last.results[size_t(row)].token, 0, int32_t(config().vocab) - 1);
      ahead = 1;
    }
    batch.spans.push_back({int64_t(i), 1, item.position, item.pages.data(), false});
    batch.tokens.push_back(token);
    flight.samplers.push_back(item.sampler);
  }
  work_.take_turn(flights_.empty() ? 0 : 1 - flights_.back().turn);
  run_decoding(batch, items, 0, ahead);
  fetch(int(items.size()));
  flight.turn = work_.turn;
  cuda::check(cudaEventRecord(done_[flight.turn].get(), device_.stream()), "a decoding step");
  flights_.push_back(std::move(flight));
}

std::vector<StepResult> CudaEngine::finish() {
  std::lock_guard lock(busy_);
  CHECK(!flights_.empty(), "no step was started");
  const Flight flight = std::move(flights_.front());
  flights_.pop_front();
  const bool settled = !flight.results.empty();
  if (!settled) cuda::check(cudaEventSynchronize(done_[flight.turn].get()), "a decoding step");
  const SampleResult* drawn = settled ? flight.results.data() : work_.host_results[flight.turn]->get();
  std::vector<StepResult> results;
  for (size_t i = 0; i < flight.samplers.size(); ++i) results.push_back(result_of(*flight.samplers[i], drawn[i]));
  return results;
}

std::vector<StepResult> CudaEngine::step(const std::vector<const Item*>& items) {
  std::lock_guard lock(busy_);
  check(items);
  cuda::check(cudaSetDevice(device_.ordinal()), "choosing the card");
  settle();
  // Drawn tokens come first, so that their rows are neighbours.
  std::vector<const Item*> ordered(items);
  std::stable_sort(ordered.begin(), ordered.end(), [](const Item* a, const Item* b) { return a->prompt < b->prompt; });
  std::map<const Item*, size_t> places;
  for (size_t i = 0; i < items.size(); ++i) places[items[i]] = i;
  std::vector<const Item*> sampled;  // items with samplers, in the order of their rows
  for (const Item* item : ordered)
    if (item->sampler) sampled.push_back(item);

  std::vector<StepResult> results(items.size());
  size_t done = 0;  // of `sampled`
  const auto take = [&](int count) {
    fetch(count);
    device_.synchronize();
    for (int i = 0; i < count; ++i, ++done)
      results[places[sampled[done]]] = result_of(*sampled[done]->sampler, (*work_.host_results[work_.turn])[i]);
  };

  Passes passes(ordered, Work::kRows, false);
  for (Batch batch; passes.next(batch);) {
    const std::vector<int64_t>& wanted = passes.wanted();
    const int rows = int(batch.rows());
    const bool decoding = std::none_of(batch.spans.begin(), batch.spans.end(), [](const Span& s) { return s.prompt; });
    if (decoding && rows <= kGraphRows && batch.spans.size() == size_t(rows) && wanted.size() == size_t(rows)) {
      run_decoding(batch, sampled, done);
      take(rows);
      continue;
    }
    set_up(batch, rows);
    for (size_t first = 0; first == 0 || first < wanted.size(); first += Work::kHeadRows) {
      const int count = int(std::min<size_t>(Work::kHeadRows, wanted.size() - first));
      choose(wanted, first, count);
      if (count) set_up_sampling(sampled, done, count);
      send(int64_t(batch.spans.size()));
      if (first == 0) forward_pass(batch);
      if (count) sample_rows(count);
      take(count);
    }
  }
  return results;
}

// consume(index among all items' tokens, logits on the host) for every new token.
template <class Consume>
void CudaEngine::every_logit(const std::vector<const Item*>& items, Consume consume) {
  std::lock_guard lock(busy_);
  check(items);
  cuda::check(cudaSetDevice(device_.ordinal()), "choosing the card");
  settle();
  std::vector<float> rows(size_t(Work::kHeadRows * work_.vocab));
  Passes passes(items, Work::kRows, true);
  for (Batch batch; passes.next(batch);) {
    const std::vector<int64_t>& wanted = passes.wanted();
    set_up(batch, int(batch.rows()));
    for (size_t first = 0; first < wanted.size(); first += Work::kHeadRows) {
      const int count = int(std::min<size_t>(Work::kHeadRows, wanted.size() - first));
      choose(wanted, first, count);
      send(int64_t(batch.spans.size()));
      if (first == 0) forward_pass(batch);
      head(device_, net_, count, work_);
      cuda::check(cudaMemcpyAsync(rows.data(), work_.logits, size_t(count * work_.vocab) * sizeof(float),
                                  cudaMemcpyDeviceToHost, device_.stream()),
                  "copying logits");
      device_.synchronize();
      for (int i = 0; i < count; ++i)
        consume(passes.before() + wanted[first + size_t(i)], rows.data() + i * work_.vocab);
    }
  }
}

void CudaEngine::logits(const std::vector<const Item*>& items, float* out) {
  const int64_t vocab = config().vocab;
  every_logit(items, [&](int64_t token, const float* row) { std::copy_n(row, vocab, out + token * vocab); });
}

void CudaEngine::nll(const std::vector<const Item*>& items, float* out) {
  const Targets targets(items);
  const int64_t vocab = config().vocab;
  every_logit(items, [&](int64_t token, const float* row) { targets.write(token, row, vocab, out); });
}

// Of a copy on the card, bytes read and written together: the most that its memory moves.
double CudaEngine::read_bandwidth(int64_t megabytes) const {
  const int64_t bytes =
      std::clamp<int64_t>(megabytes << 20, 1 << 20, std::max<int64_t>(1 << 20, device_.memory().first / 4));
  const Buffer<uint8_t> from(bytes, "measuring bandwidth"), to(bytes, "measuring bandwidth");
  const cuda::Event begin = cuda::make_event(true), end = cuda::make_event(true);
  const auto check = [](cudaError_t status) { cuda::check(status, "measuring bandwidth"); };
  float best = 0;
  for (int pass = 0; pass < 7; ++pass) {
    float milliseconds = 0;
    check(cudaEventRecord(begin.get(), device_.stream()));
    check(cudaMemcpyAsync(to.get(), from.get(), size_t(bytes), cudaMemcpyDeviceToDevice, device_.stream()));
    check(cudaEventRecord(end.get(), device_.stream()));
    check(cudaEventSynchronize(end.get()));
    check(cudaEventElapsedTime(&milliseconds, begin.get(), end.get()));
    best = std::max(best, 2.0f * float(bytes) / milliseconds * 1e3f);
  }
  return double(best);
}

}  // namespace

std::unique_ptr<Engine> open_cuda_engine(const Model& model, const EngineOptions& options) {
  return std::make_unique<CudaEngine>(model, options);
}

std::string cuda_problem() {
  try {
    Cuda device;
    return "";
  } catch (const Error& error) {
    return error.what();
  }
}

int64_t cuda_free_memory() { return Cuda().memory().first; }

}  // namespace halfturn
