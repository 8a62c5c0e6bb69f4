// What one step of the engine needs.
#pragma once
#include <cstdint>
#include <vector>

namespace halfturn {

class Sampler;

// New tokens of one sequence: tokens[i] stands at position + i. pages[p] is the pool page that holds the positions
// [p * kPageSize, (p + 1) * kPageSize) and covers all positions up to position + tokens.size().
struct Item {
  std::vector<int32_t> tokens;
  int64_t position = 0;
  std::vector<int32_t> pages;
  Sampler* sampler = nullptr;  // null: no token is wanted (a chunk of a longer prompt)
  // Tokens of a prompt, even a single one, or (false) drawn ones, even several: where Engine::decodes_apart(), this
  // chooses the kernels, and how tokens are cut into steps must not.
  bool prompt = false;
};

}  // namespace halfturn
