#include "inspect.h"

#include "check.h"
#include "checkpoint.h"
#include "codec/grid.h"
#include "json.h"

namespace halfturn {
namespace {

int64_t stored_bytes(const Linear& w) { return w.codes.bytes() + w.scales.bytes() + w.levels.bytes(); }

std::string linear_json(const Linear& w) {
  return sentence("{\"name\": ", quoted(w.name), ", \"codec\": \"grid\", \"bits\": ", w.bits, ", \"in\": ", w.in,
                  ", \"out\": ", w.out, ", \"in_padded\": ", w.in_padded, ", \"out_padded\": ", w.out_padded,
                  ", \"groups\": ", w.groups, ", \"group_size\": ", w.in_padded / w.groups,
                  ", \"r4_block\": ", w.r4_block, ", \"weights\": ", w.in * w.out, ", \"bytes\": ", stored_bytes(w),
                  ", \"bias_bytes\": ", w.bias ? w.bias.bytes() : 0, "}");
}

struct Sum {
  int64_t weights = 0, bytes = 0;

  void add(const Linear& w) {
    weights += w.in * w.out;
    bytes += stored_bytes(w);
  }
  std::string json() const {
    return sentence("{\"weights\": ", weights, ", \"bytes\": ", bytes,
                    ", \"bpw\": ", 8.0 * double(bytes) / double(weights), "}");
  }
};

}  // namespace

std::string inspect_json(const Model& model) {
  Sum embed, decoder, head, total;
  std::string linears;
  const auto bytes_of = [](const Norm& norm) { return norm.weight.bytes() + (norm.mean ? norm.mean.bytes() : 0); };
  int64_t norm_bytes = bytes_of(model.norm);
  auto list = [&](const Linear& w, Sum& sum) {
    linears += (linears.empty() ? "" : ", ") + linear_json(w);
    sum.add(w);
    total.weights += w.in * w.out;
  };
  list(model.embed, embed);
  for (const Layer& l : model.layers) {
    for (const Linear* w : {&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down}) list(*w, decoder);
    norm_bytes += bytes_of(l.attention_norm) + bytes_of(l.mlp_norm);
  }
  list(model.head, head);
  total.bytes = model.checkpoint->file_bytes();
  std::string files;
  for (const auto& [name, bytes] : model.checkpoint->files())
    files += sentence(files.empty() ? "" : ", ", "{\"name\": ", quoted(name), ", \"bytes\": ", bytes, "}");
  return sentence("{\"config\": ", model.config_json, ", \"linears\": [", linears, "], \"norm_bytes\": ", norm_bytes,
                  ", \"files\": [", files, "], \"decoder\": ", decoder.json(), ", \"embed\": ", embed.json(),
                  ", \"head\": ", head.json(), ", \"total\": ", total.json(), "}");
}

void unpack(const uint32_t* tiles, int64_t in, int64_t out, int bits, uint8_t* codes) {
  uint8_t tile[grid::kCodes];
  for (int64_t i = 0; i < in; i += kTile)
    for (int64_t o = 0; o < out; o += kTile, tiles += 8 * bits) {
      grid::unpack_tile(tiles, bits, tile);
      for (int64_t row = 0; row < kTile; ++row)
        for (int64_t column = 0; column < kTile; ++column)
          codes[(o + row) * in + i + column] = tile[row * kTile + column];
    }
}

void pack(const uint8_t* codes, int64_t in, int64_t out, int bits, uint32_t* tiles) {
  uint8_t tile[grid::kCodes];
  for (int64_t i = 0; i < in; i += kTile)
    for (int64_t o = 0; o < out; o += kTile, tiles += 8 * bits) {
      for (int64_t row = 0; row < kTile; ++row)
        for (int64_t column = 0; column < kTile; ++column) {
          const uint8_t code = codes[(o + row) * in + i + column];
          CHECK((code >> bits) == 0, "the code of output ", o + row, ", input ", i + column, " is ", int(code), ", ",
                bits, " bits hold at most ", (1 << bits) - 1);
          tile[row * kTile + column] = code;
        }
      grid::pack_tile(tile, bits, tiles);
    }
}

void dequantize(const uint32_t* tiles, const uint16_t* scales, const int8_t* levels, int64_t in, int64_t out,
                int64_t groups, int bits, float* weights) {
  uint8_t tile[grid::kCodes];
  const int64_t group_size = in / groups;
  for (int64_t i = 0; i < in; i += kTile)
    for (int64_t o = 0; o < out; o += kTile, tiles += 8 * bits) {
      grid::unpack_tile(tiles, bits, tile);
      for (int64_t row = 0; row < kTile; ++row) {
        const float scale = half_to_float(scales[i / group_size * out + o + row]);
        for (int64_t column = 0; column < kTile; ++column)
          weights[(o + row) * in + i + column] = float(levels[tile[row * kTile + column]]) * scale;
      }
    }
}

}  // namespace halfturn
