#include "loader.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <mutex>
#include <thread>

#include "../check.h"
#include "rows.h"
#include "status.h"

namespace halfturn::cuda {

namespace {

constexpr int64_t kAlign = 256;
constexpr int64_t kPiece = 4 << 20;  // bytes that a thread copies at a time

struct Copy {
  int64_t to;  // offset on the card
  const uint8_t* from;
  int64_t bytes;
};

// Places tensors one behind the other and remembers what to copy there. Used twice: for the sizes, then for the copies.
class Layout {
 public:
  explicit Layout(uint8_t* base) : base_(base) {}

  const uint8_t* place(const View& view, int64_t room = 0) {
    const int64_t at = size_, bytes = view.bytes();
    if (bytes) copies_.push_back({at, view.as<uint8_t>(), bytes});
    size_ = round_up(at + std::max(bytes, room), kAlign);
    return base_ + at;
  }

  Vector vector(const View& view) {  // with zeros behind it, to a whole tile
    return {reinterpret_cast<const uint16_t*>(place(view, round_up(view.elements(), kTile) * 2))};
  }

  Matrix matrix(const Linear& linear) {
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
    m.straight = m.bits == 8;
    for (int i = 0; i < 256 && m.straight; ++i) m.straight = linear.levels.as<int8_t>()[i] == std::min(i, 254) - 127;
    if (linear.bias) m.bias = reinterpret_cast<const float*>(place(linear.bias));
    return m;
  }

  Network<Cuda> network(const Model& model) {
    Network<Cuda> net;
    net.config = model.config;
    net.embed = model.embed;
    net.embedding = matrix(model.embed);
    for (const Layer& l : model.layers)
      net.layers.push_back({vector(l.attention_norm), vector(l.mlp_norm), matrix(l.q), matrix(l.k), matrix(l.v),
                            matrix(l.o), matrix(l.gate), matrix(l.up), matrix(l.down)});
    net.norm = vector(model.norm);
    net.head = matrix(model.head);
    return net;
  }

  int64_t size() const { return size_; }
  const std::vector<Copy>& copies() const { return copies_; }

 private:
  uint8_t* base_;
  int64_t size_ = 0;
  std::vector<Copy> copies_;
};

// Through pinned memory: a thread fills one buffer while the card takes the other.
void copy_pieces(const Cuda& device, const std::vector<Copy>& pieces, std::atomic<size_t>& next, uint8_t* base) {
  check(cudaSetDevice(device.ordinal()), "choosing the card");
  cudaStream_t stream;
  cudaEvent_t taken[2];
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "making a stream");
  for (cudaEvent_t& event : taken) check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "making an event");
  {
    const Pinned<uint8_t> buffers(2 * kPiece);
    int64_t used = 0;
    for (size_t i = next++; i < pieces.size(); ++used) {
      uint8_t* buffer = buffers.get() + used % 2 * kPiece;
      if (used >= 2) check(cudaEventSynchronize(taken[used % 2]), "copying weights");
      int64_t filled = 0;  // small tensors share a buffer
      do {
        const Copy& piece = pieces[i];
        std::memcpy(buffer + filled, piece.from, size_t(piece.bytes));
        check(cudaMemcpyAsync(base + piece.to, buffer + filled, size_t(piece.bytes), cudaMemcpyHostToDevice, stream),
              "copying weights");
        filled += round_up(piece.bytes, kAlign);
        i = next++;
      } while (i < pieces.size() && filled + pieces[i].bytes <= kPiece);
      check(cudaEventRecord(taken[used % 2], stream), "copying weights");
    }
    check(cudaStreamSynchronize(stream), "copying weights");
  }
  for (cudaEvent_t& event : taken) cudaEventDestroy(event);
  cudaStreamDestroy(stream);
}

}  // namespace

int64_t network_bytes(const Model& model) {
  Layout layout(nullptr);
  layout.network(model);
  return layout.size();
}

Network<Cuda> load_network(const Cuda& device, const Model& model, int threads) {
  auto arena = std::make_unique<Arena>();
  arena->memory = Buffer<uint8_t>(network_bytes(model), "the weights");
  clear(arena->memory.get(), arena->memory.bytes());
  Layout layout(arena->memory.get());
  Network<Cuda> net = layout.network(model);

  std::vector<Copy> pieces;
  for (const Copy& copy : layout.copies())
    for (int64_t at = 0; at < copy.bytes; at += kPiece)
      pieces.push_back({copy.to + at, copy.from + at, std::min(kPiece, copy.bytes - at)});
  std::atomic<size_t> next{0};
  std::exception_ptr failure;
  std::mutex lock;
  std::vector<std::thread> workers;
  const int count = int(std::clamp<int64_t>(int64_t(pieces.size()), 1, std::max(1, threads)));
  for (int t = 0; t < count; ++t)
    workers.emplace_back([&] {
      try {
        copy_pieces(device, pieces, next, arena->memory.get());
      } catch (...) {
        std::lock_guard locked(lock);
        failure = std::current_exception();
        next = pieces.size();
      }
    });
  for (std::thread& worker : workers) worker.join();
  if (failure) std::rethrow_exception(failure);

  for (const Layer& l : model.layers)  // the files' copies are not read again
    for (const Linear* linear : {&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down}) release(model, linear->codes);
  release(model, model.head.codes);
  release(model, model.embed.codes);
  net.arena = std::move(arena);
  return net;
}

}  // namespace halfturn::cuda
