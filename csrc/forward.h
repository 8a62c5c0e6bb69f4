// The whole model, top to bottom. Every operation is declared in cpu/ops.h and cuda/ops.h: include one of them first.
#pragma once
#include "network.h"

namespace halfturn {

// Runs the layers on all rows of the batch; leaves the hidden states in work.x [rows, hidden].
template <class Device, class Rope, class KvCache, class Workspace>
void forward(Device& device, const Network<Device>& net, const Rope& rope, KvCache& kv, const Batch& batch,
             Workspace& work) {
  embed(device, net, batch, work);
  for (size_t i = 0; i < net.layers.size(); ++i) {
    const NetworkLayer<Device>& layer = net.layers[i];
    norm(device, net, layer.attention_norm, batch.rows(), work);
    query_key_value(device, layer, work);
    rope_and_store(device, net, rope, kv, int64_t(i), batch, work);
    attention(device, net, kv, int64_t(i), batch, work);
    attention_output(device, layer, work);
    norm(device, net, layer.mlp_norm, batch.rows(), work);
    gate_and_up(device, layer, work);
    down(device, layer, work);
  }
}

}  // namespace halfturn
