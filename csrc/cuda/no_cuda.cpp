// In place of the CUDA backend where nvcc was not found.
#include "../check.h"
#include "../engine.h"

namespace halfturn {

namespace {

constexpr const char* kMissing =
    "this build of Halfturn has no CUDA backend: install CUDA's nvcc and build it again, or use device=\"cpu\"";

}  // namespace

std::unique_ptr<Engine> open_cuda_engine(const Model&, const EngineOptions&) {
  CHECK(false, "device is \"cuda\", but ", kMissing);
  return nullptr;
}

std::string cuda_problem() { return kMissing; }

int64_t cuda_free_memory() {
  CHECK(false, kMissing);
  return 0;
}

}  // namespace halfturn
