// CUDA's status codes as errors.
#pragma once
#include <driver_types.h>

namespace halfturn::cuda {

// Throws Error naming `what` failed, unless status is cudaSuccess.
void check(cudaError_t status, const char* what);

}  // namespace halfturn::cuda
