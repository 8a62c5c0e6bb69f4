// Reads config.json: the model's dimensions and, per linear, how it is quantized. Every number is checked for its range
// here, so that no product of them overflows later.
#pragma once
#include <map>
#include <string>

#include "json.h"
#include "model.h"

namespace halfturn {

// A dot product of int8 codes and int8 activations has to fit in 32 bits: 131072 * 127 * 127 < 2^31.
constexpr int64_t kMaxInputs = 131072;
constexpr int64_t kMaxVocab = 1 << 24;
constexpr int64_t kMaxLayers = 1024;
constexpr int64_t kMaxHeadDim = 1024;

// What quantization_config says about one linear.
struct Quantization {
  int bits = 0;
  int64_t rows = 0;  // padded inputs
  int64_t r4_block = 1;
};

struct ConfigFile {
  Config config;
  std::map<std::string, Quantization> linears;
};

// `text` is config.json's. Throws Error naming the field, its value and what it may be.
ConfigFile read_config(const std::string& text);

}  // namespace halfturn
