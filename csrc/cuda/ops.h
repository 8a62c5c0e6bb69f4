// Every operation of forward.h on the card; cpu/ops.h says what each does.
#pragma once
#include "workspace.h"

namespace halfturn {

using Net = Network<Cuda>;
void embed(Cuda&, const Net&, const Batch&, Workspace<Cuda>&);
void norm(Cuda&, const Net&, const NetworkNorm<Cuda>& norm, int64_t rows, Workspace<Cuda>&);
void query_key_value(Cuda&, const NetworkLayer<Cuda>&, Workspace<Cuda>&);
void rope_and_store(Cuda&, const Net&, const cuda::RopeTable&, cuda::KvCache&, int64_t layer, const Batch&,
                    Workspace<Cuda>&);
void attention(Cuda&, const Net&, const cuda::KvCache&, int64_t layer, const Batch&, Workspace<Cuda>&);
void attention_output(Cuda&, const NetworkLayer<Cuda>&, Workspace<Cuda>&);
void gate_and_up(Cuda&, const NetworkLayer<Cuda>&, Workspace<Cuda>&);
void down(Cuda&, const NetworkLayer<Cuda>&, Workspace<Cuda>&);
// work.logits <- the logits of the rows that device.chosen names.
void head(Cuda&, const Net&, int count, Workspace<Cuda>&);

}  // namespace halfturn
