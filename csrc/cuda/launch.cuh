// How every kernel is started, and how it waits for the one before it.
//
// On cards that can (compute capability 9.0), a kernel starts while the one before it is still running, so that what
// does not depend on it, above all reading weights, overlaps with its end (programmatic dependent launch). So each
// kernel must call wait_for_previous() before it reads or writes anything that another kernel writes or reads; that
// waits until everything launched earlier is complete and visible. let_next_start() may come at any time, as it only
// says that the next kernel's blocks may become resident.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>

#include "../check.h"
#include "cuda.h"
#include "cuda/ptx.cuh"
#include "status.h"

namespace halfturn::cuda {

// Starts kernel<<<grid, threads, shared, stream>>>(arguments...); `name` is what errors call it. Much shared
// memory (48 KiB with what the kernel has of its own) is asked for here.
//
// Where each block can have a multiprocessor of its own, its memory leaves no room for a second one: several would else
// gather on those that become free first, and have their bandwidth between them. (Half of what a block can have and the
// 48 KiB of its own that a kernel may declare are still less than all, also of the 99 KiB of 8.6 and 8.9.)
template <class... Parameters, class... Arguments>
void launch(const Cuda& device, const char* name, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared,
            Arguments... arguments) {
  if (int64_t(grid.x) * grid.y * grid.z <= device.multiprocessors())
    shared = std::max(shared, size_t(device.shared_memory() / 2 + 1024));
  if (shared > 24 << 10)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)), name);
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = shared;
  config.stream = device.stream();
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &overlap;
  config.numAttrs = device.capability() >= 90 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), name);
}

}  // namespace halfturn::cuda
