"""The canonical model in plain torch, one layer at a time: what the converter measures and what tests compare with.

A layer is a dict of its tensors under Hugging Face's short names ("self_attn.q_proj.weight"), so that a model streams
through memory. Shapes: hidden [batch, tokens, hidden]; everything is computed in the dtype of the tensors, norms and
rotary tables in float32 as transformers does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from halfturn.converter.architectures import ModelConfig
from halfturn.converter.rotate import hadamard

# Linears that read the same input, in the order in which a layer computes them.
GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)

Linear = Callable[[str, Tensor], Tensor]  # (short name of a linear, its input) -> its output


class Cache:
    """Keys and values of one layer, [batch, kv_heads, capacity, head_dim] each, filled from position 0."""

    def __init__(self, config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype) -> None:
        shape = (batch, config.num_key_value_heads, capacity, config.head_dim)
        self.keys, self.values, self.length = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype), 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the new tokens and returns all keys and values so far."""
        end = self.length + keys.shape[2]
        self.keys[:, :, self.length : end], self.values[:, :, self.length : end] = keys, values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


@contextmanager
def fast_products(enabled: bool = True) -> Iterator[None]:
    """float32 products read their operands as bfloat16 (sums stay float32) where the CPU has instructions for it.

    For statistics over many tokens, where a relative error of 2^-9 a factor averages out: 2.4 times faster on AMX.
    Elsewhere (also with a torch before 2.9), and for what is measured or written, products stay exact.
    """
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is None or not hasattr(matmul, "fp32_precision"):
        yield
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16" if enabled else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


# --- pieces of a layer ------------------------------------------------------------------------------------------------


def inverse_frequencies(config: ModelConfig, length: int) -> Tensor:
    """Rotary inverse frequencies [head_dim / 2] for a sequence of `length` tokens (only "dynamic" depends on it)."""
    scaling = config.rope_scaling or {"rope_type": "default"}
    kind, base, size = scaling["rope_type"], config.rope_theta, config.head_dim
    if kind == "dynamic" and size > 2:  # the one frequency of a head of 2 is 1 whatever the base
        limit = config.max_position_embeddings
        grown = scaling["factor"] * max(length, limit) / limit - (scaling["factor"] - 1)
        base = base * grown ** (size / (size - 2))
    frequency = 1.0 / (base ** (torch.arange(0, size, 2, dtype=torch.float32) / size))
    if kind == "linear":
        return frequency / scaling["factor"]
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
        smooth = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - smooth) * frequency / scaling["factor"] + smooth * frequency
    return frequency


def rope_table(config: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [tokens, head_dim] in float32 at integer positions [tokens]."""
    angle = positions.float()[:, None] * inverse_frequencies(config, int(positions.max()) + 1)
    angle = torch.cat([angle, angle], 1)
    return angle.cos(), angle.sin()


def apply_rope(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates x [..., tokens, head_dim], whose halves are the pairs' two coordinates."""
    cos, sin = (table.to(x.dtype) for table in rope)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension."""
    wide = x if x.dtype == torch.float64 else x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def plain_linear(tensors: Mapping[str, Tensor]) -> Linear:
    """x W^T + b with a layer's own tensors."""
    return lambda name, x: F.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))


def attention(
    config: ModelConfig, linear: Linear, x: Tensor, rope: tuple[Tensor, Tensor], cache: Cache | None = None
) -> Tensor:
    """The input of o_proj [batch, tokens, heads * head_dim], from the normalised input of q, k and v."""
    batch, tokens, _ = x.shape
    q, k, v = (linear(name, x).view(batch, tokens, -1, config.head_dim).transpose(1, 2) for name in GROUPS[0])
    q, k = apply_rope(q, rope), apply_rope(k, rope)
    past = 0
    if cache is not None:
        past = cache.length
        k, v = cache.append(k, v)
    group = config.num_attention_heads // config.num_key_value_heads
    if tokens == 1:
        # A new token sees everything, so the query heads of one key head can be rows of one product.
        out = F.scaled_dot_product_attention(q.reshape(batch, -1, group, config.head_dim), k, v)
    elif past:
        seen = torch.ones(tokens, past + tokens, dtype=torch.bool).tril(past)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=group > 1)
    else:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=group > 1)
    return out.reshape(batch, -1, tokens, config.head_dim).transpose(1, 2).reshape(batch, tokens, -1)


def activation(linear: Linear, x: Tensor, r4_block: int = 1) -> Tensor:
    """The input of down_proj [batch, tokens, intermediate], Hadamard-transformed in blocks where the file says so."""
    return hadamard(F.silu(linear("mlp.gate_proj", x)) * linear("mlp.up_proj", x), r4_block)


# --- whole layers and models ------------------------------------------------------------------------------------------


def layer_forward(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    hidden: Tensor,
    rope: tuple[Tensor, Tensor],
    cache: Cache | None = None,
    linear: Linear | None = None,
    r4_block: int = 1,
) -> Tensor:
    """One decoder layer: hidden -> hidden. `linear` replaces the seven products, to watch or to change them."""
    linear = linear or plain_linear(tensors)
    x = rms_norm(hidden, tensors["input_layernorm.weight"], config.rms_norm_eps)
    hidden = hidden + linear("self_attn.o_proj", attention(config, linear, x, rope, cache))
    x = rms_norm(hidden, tensors["post_attention_layernorm.weight"], config.rms_norm_eps)
    return hidden + linear("mlp.down_proj", activation(linear, x, r4_block))


def logits(config: ModelConfig, hidden: Tensor, norm: Tensor, head: Tensor) -> Tensor:
    """[..., vocab] from the last layer's states [..., hidden], the final norm [hidden] and the head [vocab, hidden]."""
    return F.linear(rms_norm(hidden, norm, config.rms_norm_eps), head)


def final_states(
    config: ModelConfig,
    embedding: Tensor,
    layers: Iterator[Mapping[str, Tensor]],
    tokens: Tensor,
    r4_block: int = 1,
    batch: int = 8,
) -> Tensor:
    """States after the last layer [sequences, length, hidden] of tokens [sequences, length], `batch` rows at a time."""
    rope = rope_table(config, torch.arange(tokens.shape[1]))
    states = list(F.embedding(tokens, embedding).split(batch))
    for tensors in layers:
        for i, state in enumerate(states):
            states[i] = layer_forward(config, tensors, state, rope, r4_block=r4_block)
    return torch.cat(states)
