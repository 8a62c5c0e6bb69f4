// Reads all that a loaded model hands out, as the engine will: what the loader let through must be safe to use.
#pragma once
#include <cmath>
#include <cstdint>
#include <vector>

#include "../../csrc/check.h"
#include "../../csrc/codec/grid.h"
#include "../../csrc/inspect.h"
#include "../../csrc/json.h"
#include "../../csrc/model.h"

namespace halfturn {

// Every weight through both decoders, which must agree to the bit.
inline void use_linear(const Linear& w) {
  std::vector<float> all(size_t(w.in_padded * w.out_padded)), row(size_t(w.in));
  dequantize(w.codes.as<uint32_t>(), w.scales.as<uint16_t>(), w.levels.as<int8_t>(), w.in_padded, w.out_padded,
             w.groups, w.bits, all.data());
  for (int64_t out = 0; out < w.out; ++out) {
    grid::decode_row(w, out, row.data());
    for (int64_t in = 0; in < w.in; ++in)
      CHECK(row[in] == all[out * w.in_padded + in], w.name, " decodes to ", row[in], " and ",
            all[out * w.in_padded + in]);
  }
  std::vector<uint8_t> codes(all.size());
  std::vector<uint32_t> tiles(size_t(w.codes.elements()));
  unpack(w.codes.as<uint32_t>(), w.in_padded, w.out_padded, w.bits, codes.data());
  pack(codes.data(), w.in_padded, w.out_padded, w.bits, tiles.data());
  for (size_t i = 0; i < tiles.size(); ++i) CHECK(tiles[i] == w.codes.as<uint32_t>()[i], w.name, " packs differently");
  float sum = 0;
  for (int64_t i = 0; w.bias && i < w.out; ++i) sum += std::fabs(w.bias.as<float>()[i]);
  CHECK(!std::isnan(sum), w.name, " has a bias that is not a number");
}

inline void use_model(const Model& model) {
  for (const Layer& l : model.layers)
    for (const Linear* w : {&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down}) {
      use_linear(*w);
      release(model, w->codes);
    }
  use_linear(model.embed);
  use_linear(model.head);
  CHECK(parse_json(inspect_json(model), "inspect").find("config"), "inspect_json wrote no config");
}

}  // namespace halfturn
