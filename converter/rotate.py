"""Orthogonal changes of basis that leave the model's function alone and make its weights and activations near Gaussian.

Row vectors, W is [out, in], y = x W^T. Norm scales are folded into the matrices that read them; then
R1 [hidden, hidden] turns the residual stream, R2 [head_dim, head_dim], one per layer, turns every value head, and
R4, a block Hadamard transform, turns down_proj's input, which the runtime transforms the same way. R3, on queries and
keys after RoPE, changes no weight.

Before that, the channels that one matrix writes and one reads get the scales that the reader is rounded best with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from halfturn.converter.architectures import ModelConfig
from halfturn.error import Error

LARGEST_R4_BLOCK = 1024
SHORTEST_COLUMN = 1 / 32  # of the longest: shorter ones are scaled as if they were this long
VALUE_SHARE = 0.5  # for o_proj, whose pivots differ from head to head: all of it cost SmolLM2's first layer a fifth
_DENSE = 256  # a Hadamard of up to this size is one product; a larger one is two smaller ones
_DENSE_ROTATION = 1024  # up to this size a rotation is kept as one matrix: faster than its factors


@cache
def hadamard_matrix(size: int) -> Tensor:
    """Sylvester's Hadamard matrix [size, size] of +-1 in float32, size a power of two; symmetric."""
    with torch.inference_mode(False):  # it is kept, and may serve a backward pass later
        matrix = torch.ones(1, 1)
        while len(matrix) < size:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        return matrix


def hadamard(x: Tensor, block: int) -> Tensor:
    """Each `block` of the last dimension times H / sqrt(block), which is its own inverse. block: a power of two."""
    if block == 1:
        return x
    inner = block if block <= _DENSE else 2 ** (int(math.log2(block)) // 2)
    y = x.reshape(-1, block // inner, inner) @ hadamard_matrix(inner).to(x.dtype)
    if inner < block:
        y = (y.transpose(1, 2) @ hadamard_matrix(block // inner).to(x.dtype)).transpose(1, 2)
    return (y * block**-0.5).reshape(x.shape)


def power_of_two(size: int, largest: int | None = None) -> int:
    """The largest power of two, up to `largest`, that divides size."""
    power = size & -size
    return min(power, largest) if largest else power


def r4_block(intermediate_size: int, tensor_parallel: int = 2) -> int:
    """The online Hadamard's block: the largest power of two up to 1024 that no split in `tensor_parallel` cuts.

    An odd size has no block of two in a half; its block is 1 (no transform). Raises Error for another split that the
    size can't make.
    """
    if intermediate_size % tensor_parallel:
        if tensor_parallel == 2:
            return 1
        raise Error(
            f"--tensor-parallel {tensor_parallel} doesn't divide the intermediate size {intermediate_size}: "
            "choose a divisor"
        )
    return power_of_two(intermediate_size // tensor_parallel, LARGEST_R4_BLOCK)


def even_factors(lengths: Tensor, share: float = 1.0) -> Tensor:
    """Factors [channels], 1 at most, that columns of these lengths are divided by, and what they read multiplied with.

    Rounding a turned matrix with error feedback costs the mean square of its columns times the mean of the Hessian's
    pivots, whose product is its determinant. As far as the turn makes all pivots alike, the cost is least where all
    columns are as long: factors move the product of the lengths and the determinant in opposite ways. `share` (as a
    power) goes only part of that way.
    """
    longest = lengths.max()
    if not longest > 0:
        return torch.ones_like(lengths)
    return (lengths / longest).clamp(min=SHORTEST_COLUMN) ** share


def even_channels(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """One layer's tensors with other scales of the channels between v_proj and o_proj and up_proj and down_proj.

    The function stays the same: attention and the gate only multiply these channels by what others say. A regauged
    SmolLM2 loses 7 to 9% less at 4 bits.
    """
    t = dict(tensors)
    heads, size = config.num_key_value_heads, config.head_dim

    def scale(writer: str, reader: str, written: Tensor, read: Tensor) -> None:
        t[f"{writer}.weight"] = t[f"{writer}.weight"] * written[:, None]
        if f"{writer}.bias" in t:
            t[f"{writer}.bias"] = t[f"{writer}.bias"] * written
        t[f"{reader}.weight"] = t[f"{reader}.weight"] / read

    down = even_factors(t["mlp.down_proj.weight"].norm(dim=0))
    scale("mlp.up_proj", "mlp.down_proj", down, down)
    out = t["self_attn.o_proj.weight"]
    by_head = out.view(len(out), heads, -1, size)  # [hidden, KV heads, query heads of each, head_dim]
    value = even_factors(by_head.square().sum((0, 2)).sqrt(), VALUE_SHARE)
    read = value[:, None, :].expand(by_head.shape[1:]).reshape(-1)
    scale("self_attn.v_proj", "self_attn.o_proj", value.reshape(-1), read)
    return t


class Orthogonal:
    """A random orthogonal matrix [size, size]: diag(random signs) (H of 2^m Kronecker a random orthogonal K x K).

    size = 2^m K with K odd. The same seed gives the same matrix.
    """

    def __init__(self, size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.size, self.power = size, power_of_two(size)
        odd = size // self.power
        self.signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
        # Q of a Gaussian matrix is uniform over rotations once R's diagonal is positive.
        q, r = torch.linalg.qr(torch.randn(odd, odd, generator=generator, dtype=torch.float64))
        self.small = q * r.diagonal().sign()
        self.dense = self.matrix().float() if size <= _DENSE_ROTATION else None

    def right(self, x: Tensor) -> Tensor:
        """x R over the last dimension."""
        if self.dense is not None and x.dtype == torch.float32:
            return x @ self.dense
        return self._by_factors(x)

    def _by_factors(self, x: Tensor) -> Tensor:
        y = (x * self.signs.to(x.dtype)).reshape(*x.shape[:-1], self.power, -1)
        if self.power > 1:
            y = hadamard(y.transpose(-1, -2), self.power).transpose(-1, -2)
        return (y @ self.small.to(x.dtype)).reshape(x.shape)

    def left(self, x: Tensor) -> Tensor:
        """R^T x, for x of at least two dimensions: the rows of a matrix that writes into the turned space."""
        if self.dense is not None and x.dtype == torch.float32:
            return self.dense.T @ x
        return self._by_factors(x.transpose(-1, -2).contiguous()).transpose(-1, -2)

    def matrix(self) -> Tensor:
        """R itself in float64, for tests and small sizes."""
        return self._by_factors(torch.eye(self.size, dtype=torch.float64))


class Rotation:
    """What is done to a model's tensors before they are quantized; one tensor or one layer at a time.

    kind: "hadamard", or "none", which folds the norms and turns nothing. Everything follows from config and seed.
    """

    def __init__(self, config: ModelConfig, kind: str = "hadamard", seed: int = 0, tensor_parallel: int = 2) -> None:
        if kind not in ("hadamard", "none"):
            raise Error(f"rotation is {kind!r}, it can be hadamard or none")
        self.config, self.kind, self.seed = config, kind, seed
        self.r1 = Orthogonal(config.hidden_size, seed * 1_000_003) if kind == "hadamard" else None
        self.r4_block = r4_block(config.intermediate_size, tensor_parallel) if kind == "hadamard" else 1

    def r2(self, index: int) -> Orthogonal:
        """The turn of layer `index`'s value heads."""
        return Orthogonal(self.config.head_dim, self.seed * 1_000_003 + 1 + index)

    def embedding(self, weight: Tensor) -> Tensor:
        """[vocab, hidden] (or some of its rows) -> the same in the turned space."""
        return self.r1.right(weight) if self.r1 else weight

    def head(self, weight: Tensor, final_norm: Tensor) -> Tensor:
        """[vocab, hidden] (or some of its rows) and the final norm's scale [hidden] -> a head that needs no scale."""
        folded = weight * final_norm
        return self.r1.right(folded) if self.r1 else folded

    def layer(self, index: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One layer's tensors by short name, norms folded (ones remain) and turned."""
        t = dict(tensors)
        for norm, readers in (("input_layernorm", "qkv"), ("post_attention_layernorm", ("gate", "up"))):
            scale = t[f"{norm}.weight"]
            for reader in readers:
                name = f"{'self_attn' if len(reader) == 1 else 'mlp'}.{reader}_proj.weight"
                t[name] = t[name] * scale
            t[f"{norm}.weight"] = torch.ones_like(scale)
        if self.r1 is None:
            return t
        t = even_channels(t, self.config)
        r1, r2, size = self.r1, self.r2(index), self.config.head_dim
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
            t[f"{name}.weight"] = r1.right(t[f"{name}.weight"])
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            t[f"{name}.weight"] = r1.left(t[f"{name}.weight"])
            if f"{name}.bias" in t:
                t[f"{name}.bias"] = r1.right(t[f"{name}.bias"])
        value = t["self_attn.v_proj.weight"]
        t["self_attn.v_proj.weight"] = r2.left(value.reshape(-1, size, value.shape[1])).reshape(value.shape)
        if "self_attn.v_proj.bias" in t:
            bias = t["self_attn.v_proj.bias"]
            t["self_attn.v_proj.bias"] = r2.right(bias.view(-1, size)).reshape(bias.shape)
        out = t["self_attn.o_proj.weight"]
        t["self_attn.o_proj.weight"] = r2.right(out.reshape(out.shape[0], -1, size)).reshape(out.shape)
        t["mlp.down_proj.weight"] = hadamard(t["mlp.down_proj.weight"], self.r4_block)
        return {name: tensor.contiguous() for name, tensor in t.items()}
