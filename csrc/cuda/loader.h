// A checkpoint's weights on the card.
#pragma once
#include "../network.h"
#include "cuda.h"

namespace halfturn::cuda {

// Bytes of the card's memory that load_network will take.
int64_t network_bytes(const Model& model);
// Copies all weights as they are in the files, several threads at once. Throws Error with the bytes if they don't fit.
Network<Cuda> load_network(const Cuda& device, const Model& model, int threads);

}  // namespace halfturn::cuda
