// Every operation of forward.h on the CPU; cuda/ops.h has those of cards. Rows are a step's tokens.
#pragma once
#include "../network.h"
#include "../pages.h"
#include "../rope.h"
#include "workspace.h"

namespace halfturn {

// work.x <- embedding of each token.
void embed(Cpu&, const Network<Cpu>&, const Batch&, Workspace<Cpu>&);
// work.input <- RMSNorm(work.x) * weight, in the form that products read.
void norm(Cpu&, const Network<Cpu>&, const NetworkNorm<Cpu>& norm, int64_t rows, Workspace<Cpu>&);
// work.q, work.k, work.v <- work.input.
void query_key_value(Cpu&, const NetworkLayer<Cpu>&, Workspace<Cpu>&);
// Rotates work.q and work.k, and writes keys and values of the batch's rows into the pool.
void rope_and_store(Cpu&, const Network<Cpu>&, const Rope&, KvPool&, int64_t layer, const Batch&, Workspace<Cpu>&);
// work.attended <- attention of work.q over each row's own sequence.
void attention(Cpu&, const Network<Cpu>&, const KvPool&, int64_t layer, const Batch&, Workspace<Cpu>&);
// work.x += o_proj(work.attended).
void attention_output(Cpu&, const NetworkLayer<Cpu>&, Workspace<Cpu>&);
// work.mlp <- silu(gate_proj(work.input)) * up_proj(work.input).
void gate_and_up(Cpu&, const NetworkLayer<Cpu>&, Workspace<Cpu>&);
// work.x += down_proj(block Hadamard of work.mlp).
void down(Cpu&, const NetworkLayer<Cpu>&, Workspace<Cpu>&);
// work.logits [rows.size(), vocab padded] <- lm_head(RMSNorm(work.x)) of the given rows of the batch.
void head(Cpu&, const Network<Cpu>&, const int64_t* rows, int64_t count, Workspace<Cpu>&);

}  // namespace halfturn
