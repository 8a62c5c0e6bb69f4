// What a step needs between operations on the CPU, allocated once for the largest step.
#pragma once
#include "../network.h"
#include "cpu.h"
#include "matrix.h"

namespace halfturn {

template <class Device>
struct Workspace;

constexpr int64_t kMaxRows = 512;     // rows of one pass; longer prompts take several
constexpr int64_t kMaxHeadRows = 64;  // rows of logits at a time
constexpr int64_t kSharedTasks = 4;   // attention tasks a thread below which one token's keys are shared out

template <>
struct Workspace<Cpu> {
  Workspace(Cpu& cpu, const Network<Cpu>& net, const class KvPool& kv, bool a8);

  bool a8;           // int8 activations; otherwise half precision
  int64_t rows = 0;  // in `input`
  // All row strides are dimensions rounded up to 16, and what is behind the true ones stays zero.
  int64_t hidden, q_size, kv_size, mlp_size, vocab;
  cpu::Buffer<float> x;                   // [kMaxRows, hidden]
  cpu::Buffer<float> q;                   // [kMaxRows, q_size]
  cpu::Buffer<float> k, v;                // [kMaxRows, kv_size]
  cpu::Buffer<float> attended;            // [kMaxRows, q_size]
  cpu::Buffer<float> gate;                // [kMaxRows, mlp_size]
  cpu::Buffer<float> mlp;                 // [kMaxRows, mlp_size]
  cpu::Buffer<float> logits;              // [kMaxHeadRows, vocab]
  cpu::Buffer<int8_t> codes;              // [kMaxRows, widest]
  cpu::Buffer<float> values;              // [kMaxRows, widest], f16 mode
  cpu::Buffer<float> scales;              // [kMaxRows]
  cpu::Buffer<int32_t> sums;              // [kMaxRows, widest/16 + 1]
  cpu::Activations input;                 // views of the four above
  std::vector<int64_t> attention_tasks;   // the first task of each span
  std::vector<int64_t> attention_states;  // where in `states` a span begins, -1 where its keys are not shared out
  std::vector<float> states;              // [KV heads, chunks, group, attention_state()] of such spans
  std::unique_ptr<std::atomic<int64_t>[]>
      unfinished;                // chunks of each of their KV heads, at most kSharedTasks a thread
  int64_t scratch_bytes;         // of one thread
  cpu::Buffer<uint8_t> scratch;  // [threads, scratch_bytes]

  uint8_t* scratch_of(int thread) { return scratch.get() + thread * scratch_bytes; }
  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_ = 0;
};

}  // namespace halfturn
