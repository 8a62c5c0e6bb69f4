#include "ops.h"

#include <algorithm>
#include <cstring>

#include "../check.h"
#include "../codec/grid.h"
#include "attention_scratch.h"
#include "kernels.h"

namespace halfturn {

Workspace<Cpu>::Workspace(Cpu& cpu, const Network<Cpu>& net, const KvPool& kv, bool a8_mode) : a8(a8_mode) {
  const Config& c = net.config;
  hidden = round_up(c.hidden, kTile);
  q_size = round_up(c.heads * c.head_dim, kTile);
  kv_size = round_up(c.kv_heads * c.head_dim, kTile);
  mlp_size = round_up(c.intermediate, kTile);
  vocab = round_up(c.vocab, kTile);
  const int64_t widest = std::max({hidden, q_size, mlp_size});

  auto floats = [&](int64_t count) {
    bytes_ += count * int64_t(sizeof(float));
    auto made = cpu::buffer<float>(count);
    std::memset(made.get(), 0, size_t(count) * sizeof(float));
    return made;
  };
  x = floats(kMaxRows * hidden);
  q = floats(kMaxRows * q_size);
  k = floats(kMaxRows * kv_size);
  v = floats(kMaxRows * kv_size);
  attended = floats(kMaxRows * q_size);
  gate = floats(kMaxRows * mlp_size);
  mlp = floats(kMaxRows * mlp_size);
  logits = cpu::buffer<float>(kMaxHeadRows * vocab);
  codes = cpu::buffer<int8_t>(kMaxRows * widest);
  values = cpu::buffer<float>(a8 ? 0 : kMaxRows * widest);
  scales = cpu::buffer<float>(kMaxRows);
  sums = cpu::buffer<int32_t>(kMaxRows * (widest / kTile + 1));
  bytes_ += kMaxHeadRows * vocab * 4 + kMaxRows * widest * (a8 ? 1 : 5) + kMaxRows * (widest / kTile + 2) * 4;

  scratch_bytes = attention_scratch(kv, c.heads / c.kv_heads) * int64_t(sizeof(float));
  unfinished = std::make_unique<std::atomic<int64_t>[]>(size_t(kSharedTasks * cpu.threads()));
  for (const auto& layer : net.layers)
    for (const cpu::Matrix* m : {&layer.q, &layer.o, &layer.gate, &layer.down})
      scratch_bytes = std::max(scratch_bytes, cpu::matmul_scratch(*m));
  scratch_bytes = round_up(std::max(scratch_bytes, cpu::matmul_scratch(net.head)), 64);
  scratch = cpu::buffer<uint8_t>(cpu.threads() * scratch_bytes);
  bytes_ += cpu.threads() * scratch_bytes;
}

namespace {

// Points work.input at `rows` rows of `size` elements, to be written row by row with prepare_row.
void begin_input(Workspace<Cpu>& w, int64_t rows, int64_t size) {
  const int64_t padded = round_up(size, kTile);
  w.rows = rows;
  w.input = {rows, padded, w.codes.get(), w.scales.get(), w.sums.get(), padded / kTile + 1, w.values.get()};
}

void prepare_row(Cpu& cpu, Workspace<Cpu>& w, int64_t row, const float* x, int64_t size) {
  const cpu::Activations& in = w.input;
  if (w.a8)
    cpu.kernels().quantize_row(x, size, in.stride, w.codes.get() + row * in.stride, w.scales.get() + row,
                               w.sums.get() + row * in.sums_stride);
  else cpu.kernels().round_to_half(x, size, in.stride, w.values.get() + row * in.stride);
}

// Row `from` of the hidden states, normed, becomes row `to` of the input.
void prepare_normed(Cpu& cpu, const Network<Cpu>& net, const NetworkNorm<Cpu>& norm, Workspace<Cpu>& w, int64_t from,
                    int64_t to, int thread) {
  const Config& c = net.config;
  auto* normed = reinterpret_cast<float*>(w.scratch_of(thread));
  cpu.kernels().rms_norm(w.x.get() + from * w.hidden, norm.weight.data.get(), norm.mean.data.get(), c.hidden,
                         c.norm_epsilon, normed);
  prepare_row(cpu, w, to, normed, c.hidden);
}

// Output tiles of one task: small enough that the threads share the work evenly, large enough to be worth a hand-over.
int64_t tiles_per_task(const cpu::Matrix& m, int64_t rows) {
  if (rows > 8) return 6;
  constexpr int64_t kTaskBytes = 32 << 10;
  return std::clamp<int64_t>(kTaskBytes / (m.k_tiles * m.tile_bytes) / 4 * 4, 4, 64);
}

struct Part {
  const cpu::Matrix* matrix;
  cpu::Output out;
};

void product(Cpu& cpu, Workspace<Cpu>& w, const cpu::Matrix& m, int64_t tile, int64_t tiles, cpu::Output out,
             int thread) {
  (w.a8 ? cpu.kernels().matmul_a8 : cpu.kernels().matmul_f16)(m, w.input, tile, tiles, out, w.scratch_of(thread));
}

// Products of one input with several matrices, as one parallel region.
template <size_t kCount>
void matmul(Cpu& cpu, Workspace<Cpu>& w, const Part (&parts)[kCount]) {
  int64_t first[kCount + 1] = {}, step[kCount];
  for (size_t p = 0; p < kCount; ++p) {
    step[p] = tiles_per_task(*parts[p].matrix, w.rows);
    first[p + 1] = first[p] + (parts[p].matrix->n_tiles + step[p] - 1) / step[p];
  }
  cpu.parallel(first[kCount], [&](int64_t task, int thread) {
    size_t p = 0;
    while (task >= first[p + 1]) ++p;
    const int64_t tile = (task - first[p]) * step[p];
    product(cpu, w, *parts[p].matrix, tile, std::min(step[p], parts[p].matrix->n_tiles - tile), parts[p].out, thread);
  });
}

}  // namespace

void embed(Cpu& cpu, const Network<Cpu>& net, const Batch& batch, Workspace<Cpu>& w) {
  cpu.parallel(batch.rows(), [&](int64_t row, int) {
    grid::decode_row(net.embed, batch.tokens[size_t(row)], w.x.get() + row * w.hidden);
  });
}

void norm(Cpu& cpu, const Network<Cpu>& net, const NetworkNorm<Cpu>& norm, int64_t rows, Workspace<Cpu>& w) {
  begin_input(w, rows, net.config.hidden);
  cpu.parallel(rows, [&](int64_t row, int thread) { prepare_normed(cpu, net, norm, w, row, row, thread); });
}

void query_key_value(Cpu& cpu, const NetworkLayer<Cpu>& layer, Workspace<Cpu>& w) {
  const Part parts[] = {{&layer.q, {w.q.get(), w.q_size, false}},
                        {&layer.k, {w.k.get(), w.kv_size, false}},
                        {&layer.v, {w.v.get(), w.kv_size, false}}};
  matmul(cpu, w, parts);
}

void rope_and_store(Cpu& cpu, const Network<Cpu>& net, const Rope& rope, KvPool& kv, int64_t layer, const Batch& batch,
                    Workspace<Cpu>& w) {
  for (const Span& span : batch.spans) {
    for (int64_t i = 0; i < span.count; ++i) rope.at(span.position + i);  // builds what is missing, which may throw
    cpu.parallel(span.count, [&](int64_t i, int) {
      const int64_t row = span.begin + i, position = span.position + i;
      cpu.kernels().rope_and_store(kv, layer, span.pages[position / kPageSize], position % kPageSize, rope.at(position),
                                   net.config.heads, w.q.get() + row * w.q_size, w.k.get() + row * w.kv_size,
                                   w.v.get() + row * w.kv_size);
    });
  }
}

void attention_output(Cpu& cpu, const NetworkLayer<Cpu>& layer, Workspace<Cpu>& w) {
  const int64_t rows = w.rows;
  begin_input(w, rows, layer.o.in);
  cpu.parallel(rows,
               [&](int64_t row, int) { prepare_row(cpu, w, row, w.attended.get() + row * w.q_size, layer.o.in); });
  const Part parts[] = {{&layer.o, {w.x.get(), w.hidden, true}}};
  matmul(cpu, w, parts);
}

void gate_and_up(Cpu& cpu, const NetworkLayer<Cpu>& layer, Workspace<Cpu>& w) {
  const int64_t step = w.rows > 8 ? 3 : tiles_per_task(layer.gate, w.rows), tiles = layer.gate.n_tiles;
  cpu.parallel((tiles + step - 1) / step, [&](int64_t task, int thread) {
    const int64_t tile = task * step, count = std::min(step, tiles - tile), at = tile * kTile;
    product(cpu, w, layer.gate, tile, count, {w.gate.get(), w.mlp_size, false}, thread);
    product(cpu, w, layer.up, tile, count, {w.mlp.get(), w.mlp_size, false}, thread);
    for (int64_t row = 0; row < w.rows; ++row) {
      float* up = w.mlp.get() + row * w.mlp_size + at;
      cpu.kernels().swiglu(w.gate.get() + row * w.mlp_size + at, up, count * kTile, up);
    }
  });
}

void down(Cpu& cpu, const NetworkLayer<Cpu>& layer, Workspace<Cpu>& w) {
  const int64_t rows = w.rows;
  begin_input(w, rows, layer.down.in);
  cpu.parallel(rows, [&](int64_t row, int) {
    float* x = w.mlp.get() + row * w.mlp_size;
    cpu.kernels().hadamard(x, layer.down.in, layer.down.r4_block);
    prepare_row(cpu, w, row, x, layer.down.in);
  });
  const Part parts[] = {{&layer.down, {w.x.get(), w.hidden, true}}};
  matmul(cpu, w, parts);
}

void head(Cpu& cpu, const Network<Cpu>& net, const int64_t* rows, int64_t count, Workspace<Cpu>& w) {
  begin_input(w, count, net.config.hidden);
  cpu.parallel(count, [&](int64_t i, int thread) { prepare_normed(cpu, net, net.norm, w, rows[i], i, thread); });
  const Part parts[] = {{&net.head, {w.logits.get(), w.vocab, false}}};
  matmul(cpu, w, parts);
}

}  // namespace halfturn
