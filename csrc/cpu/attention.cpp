// Attention of a batch: which thread computes what. The kernel is in attention.inl.
#include <algorithm>

#include "attention_scratch.h"
#include "kernels.h"
#include "ops.h"

namespace halfturn {

void attention(Cpu& cpu, const Network<Cpu>& net, const KvPool& kv, int64_t layer, const Batch& batch,
               Workspace<Cpu>& w) {
  const Config& c = net.config;
  const int64_t group = c.heads / c.kv_heads, spans = int64_t(batch.spans.size());
  const int64_t queries = std::max<int64_t>(cpu::kQueryRows / group, 1);  // of one task: one pass over the keys
  const int64_t state = group * attention_state(kv);
  const auto chunks_of = [](const Span& span) { return span.position / cpu::kChunk + 1; };
  // The result is the same to the bit, so this may depend on what else is in the batch.
  const bool share = cpu.threads() > 1 && spans * c.kv_heads < kSharedTasks * cpu.threads();

  std::vector<int64_t>& first = w.attention_tasks;
  first.assign(1, 0);
  w.attention_states.clear();
  int64_t states = 0;
  for (const Span& span : batch.spans) {
    const bool shared = share && span.count == 1 && chunks_of(span) > 1;
    const int64_t pieces = shared ? chunks_of(span) : (span.count + queries - 1) / queries;
    if (shared)
      for (int64_t h = 0; h < c.kv_heads; ++h)
        w.unfinished[w.attention_states.size() * size_t(c.kv_heads) + size_t(h)].store(pieces,
                                                                                       std::memory_order_relaxed);
    w.attention_states.push_back(shared ? states : -1);
    if (shared) states += c.kv_heads * pieces * state;
    first.push_back(first.back() + pieces * c.kv_heads);
  }
  if (int64_t(w.states.size()) < states) w.states.resize(size_t(2 * states));

  const int64_t tasks = first.back();
  cpu.parallel(tasks, [&](int64_t index, int thread) {
    const int64_t task = tasks - 1 - index;  // later chunks of a prompt see more keys: longest work first
    const size_t s = size_t(std::upper_bound(first.begin(), first.end(), task) - first.begin() - 1);
    const Span& span = batch.spans[s];
    const int64_t piece = (task - first[s]) / c.kv_heads, kv_head = (task - first[s]) % c.kv_heads;
    const int64_t head_at = span.begin * w.q_size + kv_head * group * c.head_dim;
    auto* scratch = reinterpret_cast<float*>(w.scratch_of(thread));
    if (w.attention_states[s] >= 0) {
      const int64_t chunks = chunks_of(span);
      float* own = w.states.data() + w.attention_states[s] + kv_head * chunks * state;
      cpu.kernels().attention_chunk(kv, layer, kv_head, group, span.pages, span.position, w.q.get() + head_at, piece,
                                    own + piece * state, scratch);
      if (w.unfinished[s * size_t(c.kv_heads) + size_t(kv_head)].fetch_sub(1, std::memory_order_acq_rel) == 1)
        cpu.kernels().attention_merge(kv, group, chunks, own, w.attended.get() + head_at, scratch);
      return;
    }
    const int64_t token = piece * queries, at = head_at + token * w.q_size;
    cpu.kernels().attention(kv, layer, kv_head, group, span.pages, span.position + token,
                            std::min(queries, span.count - token), w.q.get() + at, w.q_size, w.attended.get() + at,
                            scratch);
  });
}

}  // namespace halfturn
