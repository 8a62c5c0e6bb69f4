// A fuzz target: the input is config.json, 0x1e, model.safetensors.index.json (empty: none), 0x1e, the weight file.
// With clang: -fsanitize=fuzzer. Without: mutate_main.cpp.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <string_view>

#include "use_model.h"

namespace {

constexpr char kSeparator = 0x1e;  // never a part of valid JSON

struct Folder {
  std::string path;
  Folder() {
    std::string name = (std::filesystem::temp_directory_path() / "halfturn-fuzz-XXXXXX").string();
    if (!::mkdtemp(name.data())) std::abort();
    path = name;
  }
  ~Folder() { std::filesystem::remove_all(path); }
};

void write(const std::string& path, std::string_view data) {
  std::FILE* file = std::fopen(path.c_str(), "wb");
  if (!file || std::fwrite(data.data(), 1, data.size(), file) != data.size()) std::abort();
  std::fclose(file);
}

std::string_view take_part(std::string_view& rest) {
  const size_t end = rest.find(kSeparator);
  const std::string_view part = rest.substr(0, end);
  rest = end == std::string_view::npos ? "" : rest.substr(end + 1);
  return part;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const Folder folder;
  std::string_view rest(reinterpret_cast<const char*>(data), size);
  write(folder.path + "/config.json", take_part(rest));
  const std::string_view index = take_part(rest);
  const std::string single = folder.path + "/model.safetensors", list = single + ".index.json";
  if (index.empty()) {
    ::unlink(list.c_str());
    write(single, rest);
  } else {
    ::unlink(single.c_str());
    write(list, index);
    write(folder.path + "/shard.safetensors", rest);
  }
  bool usable = false;
  try {
    const halfturn::Model model = halfturn::load_model(folder.path);
    usable = true;
    halfturn::use_linear(model.layers.back().down);  // one is enough here: load_folders.cpp uses them all
    halfturn::inspect_json(model);
  } catch (const halfturn::Error& error) {
    if (usable) std::fprintf(stderr, "loaded, but: %s\n", error.what()), std::abort();
  }
  return 0;
}
