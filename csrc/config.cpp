#include "config.h"

#include <algorithm>

#include "check.h"

namespace halfturn {
namespace {

// The fields of one object of config.json. `place` precedes a field's name in messages.
struct Fields {
  const Json& object;
  std::string place;

  // Null where the field is absent or null.
  const Json* optional(std::string_view key) const {
    const Json* value = object.find(key);
    return value && !value->is(Json::Type::kNull) ? value : nullptr;
  }

  const Json& at(std::string_view key) const {
    const Json* value = optional(key);
    CHECK(value, "config.json lacks ", place, key, ": give the folder that `halfturn convert` made");
    return *value;
  }

  int64_t integer(std::string_view key, int64_t low, int64_t high) const {
    const Json& value = at(key);
    CHECK(value.is(Json::Type::kInteger) && value.integer >= low && value.integer <= high, "config.json says ", place,
          key, " is ", shown(value), ", expected a whole number from ", low, " to ", high);
    return value.integer;
  }

  double number(std::string_view key, double low, double high) const {
    const Json& value = at(key);
    CHECK(value.is_number() && value.real >= low && value.real <= high, "config.json says ", place, key, " is ",
          shown(value), ", expected a number from ", low, " to ", high);
    return value.real;
  }

  // Absent means false.
  bool boolean(std::string_view key) const {
    const Json* value = optional(key);
    CHECK(!value || value->is(Json::Type::kBool), "config.json says ", place, key, " is ", shown(*value),
          ", expected true or false");
    return value && value->boolean;
  }

  const std::string& text(std::string_view key) const {
    const Json& value = at(key);
    CHECK(value.is(Json::Type::kString), "config.json says ", place, key, " is ", shown(value), ", expected a string");
    return value.string;
  }

  Fields child(std::string_view key) const {
    const Json& value = at(key);
    CHECK(value.is(Json::Type::kObject), "config.json says ", place, key, " is ", shown(value), ", expected an object");
    return {value, place + std::string(key) + "."};
  }

  // Refuses what this version does not know, where to ignore it would be to misread the weights.
  void only(std::initializer_list<std::string_view> known) const {
    for (const JsonMember& member : object.object)
      CHECK(std::find(known.begin(), known.end(), member.key) != known.end(), "config.json has ", place,
            shown(member.key), ", which this version does not know: upgrade halfturn");
  }
};

RopeScaling read_rope_scaling(const Fields& config) {
  RopeScaling rope;
  if (!config.optional("rope_scaling")) return rope;
  const Fields fields = config.child("rope_scaling");
  const std::string& type = fields.text(fields.optional("rope_type") ? "rope_type" : "type");
  if (type == "default") return rope;
  CHECK(type == "linear" || type == "dynamic" || type == "llama3", "config.json says rope_scaling.rope_type is ",
        shown(type), ", this version runs linear, dynamic and llama3");
  rope.factor = fields.number("factor", 1.0, 1e6);
  if (type == "linear") {
    rope.type = RopeScaling::Type::kLinear;
    return rope;
  }
  if (type == "dynamic") {
    rope.type = RopeScaling::Type::kDynamic;
    return rope;
  }
  rope.type = RopeScaling::Type::kLlama3;
  rope.original_context = double(fields.integer("original_max_position_embeddings", 1, int64_t(1) << 30));
  rope.low_freq_factor = fields.number("low_freq_factor", 1e-3, 1e6);
  rope.high_freq_factor = fields.number("high_freq_factor", 1e-3, 1e6);
  CHECK(rope.high_freq_factor > rope.low_freq_factor, "config.json says rope_scaling.high_freq_factor is ",
        rope.high_freq_factor, " and low_freq_factor ", rope.low_freq_factor, ", expected the first to be larger");
  return rope;
}

Config read_dimensions(const Fields& fields) {
  const std::string& family = fields.text("model_type");
  CHECK(family == "llama", "config.json says model_type is ", shown(family),
        ", this version runs llama: convert the model with `halfturn convert`");
  const std::string& activation = fields.text("hidden_act");
  CHECK(activation == "silu", "config.json says hidden_act is ", shown(activation), ", this version runs silu");
  CHECK(!fields.boolean("tie_word_embeddings"),
        "config.json says tie_word_embeddings is true, a Halfturn checkpoint stores lm_head by itself: convert again");

  Config config;
  config.hidden = fields.integer("hidden_size", 1, kMaxInputs);
  config.intermediate = fields.integer("intermediate_size", 1, kMaxInputs);
  config.layers = fields.integer("num_hidden_layers", 1, kMaxLayers);
  config.heads = fields.integer("num_attention_heads", 1, kMaxInputs);
  config.kv_heads = fields.integer("num_key_value_heads", 1, kMaxInputs);
  config.head_dim = fields.integer("head_dim", 2, kMaxHeadDim);
  config.vocab = fields.integer("vocab_size", 1, kMaxVocab);
  config.max_positions = fields.integer("max_position_embeddings", 1, int64_t(1) << 30);
  config.norm_epsilon = fields.number("rms_norm_eps", 1e-12, 1.0);
  config.rope_theta = fields.number("rope_theta", 1.0, 1e15);
  config.attention_bias = fields.boolean("attention_bias");
  config.mlp_bias = fields.boolean("mlp_bias");
  config.rope_scaling = read_rope_scaling(fields);
  CHECK(config.head_dim % 2 == 0, "config.json says head_dim is ", config.head_dim,
        ", rotary positions need an even one");
  CHECK(config.heads % config.kv_heads == 0, "config.json says num_attention_heads is ", config.heads,
        " and num_key_value_heads ", config.kv_heads, ", expected the first to be a multiple of the second");
  CHECK(config.heads * config.head_dim <= kMaxInputs, "config.json says num_attention_heads * head_dim is ",
        config.heads * config.head_dim, ", at most ", kMaxInputs, " fit the integer products");
  return config;
}

Quantization read_linear(const Fields& linear) {
  linear.only({"segments", "r4_block"});
  const Json& segments = linear.at("segments");
  CHECK(segments.is(Json::Type::kArray) && segments.array.size() == 1, "config.json says ", linear.place,
        "segments is ", shown(segments), ", this version reads an array of exactly 1");
  const Fields segment{segments.array[0], linear.place + "segments[0]."};
  const std::string& codec = segment.text("codec");
  CHECK(codec == "grid", "config.json says ", segment.place, "codec is ", shown(codec),
        ", this version reads grid: upgrade halfturn");
  segment.only({"codec", "bits", "rows"});
  Quantization result;
  result.bits = int(segment.integer("bits", 2, 8));
  result.rows = segment.integer("rows", 1, kMaxInputs);
  if (linear.optional("r4_block")) {
    result.r4_block = linear.integer("r4_block", 1, kMaxInputs);
    CHECK((result.r4_block & (result.r4_block - 1)) == 0, "config.json says ", linear.place, "r4_block is ",
          result.r4_block, ", expected a power of two");
  }
  return result;
}

}  // namespace

ConfigFile read_config(const std::string& text) {
  const Json document = parse_json(text, "config.json");
  CHECK(document.is(Json::Type::kObject), "config.json holds ", shown(document), ", expected an object");
  const Fields fields{document, ""};
  CHECK(fields.optional("quantization_config"),
        "config.json has no quantization_config: this is not a Halfturn checkpoint, make one with `halfturn convert`");
  const Fields quantization = fields.child("quantization_config");
  const std::string& method = quantization.text("quant_method");
  CHECK(method == "halfturn", "config.json says quantization_config.quant_method is ", shown(method),
        ", expected \"halfturn\": convert the original model with `halfturn convert`");
  const int64_t format = quantization.integer("format", 1, int64_t(1) << 30);
  CHECK(format == 1, "the checkpoint has format ", format,
        ", this version reads format 1: it was made by a newer version, upgrade halfturn");

  ConfigFile file;
  file.config = read_dimensions(fields);
  const std::string& rotation = quantization.text("rotation");
  CHECK(rotation == "hadamard" || rotation == "none", "config.json says quantization_config.rotation is ",
        shown(rotation), ", this version knows hadamard and none: upgrade halfturn");
  file.config.rotated = rotation == "hadamard";
  file.config.means = quantization.boolean("means");
  const Fields linears = quantization.child("linears");
  for (const JsonMember& member : linears.object.object) {
    CHECK(member.value.is(Json::Type::kObject), "config.json says ", linears.place, shown(member.key), " is ",
          shown(member.value), ", expected an object");
    file.linears[member.key] = read_linear({member.value, linears.place + shown(member.key) + "."});
  }
  return file;
}

}  // namespace halfturn
