// What Python sees of a checkpoint without an engine: its table of linears, and the codec on whole matrices.
#pragma once
#include <cstdint>
#include <string>

#include "model.h"

namespace halfturn {

// JSON: {"config": config.json, "linears": [{"name", "codec", "bits", "in", "out", "in_padded", "out_padded", "groups",
// "group_size", "r4_block", "weights", "bytes", "bias_bytes"}], "norm_bytes", "files": [{"name", "bytes"}],
// "decoder": {...}, "embed": {...}, "head": {...}, "total": {"weights", "bytes", "bpw"}}.
// bytes are codes, scales and levels; bpw is 8 * bytes / (in * out). total's bytes are those of the weight files.
std::string inspect_json(const Model& model);

// Whole matrices; sizes are multiples of kTile.
// tiles [in/16, out/16, 8*bits] <-> codes [out, in].
void unpack(const uint32_t* tiles, int64_t in, int64_t out, int bits, uint8_t* codes);
// Throws Error for a code that does not fit in `bits`.
void pack(const uint8_t* codes, int64_t in, int64_t out, int bits, uint32_t* tiles);
// scales: half precision [groups, out]; levels [2^bits]; weights [out, in].
void dequantize(const uint32_t* tiles, const uint16_t* scales, const int8_t* levels, int64_t in, int64_t out,
                int64_t groups, int bits, float* weights);

}  // namespace halfturn
