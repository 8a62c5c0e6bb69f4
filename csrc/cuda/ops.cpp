#include "ops.h"

#include <algorithm>

#include "../check.h"
#include "../rope.h"
#include "gemm.h"
#include "gemv.h"
#include "rows.h"

namespace halfturn {

namespace cuda {

KvView KvCache::view_of(const Config& c, int k_bits, int v_bits) {
  check_kv_bits(k_bits, v_bits);
  CHECK(c.head_dim >= 2 && c.head_dim <= 256 && c.head_dim % 2 == 0,
        "attention on CUDA takes an even head_dim of 2 to 256, not ", c.head_dim, ": use device=\"cpu\"");
  KvView view;
  view.layers = int(c.layers);
  view.kv_heads = int(c.kv_heads);
  view.head_dim = int(c.head_dim);
  view.groups = int((c.head_dim + kKvGroup - 1) / kKvGroup);
  view.k_bits = k_bits;
  view.v_bits = v_bits;
  view.r3_block = int(r3_block_of(c.head_dim, k_bits, c.rotated));
  const int64_t width = view.groups * kKvGroup, scales = view.groups * kPageSize * 2;
  view.k_scales = int(width * kPageSize * k_bits / 8);
  view.v = view.k_scales + int(k_bits < 16 ? scales : 0);
  view.v_scales = view.v + int(width * kPageSize * v_bits / 8);
  view.block_bytes = view.v_scales + (v_bits < 16 ? scales : 0);
  view.page_bytes = view.block_bytes * view.layers * view.kv_heads;
  return view;
}

KvCache::KvCache(const Config& config, int k_bits, int v_bits, int64_t pages)
    : view_(view_of(config, k_bits, v_bits)), pages_(pages), memory_(view_.page_bytes * pages, "the KV cache") {
  view_.data = memory_.get();
}

RopeTable::RopeTable(const Cuda& device, const Config& config, int64_t context)
    : table_(context * config.head_dim, "the RoPE table") {
  const Rope rope(config, context);
  rope_table(device, rope.frequencies().data(), int(config.head_dim / 2), context, table_.get());
}

}  // namespace cuda

using namespace cuda;

Workspace<Cuda>::Workspace(const Config& c, const KvView& kv, int64_t context, bool int8, bool allocate)
    : a8(int8),
      hidden(round_up(c.hidden, kTile)),
      q_size(round_up(c.heads * c.head_dim, kTile)),
      kv_size(round_up(c.kv_heads * c.head_dim, kTile)),
      mlp_size(round_up(c.intermediate, kTile)),
      vocab(round_up(c.vocab, kTile)),
      page_stride(int((context + kPageSize - 1) / kPageSize)),
      sequences(std::clamp<int64_t>((int64_t(16) << 20) / page_stride, 1, kRows)) {
  for (int64_t size : {c.hidden, c.heads * c.head_dim, c.intermediate})
    CHECK(size <= kWidestRow, "a matrix of this model has ", size, " inputs, the CUDA backend takes up to ", kWidestRow,
          ": use device=\"cpu\"");
  CHECK(c.vocab <= kMaxVocab, "this model has a vocabulary of ", c.vocab, ", the CUDA backend takes up to ", kMaxVocab,
        ": use device=\"cpu\"");
  const int64_t widest = round_up(std::max({hidden, q_size, mlp_size}), kStep * kPaddedSteps);
  const int64_t partial_floats = decode_partial_floats(kv, int(c.heads), 1, kPartialChunks);
  inputs_in(nullptr);

  const auto make = [&](auto& buffer, int64_t count, const char* what) {
    using Type = std::remove_reference_t<decltype(buffer)>;
    bytes_ += count * int64_t(sizeof(*buffer.get()));
    if (allocate) buffer = Type(count, what);
  };
  make(x, kRows * hidden, "hidden states");
  make(shared, place_shared(nullptr, c, partial_floats), "activations");
  make(codes, a8 ? kRows * widest : 0, "activations");
  make(values, a8 ? 0 : kRows * widest, "activations");
  make(scales, kRows, "scales of activations");
  make(maxima, kOwnRows * kMostMaxima, "scales of activations");
  make(input_memory, input_bytes(sequences), "the inputs of a step");
  make(results, kHeadRows, "sampled tokens");
  if (!allocate) return;
  place_shared(shared.get(), c, partial_floats);
  // What pads rows to whole tiles is read and must be zero; nothing ever writes there.
  clear(x.get(), x.bytes());
  clear(shared.get(), shared.bytes());
  for (auto& memory : host_memory) memory = std::make_unique<Pinned<uint8_t>>(input_bytes(sequences));
  for (auto& memory : host_results) memory = std::make_unique<Pinned<SampleResult>>(kHeadRows);
  device = inputs_in(input_memory.get());
  take_turn(0);
}

// Points at parts of `memory`, and returns how many bytes they take.
int64_t Workspace<Cuda>::place_shared(uint8_t* memory, const Config& c, int64_t partial_floats) {
  int64_t at = 0, most = 0;
  const auto take = [&](auto*& pointer, int64_t count) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(memory + at);
    at = round_up(at + count * int64_t(sizeof(*pointer)), 256);
    most = std::max(most, at);
  };
  // Zeros that pad rows would not outlive what lies in their place in turn; models of whole tiles have none.
  const bool padded = q_size != c.heads * c.head_dim || mlp_size != c.intermediate;
  const auto next_part = [&] { at = padded ? at : 0; };
  take(q, kRows * q_size);
  take(k, kRows * kv_size);
  take(v, kRows * kv_size);
  take(attended, kRows * q_size);
  take(partial, partial_floats);
  next_part();
  take(gate, kRows * mlp_size);
  take(up, kRows * mlp_size);
  next_part();
  take(logits, kHeadRows * vocab);
  take(sample_memory, sample_workspace_bytes(kHeadRows, int(c.vocab)));
  return most;
}

void Workspace<Cuda>::take_turn(int which) {
  turn = which;
  host = inputs_in(host_memory[turn]->get());
}

Workspace<Cuda>::Inputs Workspace<Cuda>::inputs_in(uint8_t* memory) {
  int64_t at = 0;
  const auto take = [&](auto*& pointer, int64_t count) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(memory + at);
    at = round_up(at + count * int64_t(sizeof(*pointer)), 64);
  };
  Inputs inputs;
  take(inputs.tokens, kRows);
  take(inputs.positions, kRows);
  take(inputs.sequences, kRows);
  take(inputs.chosen, kHeadRows);
  take(inputs.tiles, kRows);
  take(inputs.settings, kHeadRows);
  pages_begin_ = at;
  take(inputs.pages, sequences * page_stride);
  return inputs;
}

Operand Workspace<Cuda>::operand(int64_t count, int64_t size) const {
  Operand x;
  if (a8) x.codes = codes.get();
  else x.values = values.get();
  x.scales = scales.get();
  x.rows = int(count);
  x.rows_padded = int(round_up(count, 8));
  x.steps = int((size + kStep - 1) / kStep);
  x.padded_steps = count <= kGemvRows ? pad_steps(x.steps) : x.steps;
  return x;
}

namespace {

// Whether a GEMV is faster than a GEMM. With more rows than it takes at a time it reads the weights twice, which still
// beats a GEMM whose blocks of 64 outputs are fewer than the multiprocessors, unless their inputs are few.
bool few_rows(const Cuda& device, const Operand& x, std::initializer_list<Matrix> matrices) {
  if (x.rows <= kGemvTurn) return true;
  int64_t blocks = 0;
  for (const Matrix& m : matrices) blocks += (m.out_tiles + 3) / 4;
  return x.rows <= kGemvRows && blocks < device.multiprocessors() && x.steps >= 32;
}

// Products of the operand with matrices; where there is a source, of few rows, the product makes the operand itself.
void matmul(Cuda& device, const Operand& x, std::initializer_list<Matrix> matrices,
            std::initializer_list<Output> outputs, const RowSource& source = {}, int spare = 0) {
  if (few_rows(device, x, matrices))
    return gemv(device, matrices.begin(), outputs.begin(), int(matrices.size()), x, source.x ? &source : nullptr,
                spare);
  gemm(device, matrices.begin(), outputs.begin(), int(matrices.size()), x);
}

}  // namespace

void embed(Cuda& device, const Net& net, const Batch&, Workspace<Cuda>& w) {
  cuda::embed(device, net.embedding, w.rows_view(), w.rows, w.x.get(), w.hidden, w.results.get());
}

// RMSNorm of w.x, of the rows `chosen` where given: left to the next product, or done, for which there is no source.
RowSource normed(Cuda& device, const Net& net, const NetworkNorm<Cuda>& norm, const int32_t* chosen, int rows,
                 Workspace<Cuda>& w) {
  const Config& c = net.config;
  const int size = int(c.hidden);
  static_assert(kMostTeams * kTeam * own_chunks(true) * 256 <= kSmallRow);  // up to here both ways give the same bits
  if (gemv_takes_rows(device, rows, size, true, w.a8))
    return {w.x.get(), w.hidden, true, norm.weight.data, norm.mean.data, size, float(c.norm_epsilon), chosen};
  cuda::norm(device, w.x.get(), w.hidden, size, norm.weight, norm.mean, c.norm_epsilon, chosen, w.operand(rows, size));
  return {};
}

void norm(Cuda& device, const Net& net, const NetworkNorm<Cuda>& norm, int64_t, Workspace<Cuda>& w) {
  w.source = normed(device, net, norm, nullptr, w.rows, w);
}

void query_key_value(Cuda& device, const NetworkLayer<Cuda>& layer, Workspace<Cuda>& w) {
  // For the first blocks of attention, where kernels overlap.
  const int spare = device.capability() >= 90 ? device.multiprocessors() / 16 : 0;
  matmul(device, w.operand(w.rows, layer.q.in), {layer.q, layer.k, layer.v},
         {{w.q, w.q_size, false}, {w.k, w.kv_size, false}, {w.v, w.kv_size, false}}, w.source, spare);
}

void rope_and_store(Cuda& device, const Net& net, const RopeTable& rope, KvCache& kv, int64_t layer, const Batch&,
                    Workspace<Cuda>& w) {
  w.rotary = w.tiles == 0 && w.decode_rows == w.rows && w.row_each ? rope.get() : nullptr;
  if (w.rotary) return;  // attention() does it, in the same launch
  cuda::rope_and_store(device, kv.view(), int(layer), w.rows_view(), w.rows, rope.get(), int(net.config.heads), w.q,
                       w.q_size, w.k, w.v, w.kv_size);
}

void attention(Cuda& device, const Net& net, const KvCache& kv, int64_t layer, const Batch&, Workspace<Cuda>& w) {
  const int heads = int(net.config.heads);
  static_assert(Workspace<Cuda>::kPartialChunks >= kMostChunks);
  const int most = Workspace<Cuda>::kPartialChunks / w.max_chunks;  // rows a launch
  for (int first = 0; first < w.decode_rows; first += most) {
    const int count = std::min(most, w.decode_rows - first);
    float *const q = w.q + first * w.q_size, *const out = w.attended + first * w.q_size;
    if (w.rotary)
      decode_rope_attention(device, kv.view(), int(layer), w.rows_view(first), count, w.rotary, heads, q, w.q_size,
                            w.k + first * w.kv_size, w.v + first * w.kv_size, w.kv_size, w.partial, w.max_chunks, out,
                            w.q_size);
    else
      decode_attention(device, kv.view(), int(layer), w.rows_view(first), count, heads, q, w.q_size, w.partial,
                       w.max_chunks, out, w.q_size);
  }
  if (w.tiles)
    prefill_attention(device, kv.view(), int(layer), w.device.tiles, w.tiles, w.device.pages, w.page_stride, heads, w.q,
                      w.q_size, w.attended, w.q_size);
}

void attention_output(Cuda& device, const NetworkLayer<Cuda>& layer, Workspace<Cuda>& w) {
  const Operand x = w.operand(w.rows, layer.o.in);
  RowSource source;
  if (gemv_takes_rows(device, w.rows, layer.o.in, false, w.a8))
    source = {w.attended, w.q_size, false, nullptr, nullptr, int(layer.o.in), 0.0f};
  else convert(device, w.attended, w.q_size, int(layer.o.in), x);
  matmul(device, x, {layer.o}, {{w.x.get(), w.hidden, true}}, source);
}

void gate_and_up(Cuda& device, const NetworkLayer<Cuda>& layer, Workspace<Cuda>& w) {
  matmul(device, w.operand(w.rows, layer.gate.in), {layer.gate, layer.up},
         {{w.gate, w.mlp_size, false}, {w.up, w.mlp_size, false}}, w.source);
}

void down(Cuda& device, const NetworkLayer<Cuda>& layer, Workspace<Cuda>& w) {
  const Operand x = w.operand(w.rows, layer.down.in);
  const int size = int(layer.down.in), block = int(layer.down.r4_block);
  RowSource source;
  if (gemv_takes_rows(device, w.rows, size, false, w.a8)) {
    const int count = activate(device, w.gate, w.up, w.mlp_size, size, block, w.rows, w.maxima.get());
    source = {w.gate, w.mlp_size, false, nullptr, nullptr, size, 0.0f, nullptr, w.maxima.get(), count};
  } else {
    activate(device, w.gate, w.up, w.mlp_size, size, block, x);
  }
  matmul(device, x, {layer.down}, {{w.x.get(), w.hidden, true}}, source);
}

void head(Cuda& device, const Net& net, int count, Workspace<Cuda>& w) {
  const RowSource source = normed(device, net, net.norm, w.device.chosen, count, w);
  matmul(device, w.operand(count, net.config.hidden), {net.head}, {{w.logits, w.vocab, false}}, source);
}

}  // namespace halfturn
