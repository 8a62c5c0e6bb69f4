// A mark in a stream: for waiting until it is passed or, `timed`, for measuring from one to another.
#pragma once
#include <cuda_runtime_api.h>

#include <memory>

#include "status.h"

namespace halfturn::cuda {

struct DestroyEvent {
  void operator()(cudaEvent_t event) const noexcept { cudaEventDestroy(event); }
};
using Event = std::unique_ptr<CUevent_st, DestroyEvent>;

inline Event make_event(bool timed = false) {
  cudaEvent_t event = nullptr;
  check(cudaEventCreateWithFlags(&event, timed ? cudaEventDefault : cudaEventDisableTiming), "making an event");
  return Event(event);
}

}  // namespace halfturn::cuda
