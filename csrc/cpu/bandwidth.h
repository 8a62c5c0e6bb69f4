// The machine's read bandwidth, as the yardstick for kernels that stream weights.
#pragma once
#include <cstdint>

namespace halfturn {

// Bytes a second that `threads` threads read together from `megabytes` of memory: the best of several passes, with
// several streams a thread. Throws Error if the memory can't be had.
double read_bandwidth(int threads, int64_t megabytes);

}  // namespace halfturn
