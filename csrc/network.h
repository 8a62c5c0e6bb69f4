// A model as one device holds it, and the rows of one step. Device::Matrix and Device::Vector say how it keeps weights.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "model.h"

namespace halfturn {

// The biases of the matrices that read a norm without its mean make up for that.
template <class Device>
struct NetworkNorm {
  typename Device::Vector weight;  // [hidden]; CUDA: empty for ones
  typename Device::Vector mean;    // [hidden], what is left out of the inputs of int8 products, or empty
};

template <class Device>
struct NetworkLayer {
  NetworkNorm<Device> attention_norm, mlp_norm;
  typename Device::Matrix q, k, v, o, gate, up, down;
};

template <class Device>
struct Network {
  Config config;
  std::unique_ptr<typename Device::Arena> arena;  // the memory of all matrices
  Linear embed;                                   // in the mapped file: only a row per token is read
  typename Device::Matrix embedding;              // the same on a device that can't read the file
  std::vector<NetworkLayer<Device>> layers;
  NetworkNorm<Device> norm;
  typename Device::Matrix head;
};

// New rows of one sequence within a step: rows [begin, begin + count) of the batch stand at position, position + 1, ...
struct Span {
  int64_t begin = 0, count = 0, position = 0;
  const int32_t* pages = nullptr;  // page p holds the positions [p * kPageSize, (p + 1) * kPageSize)
  bool prompt = false;             // see Item
};

struct Batch {
  std::vector<int32_t> tokens;  // [rows]
  std::vector<Span> spans;
  int64_t rows() const { return int64_t(tokens.size()); }
};

}  // namespace halfturn
