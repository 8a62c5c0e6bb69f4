#include "bandwidth.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "../check.h"
#include "cpu.h"
#include "kernels.h"

namespace halfturn {

double read_bandwidth(int threads, int64_t megabytes) {
  CHECK(megabytes >= 1 && megabytes <= 1 << 20, "megabytes is ", megabytes, ", it must be between 1 and ", 1 << 20);
  Cpu cpu(threads, isa_from_name("auto"));
  constexpr int64_t kTask = 1 << 20;
  cpu::Buffer<uint8_t> memory = cpu::buffer<uint8_t>(megabytes * kTask);
  std::memset(memory.get(), 1, size_t(megabytes * kTask));
  std::vector<uint64_t> sums(size_t(cpu.threads()) * 8);  // a cache line each
  double best = 0;
  for (int pass = 0; pass < 7; ++pass) {
    auto start = std::chrono::steady_clock::now();
    cpu.parallel(megabytes, [&](int64_t task, int thread) {
      sums[size_t(thread) * 8] += cpu.kernels().read_bytes(memory.get() + task * kTask, kTask);
    });
    std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, double(megabytes * kTask) / seconds.count());
  }
  uint64_t total = 0;
  for (uint64_t s : sums) total += s;
  CHECK(total, "the memory test read nothing");
  return best;
}

}  // namespace halfturn
