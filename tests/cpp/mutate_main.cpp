// Stands in for libFuzzer where there is no clang: mutate_main RUNS SEED FILE... calls the target with random changes
// of the files. No coverage guides it, so it finds less; it needs nothing but the compiler.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

int main(int count, char** arguments) {
  std::vector<std::string> corpus;
  for (int i = 3; i < count; ++i) {
    std::ifstream file(arguments[i], std::ios::binary);
    corpus.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  }
  if (corpus.empty()) {
    std::fprintf(stderr, "usage: mutate_main RUNS SEED FILE...\n");
    return 2;
  }
  const int runs = std::atoi(arguments[1]);
  std::mt19937 random(unsigned(std::atoi(arguments[2])));
  auto below = [&](size_t limit) { return limit ? size_t(random()) % limit : 0; };
  const std::vector<std::string> words = {"0",   "-1", "4294967296", "9223372036854775807",  "1e308", "null",    "[",
                                          "{",   "\"", ",",          "18446744073709551615", "../",   "\\u0000", "\xff",
                                          "F16", "I8", "true"};
  for (int run = 0; run < runs; ++run) {
    std::string input = corpus[below(corpus.size())];
    for (size_t changes = 1 + below(4); changes > 0; --changes) {
      const size_t at = below(input.size()), length = below(std::min<size_t>(32, input.size() - at));
      switch (below(6)) {
        case 0: input[at] = char(random()); break;
        case 1: input[at] ^= char(1 << below(8)); break;
        case 2: input.erase(at, length); break;
        case 3: input.insert(at, words[below(words.size())]); break;
        case 4: input.replace(at, length, words[below(words.size())]); break;
        case 5: input.insert(below(input.size()), input.substr(at, length)); break;
      }
      if (input.empty()) input = " ";
    }
    LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(input.data()), input.size());
  }
  std::printf("%d runs\n", runs);
}
