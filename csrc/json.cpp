#include "json.h"

#include <algorithm>
#include <charconv>
#include <cmath>

#include "check.h"

namespace halfturn {
namespace {

class Reader {
 public:
  Reader(std::string_view text, std::string_view what) : text_(text), what_(what) {}

  Json document() {
    CHECK(int64_t(text_.size()) <= kJsonBytes, what_, " has ", text_.size(), " bytes of JSON, at most ", kJsonBytes,
          " are read: it is damaged or not a checkpoint's");
    Json value = read(0);
    skip_space();
    CHECK(at_ == text_.size(), where("has something behind its end"));
    return value;
  }

 private:
  std::string where(std::string_view problem) const {
    const std::string place = key_.empty() ? "" : sentence(", behind the key ", shown(key_));
    return sentence(what_, " ", problem, " (byte ", at_, " of ", text_.size(), " of its JSON", place,
                    "): it is damaged, get the file again");
  }

  void skip_space() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\t' || text_[at_] == '\r'))
      ++at_;
  }

  // The next character that is not space; 0 at the end (a zero byte is never valid, so the two need no telling apart).
  char peek() {
    skip_space();
    return at_ < text_.size() ? text_[at_] : '\0';
  }

  bool take(char c) {
    if (peek() != c) return false;
    ++at_;
    return true;
  }

  void word(std::string_view expected) {
    CHECK(text_.substr(at_, expected.size()) == expected, where("has a word that is not JSON"));
    at_ += expected.size();
  }

  Json read(int depth) {
    CHECK(depth < kJsonDepth, where(sentence("nests deeper than ", kJsonDepth, " levels")));
    CHECK(++values_ <= kJsonValues, where(sentence("has more than ", kJsonValues, " values")));
    Json value;
    switch (peek()) {
      case '{': read_object(value, depth); break;
      case '[': read_array(value, depth); break;
      case '"':
        value.type = Json::Type::kString;
        value.string = read_string();
        break;
      case 't': word("true"), value.type = Json::Type::kBool, value.boolean = true; break;
      case 'f': word("false"), value.type = Json::Type::kBool; break;
      case 'n': word("null"); break;
      default: read_number(value);
    }
    return value;
  }

  void read_object(Json& value, int depth) {
    value.type = Json::Type::kObject;
    take('{');
    if (!take('}')) {
      do {
        CHECK(peek() == '"', where("lacks a key in quotes"));
        const size_t begin = at_ + 1;
        JsonMember member{read_string(), {}};
        key_ = text_.substr(begin, at_ - 1 - begin);
        CHECK(take(':'), where(sentence("lacks ':' behind the key ", shown(member.key))));
        member.value = read(depth + 1);
        value.object.push_back(std::move(member));
      } while (take(','));
      CHECK(take('}'), where("has an object that does not end"));
    }
    auto& members = value.object;
    std::sort(members.begin(), members.end(), [](const JsonMember& a, const JsonMember& b) { return a.key < b.key; });
    auto twice = std::adjacent_find(members.begin(), members.end(),
                                    [](const JsonMember& a, const JsonMember& b) { return a.key == b.key; });
    CHECK(twice == members.end(), where(sentence("has the key ", shown(twice->key), " twice")));
  }

  void read_array(Json& value, int depth) {
    value.type = Json::Type::kArray;
    take('[');
    if (take(']')) return;
    do value.array.push_back(read(depth + 1));
    while (take(','));
    CHECK(take(']'), where("has an array that does not end"));
  }

  void read_number(Json& value) {
    const size_t begin = at_;
    auto digits = [&] {
      const size_t first = at_;
      while (at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9') ++at_;
      CHECK(at_ > first, where("has something that is not a JSON value"));
      return first;
    };
    if (at_ < text_.size() && text_[at_] == '-') ++at_;
    const size_t first = digits();
    CHECK(text_[first] != '0' || at_ == first + 1, where("has a number that begins with 0"));
    bool whole = true;
    if (at_ < text_.size() && text_[at_] == '.') ++at_, digits(), whole = false;
    if (at_ < text_.size() && (text_[at_] == 'e' || text_[at_] == 'E')) {
      ++at_;
      if (at_ < text_.size() && (text_[at_] == '-' || text_[at_] == '+')) ++at_;
      digits();
      whole = false;
    }
    const char *from = text_.data() + begin, *to = text_.data() + at_;
    value.type = Json::Type::kReal;
    if (whole && std::from_chars(from, to, value.integer).ec == std::errc()) value.type = Json::Type::kInteger;
    auto real = std::from_chars(from, to, value.real);
    CHECK(real.ec == std::errc() && std::isfinite(value.real),
          where(sentence("has the number ", shown(text_.substr(begin, at_ - begin)), ", which a double can't hold")));
  }

  uint32_t hex4() {
    CHECK(text_.size() - at_ >= 4, where("has a \\u escape that does not end"));
    uint32_t code = 0;
    auto end = std::from_chars(text_.data() + at_, text_.data() + at_ + 4, code, 16);
    CHECK(end.ec == std::errc() && end.ptr == text_.data() + at_ + 4,
          where("has a \\u escape without four hex digits"));
    at_ += 4;
    return code;
  }

  static void append(std::string& out, uint32_t code) {
    if (code < 0x80) {
      out += char(code);
    } else if (code < 0x800) {
      out += {char(0xc0 | (code >> 6)), char(0x80 | (code & 63))};
    } else if (code < 0x10000) {
      out += {char(0xe0 | (code >> 12)), char(0x80 | ((code >> 6) & 63)), char(0x80 | (code & 63))};
    } else {
      out += {char(0xf0 | (code >> 18)), char(0x80 | ((code >> 12) & 63)), char(0x80 | ((code >> 6) & 63)),
              char(0x80 | (code & 63))};
    }
  }

  void read_escape(std::string& out) {
    const char c = at_ < text_.size() ? text_[at_++] : '\0';
    switch (c) {
      case '"':
      case '\\':
      case '/': out += c; return;
      case 'b': out += '\b'; return;
      case 'f': out += '\f'; return;
      case 'n': out += '\n'; return;
      case 'r': out += '\r'; return;
      case 't': out += '\t'; return;
      case 'u': break;
      default: CHECK(false, where("has an unknown escape in a string"));
    }
    uint32_t code = hex4();
    if (code >= 0xd800 && code < 0xdc00 && text_.substr(at_, 2) == "\\u") {
      at_ += 2;
      const uint32_t low = hex4();
      CHECK(low >= 0xdc00 && low < 0xe000, where("has half a surrogate pair"));
      code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
    }
    CHECK(code < 0xd800 || code > 0xdfff, where("has half a surrogate pair"));
    append(out, code);
  }

  // Copies one character of UTF-8, which must be the shortest form of a code point that exists.
  void read_utf8(std::string& out) {
    const auto lead = uint8_t(text_[at_]);
    const int more = lead >= 0xf0 ? 3 : lead >= 0xe0 ? 2 : 1;
    static constexpr uint32_t kFirst[] = {0, 0x80, 0x800, 0x10000};
    CHECK(lead >= 0xc2 && lead <= 0xf4 && text_.size() - at_ > size_t(more), where("is not UTF-8"));
    uint32_t code = lead & (0x3f >> more);
    for (int i = 1; i <= more; ++i) {
      const auto next = uint8_t(text_[at_ + i]);
      CHECK((next & 0xc0) == 0x80, where("is not UTF-8"));
      code = (code << 6) | (next & 63);
    }
    CHECK(code >= kFirst[more] && code <= 0x10ffff && (code < 0xd800 || code > 0xdfff), where("is not UTF-8"));
    out.append(text_, at_, size_t(more) + 1);
    at_ += size_t(more) + 1;
  }

  std::string read_string() {
    std::string out;
    ++at_;
    for (;;) {
      CHECK(at_ < text_.size(), where("has a string that does not end"));
      const auto c = uint8_t(text_[at_]);
      if (c == '"') {
        ++at_;
        return out;
      }
      CHECK(c >= 0x20, where("has a control character in a string"));
      if (c == '\\') {
        ++at_;
        read_escape(out);
      } else if (c < 0x80) {
        out += char(c);
        ++at_;
      } else {
        read_utf8(out);
      }
    }
  }

  std::string_view text_, what_, key_;  // the key read last, as it is spelled
  size_t at_ = 0;
  int64_t values_ = 0;
};

}  // namespace

const Json* Json::find(std::string_view key) const {
  auto at = std::lower_bound(object.begin(), object.end(), key,
                             [](const JsonMember& member, std::string_view k) { return member.key < k; });
  return at != object.end() && at->key == key ? &at->value : nullptr;
}

Json parse_json(std::string_view text, std::string_view what) { return Reader(text, what).document(); }

std::string quoted(std::string_view text) {
  std::string out = "\"";
  for (char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (uint8_t(c) < 0x20 || c == 0x7f) {
      static constexpr char kHex[] = "0123456789abcdef";
      out += "\\u00";
      out += kHex[uint8_t(c) >> 4];
      out += kHex[c & 15];
    } else {
      out += c;
    }
  }
  return out + "\"";
}

std::string shown(std::string_view text) {
  constexpr size_t kLongest = 120;
  if (text.size() <= kLongest) return quoted(text);
  size_t cut = kLongest;
  while (cut > 0 && (uint8_t(text[cut]) & 0xc0) == 0x80) --cut;  // not within a character
  return quoted(text.substr(0, cut)) + "...";
}

std::string shown(const Json& value) {
  switch (value.type) {
    case Json::Type::kNull: return "null";
    case Json::Type::kBool: return value.boolean ? "true" : "false";
    case Json::Type::kInteger: return sentence(value.integer);
    case Json::Type::kReal: return sentence(value.real);
    case Json::Type::kString: return shown(value.string);
    case Json::Type::kArray: return sentence("an array of ", value.array.size());
    case Json::Type::kObject: return sentence("an object of ", value.object.size());
  }
  return "?";
}

}  // namespace halfturn
