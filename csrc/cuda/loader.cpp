#include "loader.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>

#include "../check.h"
#include "../codec/half.h"
#include "event.h"
#include "gemv.h"
#include "rows.h"
#include "status.h"

namespace halfturn::cuda {

namespace {

constexpr int64_t kAlign = 256;
constexpr int64_t kPiece = 4 << 20;  // bytes that a thread copies at a time
// Bits of the matrices that read a norm, on average, from which on its mean is left out. It makes int8 activations half
// as wrong, which is worth less beside the errors of fewer bits than the 0.3 to 0.5 us that it takes (of 30 us a norm
// of an 8B model at 4 bits).
constexpr double kMeanBits = 4.5;

struct Copy {
  int64_t to;  // offset on the card
  const uint8_t* from;
  int64_t bytes;
};

// Places tensors one behind the other and remembers what to copy there. Used twice: for the sizes, then for the copies.
class Layout {
 public:
  Layout(uint8_t* base, bool a8) : base_(base), a8_(a8) {}

  const uint8_t* place(const View& view, int64_t room = 0) {
    const int64_t at = size_, bytes = view ? view.bytes() : 0;
    if (bytes) copies_.push_back({at, view.as<uint8_t>(), bytes});
    size_ = round_up(at + std::max(bytes, room), kAlign);
    return base_ + at;
  }

  Vector vector(const View& view) {  // with zeros behind it, to a whole tile
    return {reinterpret_cast<const uint16_t*>(place(view, round_up(view.elements(), kTile) * 2))};
  }

  NetworkNorm<Cuda> norm(const Norm& norm, std::initializer_list<const Linear*> readers) {
    NetworkNorm<Cuda> placed;
    const auto* weights = norm.weight.as<uint16_t>();
    const bool ones = std::all_of(weights, weights + norm.weight.elements(), [](uint16_t w) { return w == 0x3c00; });
    if (!ones) placed.weight = vector(norm.weight);
    int64_t bits = 0, outs = 0;
    for (const Linear* reader : readers) bits += reader->bits * reader->out, outs += reader->out;
    if (a8_ && norm.mean && double(bits) >= kMeanBits * double(outs)) placed.mean = vector(norm.mean);
    return placed;
  }

  // of: the norm that it reads. With a mean there is a bias, for make_up_for_means().
  Matrix matrix(const Linear& linear, const NetworkNorm<Cuda>& of = {}) {
    Matrix m;
    m.bits = linear.bits;
    m.in = linear.in;
    m.out = linear.out;
    m.in_tiles = linear.in_padded / kTile;
    m.out_tiles = linear.out_padded / kTile;
    m.groups = linear.groups;
    m.r4_block = linear.r4_block;
    CHECK(linear.codes.bytes() < int64_t(1) << 32, linear.name, " has ", linear.codes.bytes(),
          " bytes of codes, the CUDA backend takes less than 4 GiB a matrix: use device=\"cpu\"");
    m.codes = reinterpret_cast<const uint32_t*>(place(linear.codes));
    m.scales = reinterpret_cast<const uint16_t*>(place(linear.scales));
    m.levels = reinterpret_cast<const int8_t*>(place(linear.levels, 256));
    m.look_at_levels(linear.levels.as<int8_t>());
    if (linear.bias || of.mean.data)
      m.bias = reinterpret_cast<const float*>(place(linear.bias, linear.out * int64_t(sizeof(float))));
    return m;
  }

  Network<Cuda> network(const Model& model) {
    Network<Cuda> net;
    net.config = model.config;
    net.embed = model.embed;
    net.embedding = matrix(model.embed);
    for (const Layer& l : model.layers) {
      const NetworkNorm<Cuda> attention = norm(l.attention_norm, {&l.q, &l.k, &l.v});
      const NetworkNorm<Cuda> mlp = norm(l.mlp_norm, {&l.gate, &l.up});
      net.layers.push_back({attention, mlp, matrix(l.q, attention), matrix(l.k, attention), matrix(l.v, attention),
                            matrix(l.o), matrix(l.gate, mlp), matrix(l.up, mlp), matrix(l.down)});
    }
    net.norm = norm(model.norm, {&model.head});
    net.head = matrix(model.head, net.norm);
    return net;
  }

  int64_t size() const { return size_; }
  const std::vector<Copy>& copies() const { return copies_; }

 private:
  uint8_t* base_;
  bool a8_;
  int64_t size_ = 0;
  std::vector<Copy> copies_;
};

struct DestroyStream {
  void operator()(cudaStream_t stream) const { cudaStreamDestroy(stream); }
};

// Through pinned memory: a thread fills one buffer while the card takes the other.
void copy_pieces(const Cuda& device, const std::vector<Copy>& pieces, std::atomic<size_t>& next, uint8_t* base) {
  check(cudaSetDevice(device.ordinal()), "choosing the card");
  cudaStream_t made = nullptr;
  check(cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking), "making a stream");
  const std::unique_ptr<CUstream_st, DestroyStream> stream(made);
  const Event taken[] = {make_event(), make_event()};
  const Pinned<uint8_t> buffers(2 * kPiece);
  int64_t used = 0;
  for (size_t i = next++; i < pieces.size(); ++used) {
    uint8_t* buffer = buffers.get() + used % 2 * kPiece;
    if (used >= 2) check(cudaEventSynchronize(taken[used % 2].get()), "copying weights");
    int64_t filled = 0;  // small tensors share a buffer
    do {
      const Copy& piece = pieces[i];
      std::memcpy(buffer + filled, piece.from, size_t(piece.bytes));
      check(
          cudaMemcpyAsync(base + piece.to, buffer + filled, size_t(piece.bytes), cudaMemcpyHostToDevice, stream.get()),
          "copying weights");
      filled += round_up(piece.bytes, kAlign);
      i = next++;
    } while (i < pieces.size() && filled + pieces[i].bytes <= kPiece);
    check(cudaEventRecord(taken[used % 2].get(), stream.get()), "copying weights");
  }
  check(cudaStreamSynchronize(stream.get()), "copying weights");
}

// Adds W mean to the bias of each W whose inputs come without it.
void make_up_for_means(const Cuda& device, const Model& model, const Network<Cuda>& net) {
  const int64_t stride = round_up(net.config.hidden, kTile);
  const int size = int(net.config.hidden);
  const Buffer<float> means(stride * (2 * net.config.layers + 1), "the norms' means");
  Operand x;
  x.rows = 1, x.rows_padded = 8, x.steps = int((size + kStep - 1) / kStep);
  x.padded_steps = pad_steps(x.steps);
  const Buffer<uint16_t> values(int64_t(x.padded_steps) * x.rows_padded * kStep, "the norms' means");
  x.values = values.get();
  std::vector<float> floats;
  const auto add = [&](const NetworkNorm<Cuda>& placed, const Norm& norm, std::initializer_list<Matrix> readers) {
    if (!placed.mean.data) return;
    const int64_t at = int64_t(floats.size());
    for (int64_t i = 0; i < stride; ++i) floats.push_back(i < size ? half_to_float(norm.mean.as<uint16_t>()[i]) : 0.0f);
    check(cudaMemcpyAsync(means.get() + at, floats.data() + at, size_t(stride) * sizeof(float), cudaMemcpyHostToDevice,
                          device.stream()),
          "copying the norms' means");
    convert(device, means.get() + at, stride, size, x);
    Output outputs[kGemvMatrices];
    int count = 0;
    for (const Matrix& m : readers) outputs[count++].y = const_cast<float*>(m.bias);
    gemv(device, readers.begin(), outputs, count, x);
  };
  floats.reserve(size_t(means.count()));  // what is copied stays where it is
  for (size_t i = 0; i < net.layers.size(); ++i) {
    const NetworkLayer<Cuda>& layer = net.layers[i];
    add(layer.attention_norm, model.layers[i].attention_norm, {layer.q, layer.k, layer.v});
    add(layer.mlp_norm, model.layers[i].mlp_norm, {layer.gate, layer.up});
  }
  add(net.norm, model.norm, {net.head});
  check(cudaStreamSynchronize(device.stream()), "making up for the norms' means");
}

}  // namespace

int64_t network_bytes(const Model& model, bool a8) {
  Layout layout(nullptr, a8);
  layout.network(model);
  return layout.size();
}

Network<Cuda> load_network(const Cuda& device, const Model& model, bool a8, int threads) {
  auto arena = std::make_unique<Arena>();
  arena->memory = Buffer<uint8_t>(network_bytes(model, a8), "the weights");
  clear(arena->memory.get(), arena->memory.bytes());
  Layout layout(arena->memory.get(), a8);
  Network<Cuda> net = layout.network(model);

  std::vector<Copy> pieces;
  for (const Copy& copy : layout.copies())
    for (int64_t at = 0; at < copy.bytes; at += kPiece)
      pieces.push_back({copy.to + at, copy.from + at, std::min(kPiece, copy.bytes - at)});
  std::atomic<size_t> next{0};
  std::exception_ptr failure;
  std::mutex lock;
  const auto copy = [&] {
    try {
      copy_pieces(device, pieces, next, arena->memory.get());
    } catch (...) {
      std::lock_guard locked(lock);
      failure = std::current_exception();
      next = pieces.size();
    }
  };
  {
    std::vector<std::jthread> helpers;
    const int count = int(std::clamp<int64_t>(int64_t(pieces.size()), 1, std::max(1, threads)));
    try {
      while (int(helpers.size()) < count - 1) helpers.emplace_back(copy);
    } catch (const std::system_error&) {  // the threads that there are copy all of it
    }
    copy();
  }
  if (failure) std::rethrow_exception(failure);

  for (const Layer& l : model.layers)  // the files' copies are not read again
    for (const Linear* linear : {&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down}) release(model, linear->codes);
  release(model, model.head.codes);
  release(model, model.embed.codes);
  if (a8) make_up_for_means(device, model, net);
  net.arena = std::move(arena);
  return net;
}

}  // namespace halfturn::cuda
