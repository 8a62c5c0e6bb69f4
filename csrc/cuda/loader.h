// A checkpoint's weights on the card.
#pragma once
#include "../network.h"
#include "cuda.h"

namespace halfturn::cuda {

// Bytes of the card's memory that load_network will take.
int64_t network_bytes(const Model& model, bool a8);
// Copies all weights as they are in the files, several threads at once. a8: norms get their means where these are worth
// their time, and the matrices that read them biases. Throws Error with the bytes if they don't fit.
Network<Cuda> load_network(const Cuda& device, const Model& model, bool a8, int threads);

}  // namespace halfturn::cuda
