"""What the layers see and how much their outputs matter: input Hessians and output-gradient moments.

A pass holds one layer's tensors and the states between layers. Its products read bfloat16 operands where that is faster
(`fast_products`): these are averages over thousands of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from halfturn.converter.architectures import NORMS, ModelConfig
from halfturn.converter.llama import (
    GROUPS,
    Linear,
    activation,
    attention,
    layer_forward,
    plain_linear,
    rms_norm,
    rope_table,
)
from halfturn.converter.text import draw

BATCH = 16  # sequences that pass through a layer together
HEAD_ROWS = 512  # positions whose logits are in memory together
KEPT_BYTES = 1 << 29  # of the inputs of a layer's down_proj, which are computed twice where they take more
COUPLED = GROUPS[0][:2]  # q and k, whose errors meet in a head's scores
ADDED = (1, 3)  # the groups whose outputs are added to the states: o and down
NORMED = {0: NORMS[0], 2: NORMS[1]}  # the groups that read a norm

Tensors = Mapping[str, Tensor]


class Moment:
    """The mean of y x^T over tokens, [outs, size], gathered in float32. With y = x it is the Hessian of x's readers."""

    def __init__(self, size: int, outs: int | None = None) -> None:
        self.total, self.tokens = torch.zeros(size if outs is None else outs, size), 0

    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        rows = x.reshape(-1, x.shape[-1])
        self.total.addmm_((rows if y is None else y.reshape(len(rows), -1)).T, rows)
        self.tokens += len(rows)

    def mean(self) -> Tensor:
        return self.total / self.tokens


class Mean:
    """The mean of x [..., size] over tokens, [size]."""

    def __init__(self, size: int) -> None:
        self.total, self.tokens = torch.zeros(size, dtype=torch.float64), 0

    def add(self, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        self.total += rows.sum(0)
        self.tokens += len(rows)

    def mean(self) -> Tensor:
        return (self.total / self.tokens).float()


def _halves(x: Tensor) -> Sequence[Tensor]:
    """The rows of x [..., size] in two halves [tokens, size]."""
    return x.reshape(-1, x.shape[-1]).chunk(2)


class Halves:
    """A Moment of each half of the tokens: what both say is no chance."""

    def __init__(self, size: int, outs: int) -> None:
        self.moments = Moment(size, outs), Moment(size, outs)

    def add(self, x: Tensor, y: Tensor) -> None:
        for moment, of_x, of_y in zip(self.moments, _halves(x), _halves(y)):
            moment.add(of_x, of_y)

    def means(self) -> list[Tensor]:
        return [moment.mean() for moment in self.moments]


def first_states(tokens: Tensor, embedding: Tensor) -> list[Tensor]:
    """The input of layer 0 for tokens [sequences, length], in batches [BATCH, length, hidden]."""
    return [F.embedding(batch, embedding) for batch in tokens.split(BATCH)]


@torch.inference_mode()
def advance(config: ModelConfig, tensors: Tensors, states: list[Tensor], r4_block: int) -> None:
    """Moves all states through one layer, in place."""
    rope = rope_table(config, torch.arange(states[0].shape[1]))
    for i, state in enumerate(states):
        states[i] = layer_forward(config, tensors, state, rope, r4_block=r4_block)


@torch.inference_mode()
def layer_hessians(config: ModelConfig, tensors: Tensors, states: list[Tensor], r4_block: int) -> dict[str, Tensor]:
    """The Hessian of each group's input, by the group's first linear; moves all states through the layer."""
    found = {group[0]: Moment(tensors[f"{group[0]}.weight"].shape[1]) for group in GROUPS}
    plain = plain_linear(tensors)

    def watch(name: str, x: Tensor) -> Tensor:
        if name in found:
            found[name].add(x)
        return plain(name, x)

    rope = rope_table(config, torch.arange(states[0].shape[1]))
    for i, state in enumerate(states):
        states[i] = layer_forward(config, tensors, state, rope, linear=watch, r4_block=r4_block)
    return {name: hessian.mean() for name, hessian in found.items()}


@torch.inference_mode()
def head_moments(
    config: ModelConfig, states: list[Tensor], originals: list[Tensor]
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Mean of x x^T, of (x0 - x) x^T over each half of the tokens, and of x; x and x0 are the head's inputs (the norm
    is folded) from both last layers' states."""
    size = config.hidden_size
    hessian, lacks, ones, mean = Moment(size), Halves(size, size), torch.ones(size), Mean(size)
    for state, original in zip(states, originals):
        x = rms_norm(state, ones, config.rms_norm_eps)
        hessian.add(x)
        lacks.add(x, rms_norm(original, ones, config.rms_norm_eps) - x)
        mean.add(x)
    return hessian.mean(), lacks.means(), mean.mean()


class _Path:
    """The states of all batches on their way through one layer, stopped before each group of linears."""

    def __init__(
        self, config: ModelConfig, tensors: Tensors, states: list[Tensor], r4_block: int, kept_bytes: int
    ) -> None:
        self.config, self.tensors, self.states, self.r4_block = config, dict(tensors), states, r4_block
        self.linear = plain_linear(self.tensors)
        self.rope = rope_table(config, torch.arange(states[0].shape[1]))
        self.kept: list[Tensor] = []  # a group's inputs, until it is settled
        tokens = sum(state.shape[0] * state.shape[1] for state in states)
        self.keeps_gated = 4 * tokens * config.intermediate_size <= kept_bytes

    def inputs(self, group: int) -> Iterator[Tensor]:
        """What GROUPS[group] reads, batch by batch; all groups before it must have their final weights."""
        for state in self.states:
            if group == 0:
                yield self._normed(state, "input_layernorm")
            elif group == 1:
                normed = self._normed(state, "input_layernorm")
                self.kept.append(attention(self.config, self.linear, normed, self.rope))
                yield self.kept[-1]
            elif group == 2:
                yield self._normed(state, "post_attention_layernorm")
            else:
                gated = self._gated(state)
                if self.keeps_gated:
                    self.kept.append(gated)
                yield gated

    def settle(self, group: int) -> None:
        """Moves the states past GROUPS[group], whose weights are now final."""
        for i, state in enumerate(self.states):
            if group == 1:
                self.states[i] = state + self.linear("self_attn.o_proj", self.kept[i])
            elif group == 3:
                gated = self.kept[i] if self.keeps_gated else self._gated(state)
                self.states[i] = state + self.linear("mlp.down_proj", gated)
        self.kept = []

    def _normed(self, state: Tensor, name: str) -> Tensor:
        return rms_norm(state, self.tensors[f"{name}.weight"], self.config.rms_norm_eps)

    def _gated(self, state: Tensor) -> Tensor:
        return activation(self.linear, self._normed(state, "post_attention_layernorm"), self.r4_block)


@torch.inference_mode()
def round_layer(
    config: ModelConfig,
    tensors: Tensors,
    states: list[Tensor],
    originals: list[Tensor],
    r4_block: int,
    quantize: Callable[[Sequence[str], Tensor, Sequence[Tensor]], Mapping[str, Tensor]],
    kept_bytes: int = KEPT_BYTES,
) -> dict[str, Tensor]:
    """Quantizes a layer group by group, each on inputs x that everything before it, already quantized, produces.

    quantize(names of a group's linears, mean of x x^T, means of e x^T [outs, in] over each half of the tokens) -> their
    new weights by name. e is what the group's outputs lack: W x0 - W x, x0 the same input in the original model, whose
    states at this layer are `originals`; and where the outputs are added to the states, what those lack. Moves both
    kinds of states through the layer, with the same operations as `advance`, so that a resumed conversion sees the same
    bits. Returns the mean [hidden] of x by the norm that gives it.
    """
    new, old = (_Path(config, tensors, both, r4_block, kept_bytes) for both in (states, originals))
    means = {}
    for number, group in enumerate(GROUPS):
        weight = torch.cat([tensors[f"{name}.weight"] for name in group])
        outs, size = weight.shape
        added = number in ADDED
        normed = number in NORMED
        hessian, lacks, mean = Moment(size), Halves(size, outs if added else size), Mean(size)
        for i, (x, x0) in enumerate(zip(new.inputs(number), old.inputs(number))):
            hessian.add(x)
            if normed:
                mean.add(x)
            lacks.add(x, F.linear(x0 - x, weight) + old.states[i] - new.states[i] if added else x0 - x)
        pulls = lacks.means() if added else [weight @ half for half in lacks.means()]
        weights = quantize(group, hessian.mean(), pulls)
        new.tensors.update({f"{name}.weight": rounded for name, rounded in weights.items()})
        if normed:
            means[NORMED[number]] = mean.mean()
        new.settle(number)
        old.settle(number)
    return means


@dataclass
class Sensitivity:
    """How much a linear's outputs matter, and on which inputs.

    moment: [out], the mean square over tokens of the gradient of log p(y) at each output. hessian: [in, in], the mean
    of x x^T over tokens, each weighted by its share of that gradient: tokens that are easily pushed often have unusual
    inputs. blocks: of q and k [2, heads, head_dim, head_dim], the mean of g g^T, g a head's gradient, over each half of
    the tokens.
    """

    moment: Tensor
    hessian: Tensor
    blocks: Tensor | None = None


def sensitivities(
    config: ModelConfig,
    layer: Callable[[int], Tensors],
    embedding: Tensor,
    norm: Tensor,
    head: Tensor,
    tokens: Tensor,
    r4_block: int,
    seed: int,
) -> Iterator[tuple[int, dict[str, Sensitivity]]]:
    """(layer, by short name) from the last layer to the first, after (number of layers, {"lm_head": ...}).

    tokens [sequences, length]; y is drawn from the model itself at every position. The forward pass keeps each layer's
    input; the backward pass runs one layer again at a time.
    """
    count = config.num_hidden_layers
    states = first_states(tokens, embedding)
    inputs = []
    for index in range(count):
        inputs.append(list(states))
        advance(config, layer(index), states, r4_block)
    gradients, found_head = _head_gradients(config, norm, head, states, seed)
    yield count, {"lm_head": found_head.mean()}
    rope = rope_table(config, torch.arange(tokens.shape[1]))
    for index in reversed(range(count)):
        tensors = layer(index)
        plain = plain_linear(tensors)
        found = {}
        for name in (name for group in GROUPS for name in group):
            outs, ins = tensors[f"{name}.weight"].shape
            found[name] = _Gathering(outs, ins, config.head_dim if name in COUPLED else 0)

        def watch(name: str, x: Tensor, plain: Linear = plain, found: dict[str, _Gathering] = found) -> Tensor:
            def gather(gradient: Tensor) -> None:
                found[name].add(x.detach(), gradient.square())
                found[name].add_blocks(gradient)

            y = plain(name, x)
            y.register_hook(gather)
            return y

        for i, state in enumerate(inputs.pop()):
            x = state.clone().requires_grad_()
            out = layer_forward(config, tensors, x, rope, linear=watch, r4_block=r4_block)
            (gradients[i],) = torch.autograd.grad(out, x, gradients[i])
        yield index, {name: gathered.mean() for name, gathered in found.items()}


def statistics_bytes(config: ModelConfig, predict: bool) -> int:
    """About what a model's sensitivities take by halves; predict: what its layer_hessians() and the head's take too."""

    def triangle(size: int) -> int:
        return size * (size + 1) // 2

    c, shapes = config, config.linear_shapes()
    blocks = 2 * (c.num_attention_heads + c.num_key_value_heads) * c.head_dim**2
    layer = sum(outs + triangle(ins) for outs, ins in shapes.values()) + blocks
    if predict:
        layer += sum(triangle(shapes[group[0]][1]) for group in GROUPS)
    return 4 * (layer * c.num_hidden_layers + triangle(c.hidden_size) * (2 if predict else 1) + c.vocab_size)


class _Gathering:
    """Sums for one Sensitivity."""

    def __init__(self, outs: int, ins: int, block: int = 0) -> None:
        self.squares, self.products, self.tokens = torch.zeros(outs), torch.zeros(ins, ins), 0
        self.blocks = torch.zeros(2, outs // block, block, block) if block else None

    def add(self, x: Tensor, squares: Tensor) -> None:
        """x [..., in] and the squared gradients [..., out] of the same tokens."""
        rows, squares = x.reshape(-1, x.shape[-1]), squares.reshape(-1, squares.shape[-1])
        self.squares += squares.sum(0)
        self.products.addmm_((rows * squares.sum(1, keepdim=True)).T, rows)
        self.tokens += len(rows)

    def add_blocks(self, gradients: Tensor) -> None:
        """The gradients [..., out] of the tokens that add() was given."""
        if self.blocks is None:
            return
        size = self.blocks.shape[-1]
        for total, half in zip(self.blocks, _halves(gradients)):
            heads = half.view(len(half), -1, size).transpose(0, 1)
            total.baddbmm_(heads.transpose(1, 2), heads)

    def mean(self) -> Sensitivity:
        weight = self.squares.sum().clamp(min=torch.finfo(torch.float32).tiny)
        hessian = (self.products + self.products.T) / (2 * weight)
        blocks = None if self.blocks is None else self.blocks * (2 / self.tokens)
        return Sensitivity(self.squares / self.tokens, hessian, blocks)


def _head_gradients(
    config: ModelConfig, norm: Tensor, head: Tensor, states: Sequence[Tensor], seed: int
) -> tuple[list[Tensor], _Gathering]:
    """Gradients of log p(y) at the last states, and the head's own squares, whose mean over y is p (1 - p)."""
    generator = torch.Generator().manual_seed(seed)
    gradients, found = [], _Gathering(*head.shape)
    for state in states:
        parts = []
        for rows in state.reshape(-1, state.shape[-1]).split(HEAD_ROWS):
            x = rows.clone().requires_grad_()
            normed = rms_norm(x, norm, config.rms_norm_eps)
            log_p = F.linear(normed, head).log_softmax(-1)
            p = log_p.detach().exp()
            y = draw(log_p.detach(), generator)
            parts.append(torch.autograd.grad(log_p.gather(1, y[:, None]).sum(), x)[0])
            found.add(normed.detach(), p - p.square())
        gradients.append(torch.cat(parts).view(state.shape))
    return gradients, found
