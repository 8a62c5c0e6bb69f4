// What a checkpoint holds, as plain structs: Config, Linear, Layer, Model. Views point into mapped files.
#pragma once
#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "tensor.h"

namespace halfturn {

class Checkpoint;

constexpr int64_t kTile = 16;  // inputs and outputs of one tile of codes

constexpr int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

struct RopeScaling {
  enum class Type : uint8_t { kNone, kLinear, kDynamic, kLlama3 } type = Type::kNone;
  double factor = 1.0;
  // llama3 only; positions of the original training
  double low_freq_factor = 1.0, high_freq_factor = 4.0, original_context = 0;
};

struct Config {
  int64_t hidden = 0, intermediate = 0, layers = 0, heads = 0, kv_heads = 0, head_dim = 0, vocab = 0, max_positions = 0;
  double norm_epsilon = 1e-5, rope_theta = 10000.0;
  RopeScaling rope_scaling;
  bool attention_bias = false, mlp_bias = false;
  bool rotated = false;  // "rotation": "hadamard"
  bool means = false;    // every norm has its mean

  // The most positions of one sequence. Hugging Face configurations keep max_position_embeddings at the length before
  // linear and dynamic stretching.
  int64_t context_limit() const {
    const bool stretched =
        rope_scaling.type == RopeScaling::Type::kLinear || rope_scaling.type == RopeScaling::Type::kDynamic;
    return stretched ? int64_t(double(max_positions) * rope_scaling.factor) : max_positions;
  }
};

// y = x W^T + bias with W [out, in]; weight = levels[code] * scale[group(input)][output].
struct Linear {
  std::string name;
  int64_t in = 0, out = 0;                // the true dimensions
  int64_t in_padded = 0, out_padded = 0;  // rounded up to kTile
  int bits = 0;                           // 2..8
  int64_t groups = 1;                     // along the input; group_size = in_padded / groups
  int64_t r4_block = 1;                   // block of the Hadamard transform of the input, 1 = none
  View codes;                             // U32 [in_padded/16, out_padded/16, 8*bits]
  View scales;                            // F16 [groups, out_padded]
  View levels;                            // I8  [2^bits]
  View bias;                              // F32 [out], or empty
};

// RMSNorm(x) * weight, as what follows reads it.
struct Norm {
  View weight;  // F16 [hidden]
  View mean;    // F16 [hidden], what that is on average, or empty
};

struct Layer {
  Norm attention_norm, mlp_norm;
  Linear q;         // [heads*head_dim, hidden]
  Linear k, v;      // [kv_heads*head_dim, hidden]
  Linear o;         // [hidden, heads*head_dim]
  Linear gate, up;  // [intermediate, hidden]
  Linear down;      // [hidden, intermediate]
};

struct Model {
  Config config;
  std::string config_json;  // the file's text, for Python
  Linear embed;             // [vocab, hidden], read row by row
  std::vector<Layer> layers;
  Norm norm;
  Linear head;                                   // [vocab, hidden]
  std::shared_ptr<const Checkpoint> checkpoint;  // keeps the mapped files alive
};

// Reads and validates a checkpoint folder. Throws Error naming the file, the tensor and both numbers; allocates nothing
// in proportion to what a hostile file claims.
Model load_model(const std::string& folder);

// Tells the operating system that the mapped pages of `view` are not needed any more (they can be read again).
void release(const Model& model, const View& view);

}  // namespace halfturn
