// A strict JSON reader for files that nobody vouches for: bounded depth, size and count, no duplicate keys.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace halfturn {

struct JsonMember;

struct Json {
  enum class Type : uint8_t { kNull, kBool, kInteger, kReal, kString, kArray, kObject } type = Type::kNull;
  bool boolean = false;
  int64_t integer = 0;  // kInteger: written without fraction or exponent, and within 64 bits
  double real = 0;      // kInteger and kReal, finite
  std::string string;   // UTF-8
  std::vector<Json> array;
  std::vector<JsonMember> object;  // sorted by key

  bool is(Type wanted) const { return type == wanted; }
  bool is_number() const { return type == Type::kInteger || type == Type::kReal; }
  // The member of that name, or null where this is no object or has none.
  const Json* find(std::string_view key) const;
};

struct JsonMember {
  std::string key;
  Json value;
};

constexpr int kJsonDepth = 32;            // objects and arrays within each other
constexpr int64_t kJsonValues = 500'000;  // about nine per tensor: forty thousand tensors
constexpr int64_t kJsonBytes = 16 << 20;

// Reads one document. Throws Error: `what` ("config.json", "the header of model.safetensors"), the byte and the reason.
Json parse_json(std::string_view text, std::string_view what);

// A value from a file as it may stand in an error message: quoted where it is a string, control characters escaped,
// cut where it is long.
std::string shown(std::string_view text);
std::string shown(const Json& value);

// The inverse, for strings: `text` with quotes and escapes. Used where the runtime writes JSON.
std::string quoted(std::string_view text);

}  // namespace halfturn
