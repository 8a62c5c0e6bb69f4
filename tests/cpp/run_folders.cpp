// Loads every folder named on the command line into the engine and runs it, on every instruction set, in both modes and
// with every width of the KV cache: prompts in chunks, several sequences, sampling. Writes "ran" or "refused: REASON".
#include <cmath>
#include <cstdio>

#include "../../csrc/check.h"
#include "../../csrc/cpu/cpu.h"
#include "../../csrc/engine.h"

namespace {

using namespace halfturn;

void run(const std::string& folder, const char* isa, const char* mode, int kv_bits) {
  EngineOptions options;
  options.threads = 2;
  options.isa = isa;
  options.mode = mode;
  options.k_bits = options.v_bits = kv_bits;
  options.context = 64;
  options.kv_tokens = 192;
  const std::unique_ptr<Engine> opened = Engine::open(folder, options);
  Engine& engine = *opened;
  const int32_t vocab = int32_t(engine.config().vocab);
  Sampler greedy({.temperature = 0.0f}),
      drawn({.temperature = 0.9f, .top_k = 5, .top_p = 0.9f, .seed = 7, .logprobs = 2});
  std::vector<int32_t> prompt;
  for (int32_t i = 0; i < 40; ++i) prompt.push_back((i * 7) % vocab);
  Item first{{prompt.begin(), prompt.begin() + 13}, 0, {2, 0}, nullptr};
  Item second{prompt, 0, {1, 3}, &drawn};
  engine.step({&first, &second});
  Item rest{{prompt.begin() + 13, prompt.end()}, 13, {2, 0}, &greedy};
  std::vector<StepResult> results = engine.step({&rest});
  for (int64_t position = 40; position < 64 && results[0].sample; ++position) {
    Item next{{results[0].sample->token}, position, {2, 0}, &greedy};
    results = engine.step({&next});
  }
  std::vector<float> nll(prompt.size() - 1);
  engine.nll({&second}, nll.data());
}

}  // namespace

int main(int count, char** folders) {
  for (int i = 1; i < count; ++i) {
    std::string outcome = "ran";
    try {
      for (Isa isa : available_isas())
        for (const char* mode : {"a8", "f16"})
          for (int kv_bits : {16, 8, 4}) run(folders[i], isa_name(isa), mode, kv_bits);
    } catch (const Error& error) {
      outcome = std::string("refused: ") + error.what();
    }
    std::puts(outcome.c_str());
  }
}
