// Sampling on the card behind C functions, for tests/test_sampler_cuda.py: samplers hand over their draws, rows of
// logits go to the card, results come back. Compiled with csrc/cuda/{sample.cu,cuda.cpp} and csrc/sampler.cpp only,
// so that the CPU's kernels, which are not called, are defined here.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cpu/cpu.h"
#include "cpu/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/sample.h"

namespace halfturn {

const Kernels& best_kernels() { std::abort(); }

}  // namespace halfturn

using namespace halfturn;

static thread_local std::string message;

template <class Work>
static auto guarded(Work work) -> decltype(work()) {
  message.clear();
  try {
    return work();
  } catch (const std::exception& error) {
    message = error.what();
    return decltype(work()){};
  }
}

template <class T>
struct OnCard {
  T* data = nullptr;
  explicit OnCard(size_t count) {
    cuda::check(cudaMalloc(&data, std::max<size_t>(1, count) * sizeof(T)), "the test's memory");
    cuda::check(cudaMemset(data, 0xa5, std::max<size_t>(1, count) * sizeof(T)), "the test's memory");
  }
  explicit OnCard(const std::vector<T>& values) : OnCard(values.size()) { copy(values.data(), values.size()); }
  void copy(const T* from, size_t count) {
    cuda::check(cudaMemcpy(data, from, count * sizeof(T), cudaMemcpyDefault), "the test's copy");
  }
  ~OnCard() { cudaFree(data); }
};

static Cuda& device() {
  static Cuda cuda(0);
  return cuda;
}

extern "C" {

const char* error_message() { return message.c_str(); }

Sampler* sampler_new(double temperature, int64_t top_k, double top_p, double min_p, double repetition, double presence,
                     double frequency, int64_t seed, int64_t logprobs, int64_t biases, const int32_t* tokens,
                     const float* bias) {
  return guarded([&] {
    SamplerOptions o;
    o.temperature = float(temperature);
    o.top_k = top_k;
    o.top_p = float(top_p);
    o.min_p = float(min_p);
    o.repetition_penalty = float(repetition);
    o.presence_penalty = float(presence);
    o.frequency_penalty = float(frequency);
    o.seed = uint64_t(seed);
    o.logprobs = int(logprobs);
    for (int64_t i = 0; i < biases; ++i) o.logit_bias.emplace_back(tokens[i], bias[i]);
    return new Sampler(o);
  });
}
void sampler_free(Sampler* sampler) { delete sampler; }
void sampler_accept(Sampler* sampler, const int32_t* tokens, int64_t count) {
  sampler->accept(std::vector<int32_t>(tokens, tokens + count));
}
void sampler_ban(Sampler* sampler, const int32_t* tokens, int64_t count) {
  sampler->ban(std::vector<int32_t>(tokens, tokens + count));
}

// One token for each row: logits [rows, stride]. tokens is -1 and sentences[300 * row] says why where there is none;
// top_tokens and top_logprobs are [rows, 20], -1 behind the last.
void run(Sampler** samplers, const float* logits, int64_t rows, int64_t stride, int64_t vocab, int32_t* tokens,
         float* logprobs, int32_t* top_tokens, float* top_logprobs, char* sentences) {
  guarded([&] {
    std::vector<cuda::SampleSettings> settings;
    std::vector<LogitEdit> edits;
    for (int64_t r = 0; r < rows; ++r) settings.push_back(cuda::settings_of(samplers[r]->next_draw(vocab), edits));
    const size_t size = size_t(rows * stride);
    OnCard<float> on_card(size);
    on_card.copy(logits, size);
    const OnCard<cuda::SampleSettings> settings_there(settings);
    const OnCard<LogitEdit> edits_there(edits);
    const OnCard<uint8_t> workspace(size_t(cuda::sample_workspace_bytes(int(rows), int(vocab))));
    const OnCard<cuda::SampleResult> results_there((size_t(rows)));
    cuda::check(cudaDeviceSynchronize(), "the test's copies");
    cuda::sample(device(), on_card.data, stride, int(rows), int(vocab), settings_there.data, edits_there.data,
                 workspace.data, results_there.data);
    cuda::check(cudaStreamSynchronize(device().stream()), "sampling");
    std::vector<cuda::SampleResult> results((size_t(rows)));
    cuda::check(cudaMemcpy(results.data(), results_there.data, results.size() * sizeof(results[0]), cudaMemcpyDefault),
                "the results");
    std::vector<float> after(size);
    cuda::check(cudaMemcpy(after.data(), on_card.data, size * sizeof(float), cudaMemcpyDefault), "the logits");
    CHECK(std::memcmp(after.data(), logits, size * sizeof(float)) == 0, "sampling changed the logits");
    for (int64_t r = 0; r < rows; ++r) {
      std::fill(top_tokens + 20 * r, top_tokens + 20 * (r + 1), -1);
      try {
        const Sample sample = cuda::finish(*samplers[r], results[size_t(r)], vocab);
        tokens[r] = sample.token;
        logprobs[r] = sample.logprob;
        for (size_t i = 0; i < sample.top.size(); ++i) {
          top_tokens[size_t(20 * r) + i] = sample.top[i].first;
          top_logprobs[size_t(20 * r) + i] = sample.top[i].second;
        }
      } catch (const Error& error) {
        tokens[r] = -1;
        std::snprintf(sentences + 300 * r, 300, "%s", error.what());
      }
    }
    return 0;
  });
}

// Microseconds of one call for `rows` rows of the same logits, launched `times` times as one CUDA graph.
double microseconds(Sampler* sampler, const float* logits, int64_t rows, int64_t vocab, int64_t times) {
  return guarded([&] {
    std::vector<LogitEdit> edits;
    const std::vector<cuda::SampleSettings> settings(size_t(rows), cuda::settings_of(sampler->next_draw(vocab), edits));
    OnCard<float> on_card(size_t(rows * vocab));
    for (int64_t r = 0; r < rows; ++r)
      cuda::check(cudaMemcpy(on_card.data + r * vocab, logits, size_t(vocab) * sizeof(float), cudaMemcpyDefault),
                  "the logits");
    const OnCard<cuda::SampleSettings> settings_there(settings);
    const OnCard<LogitEdit> edits_there(edits);
    const OnCard<uint8_t> workspace(size_t(cuda::sample_workspace_bytes(int(rows), int(vocab))));
    const OnCard<cuda::SampleResult> results((size_t(rows)));
    cuda::check(cudaDeviceSynchronize(), "the test's copies");
    const cudaStream_t stream = device().stream();
    cudaGraph_t graph;
    cudaGraphExec_t runnable;
    cuda::check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capturing");
    for (int64_t i = 0; i < times; ++i)
      cuda::sample(device(), on_card.data, vocab, int(rows), int(vocab), settings_there.data, edits_there.data,
                   workspace.data, results.data);
    cuda::check(cudaStreamEndCapture(stream, &graph), "capturing");
    cuda::check(cudaGraphInstantiate(&runnable, graph, 0), "making the graph");
    cudaEvent_t begin, end;
    cuda::check(cudaEventCreate(&begin), "an event");
    cuda::check(cudaEventCreate(&end), "an event");
    float best = 1e30f;
    for (int i = 0; i < 5; ++i) {
      float taken = 0;
      cuda::check(cudaEventRecord(begin, stream), "an event");
      cuda::check(cudaGraphLaunch(runnable, stream), "the graph");
      cuda::check(cudaEventRecord(end, stream), "an event");
      cuda::check(cudaEventSynchronize(end), "sampling");
      cuda::check(cudaEventElapsedTime(&taken, begin, end), "an event");
      best = std::min(best, taken);
    }
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
    cudaGraphExecDestroy(runnable);
    cudaGraphDestroy(graph);
    return double(best) * 1e3 / double(times);
  });
}

}  // extern "C"
