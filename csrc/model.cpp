#include "model.h"

#include <sys/mman.h>
#include <unistd.h>

#include <set>

#include "check.h"
#include "checkpoint.h"
#include "codec/half.h"
#include "config.h"

namespace halfturn {
namespace {

std::string place_text(const View& view, int64_t element) {
  std::vector<int64_t> place(view.shape.size());
  for (size_t i = view.shape.size(); i-- > 0; element /= view.shape[i]) place[i] = element % view.shape[i];
  return shape_text(place);
}

// Takes tensors out of a checkpoint one by one, each checked against config.json, and knows at the end which are left.
class Loader {
 public:
  Loader(const Checkpoint& checkpoint, ConfigFile& file) : checkpoint_(checkpoint), linears_(file.linears) {}

  Norm norm(const std::string& name, const Config& config) {
    Norm norm;
    norm.weight = halves(name + ".weight", config.hidden);
    if (config.means) norm.mean = halves(name + ".mean", config.hidden);
    return norm;
  }

  Linear linear(const std::string& name, int64_t in, int64_t out, bool bias) {
    Linear w;
    w.name = name;
    w.in = in;
    w.out = out;
    w.in_padded = round_up(in, kTile);
    w.out_padded = round_up(out, kTile);
    manifest(w);
    w.codes = take(name + ".codes", DType::kU32, {w.in_padded / kTile, w.out_padded / kTile, 8 * w.bits});
    scales(w);
    levels(w);
    if (bias) {
      w.bias = take(name + ".bias", DType::kF32, {out});
      const auto* bits = w.bias.as<uint32_t>();
      for (int64_t i = 0; i < out; ++i)
        CHECK((bits[i] & 0x7f800000) != 0x7f800000, at(name + ".bias", w.bias, i), " is ", w.bias.as<float>()[i],
              ", expected a finite number");
    }
    return w;
  }

  // To be called when the model is complete.
  void nothing_left() const {
    CHECK(linears_.empty(), "config.json lists the linear ", shown(linears_.begin()->first),
          " in quantization_config, the model that it describes has none of that name");
    if (taken_.size() == checkpoint_.tensors().size()) return;
    for (const auto& [name, tensor] : checkpoint_.tensors())
      CHECK(taken_.count(name), shown(name), " in ", tensor.file,
            " is not part of the model that config.json describes: the folder mixes two models");
  }

 private:
  // "model.norm.weight[3] in model.safetensors"
  std::string at(const std::string& name, const View& view, int64_t element) const {
    return name + place_text(view, element) + " in " + checkpoint_.tensor(name).file;
  }

  View take(const std::string& name, DType type, const std::vector<int64_t>& shape) {
    const Checkpoint::Tensor& tensor = checkpoint_.tensor(name);
    CHECK(tensor.view.dtype == type && tensor.view.shape == shape, name, " is ", name_of(tensor.view.dtype), " ",
          shape_text(tensor.view.shape), " in ", tensor.file, ", config.json says ", name_of(type), " ",
          shape_text(shape), ": the folder mixes two models");
    taken_.insert(name);
    return tensor.view;
  }

  View halves(const std::string& name, int64_t size) {
    const View view = take(name, DType::kF16, {size});
    const auto* values = view.as<uint16_t>();
    for (int64_t i = 0; i < size; ++i)
      CHECK((values[i] & 0x7c00) != 0x7c00, at(name, view, i), " is ", half_to_float(values[i]),
            ", expected a finite number");
    return view;
  }

  void manifest(Linear& w) {
    auto entry = linears_.find(w.name);
    CHECK(entry != linears_.end(), "config.json lists no linear ", w.name,
          " in quantization_config: it is damaged, convert the model again");
    const Quantization& quantization = entry->second;
    CHECK(quantization.rows == w.in_padded, "config.json says ", w.name, " has ", quantization.rows,
          " rows, its input of ", w.in, " is padded to ", w.in_padded, ": the manifest belongs to another model");
    CHECK(quantization.r4_block == 1 || w.name.ends_with(".down_proj"), "config.json says ", w.name, " has r4_block ",
          quantization.r4_block, ", only down_proj can have one");
    CHECK(w.in % quantization.r4_block == 0, "config.json says ", w.name, " has r4_block ", quantization.r4_block,
          ", which does not divide its ", w.in, " inputs");
    w.bits = quantization.bits;
    w.r4_block = quantization.r4_block;
    linears_.erase(entry);
  }

  void scales(Linear& w) {
    const std::string name = w.name + ".scales";
    const std::vector<int64_t>& shape = checkpoint_.tensor(name).view.shape;
    w.groups = shape.size() == 2 ? shape[0] : 1;  // any number that the input can be divided into
    w.scales = take(name, DType::kF16, {w.groups, w.out_padded});
    CHECK(w.in_padded % (w.groups * kTile) == 0, name, " in ", checkpoint_.tensor(name).file, " has ", w.groups,
          " groups, which does not divide the ", w.in_padded / kTile, " tiles of ", w.in_padded, " inputs");
    const auto* values = w.scales.as<uint16_t>();
    const int64_t count = w.scales.elements();
    bool fine = true;  // one pass without branches: a small group size makes many scales
    for (int64_t i = 0; i < count; ++i) fine &= (values[i] & 0x7fff) < 0x7c00 && values[i] <= 0x8000;
    for (int64_t i = 0; !fine && i < count; ++i)
      CHECK((values[i] & 0x7fff) < 0x7c00 && values[i] <= 0x8000, at(name, w.scales, i), " is ",
            half_to_float(values[i]), ", a scale is finite and not negative");
    for (int64_t group = 0; group < w.groups; ++group)
      for (int64_t out = w.out; out < w.out_padded; ++out)
        CHECK((values[group * w.out_padded + out] & 0x7fff) == 0, at(name, w.scales, group * w.out_padded + out),
              " is ", half_to_float(values[group * w.out_padded + out]), ", the outputs from ", w.out,
              " on are padding and have scale 0");
  }

  void levels(Linear& w) {
    const std::string name = w.name + ".levels";
    w.levels = take(name, DType::kI8, {int64_t(1) << w.bits});
    const auto* values = w.levels.as<int8_t>();
    for (int64_t i = 0; i < w.levels.elements(); ++i) {
      CHECK(values[i] >= -127, at(name, w.levels, i), " is ", int(values[i]), ", a level is from -127 to 127");
      // Eight bits have 256 codes for 255 levels, so one level has two.
      CHECK(i == 0 || values[i] > values[i - 1] || (w.bits == 8 && values[i] == values[i - 1]), at(name, w.levels, i),
            " is ", int(values[i]), " after ", int(values[i - 1]), ", levels increase");
    }
  }

  const Checkpoint& checkpoint_;
  std::map<std::string, Quantization>& linears_;  // those not taken yet
  std::set<std::string> taken_;
};

}  // namespace

Model load_model(const std::string& folder) {
  auto checkpoint = std::make_shared<const Checkpoint>(folder);
  ConfigFile file = read_config(checkpoint->config_text());
  Loader load(*checkpoint, file);

  Model model;
  model.config = file.config;
  model.config_json = checkpoint->config_text();
  const Config& c = model.config;
  const int64_t queries = c.heads * c.head_dim, keys = c.kv_heads * c.head_dim;
  model.embed = load.linear("model.embed_tokens", c.hidden, c.vocab, false);
  for (int64_t n = 0; n < c.layers; ++n) {
    const std::string layer = sentence("model.layers.", n, ".");
    Layer& l = model.layers.emplace_back();
    l.attention_norm = load.norm(layer + "input_layernorm", c);
    l.mlp_norm = load.norm(layer + "post_attention_layernorm", c);
    l.q = load.linear(layer + "self_attn.q_proj", c.hidden, queries, c.attention_bias);
    l.k = load.linear(layer + "self_attn.k_proj", c.hidden, keys, c.attention_bias);
    l.v = load.linear(layer + "self_attn.v_proj", c.hidden, keys, c.attention_bias);
    l.o = load.linear(layer + "self_attn.o_proj", queries, c.hidden, c.attention_bias);
    l.gate = load.linear(layer + "mlp.gate_proj", c.hidden, c.intermediate, c.mlp_bias);
    l.up = load.linear(layer + "mlp.up_proj", c.hidden, c.intermediate, c.mlp_bias);
    l.down = load.linear(layer + "mlp.down_proj", c.intermediate, c.hidden, c.mlp_bias);
  }
  model.norm = load.norm("model.norm", c);
  model.head = load.linear("lm_head", c.hidden, c.vocab, false);
  load.nothing_left();
  model.checkpoint = std::move(checkpoint);
  return model;
}

void release(const Model& model, const View& view) {
  // Only mapped files: the same call on ordinary memory would clear it.
  if (!view || !model.checkpoint || !model.checkpoint->contains(view.data)) return;
  const auto page = uintptr_t(::sysconf(_SC_PAGESIZE));
  const auto start = reinterpret_cast<uintptr_t>(view.data);
  const uintptr_t begin = (start + page - 1) / page * page, end = (start + uintptr_t(view.bytes())) / page * page;
  if (begin < end) ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
}

}  // namespace halfturn
