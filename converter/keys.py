"""What each result of a conversion is filed under in the work folder: everything that its numbers depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from halfturn.converter.architectures import LINEARS
from halfturn.converter.checkpoint import Source
from halfturn.converter.codecs.grid import SWEEPS
from halfturn.converter.costs import ROWS
from halfturn.converter.gptq import DAMPING, NEAR, PARTS, ROW_DAMPING
from halfturn.converter.recipe import Recipe
from halfturn.converter.text import Texts, has_bfloat16

VERSION = 4  # of the cached results: raise it when the same key would give other numbers
MOMENT_TOKENS = 4096
COST_TOKENS = 16384  # for Hessians of predicted costs

Key = dict[str, Any]
Widths = Sequence[Mapping[str, int]]  # one dict a layer: short name -> bits


def machine_key(source: Source) -> Key:
    """Of the source, and of what computes here."""
    return {
        "version": VERSION,
        "source": source.fingerprint(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "bfloat16": has_bfloat16(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


class Keys:
    """Of one recipe; `groups`: of scales, by a linear's short name. Index num_hidden_layers is the head."""

    def __init__(
        self, machine: Key, texts: Texts, recipe: Recipe, layers: int, r4_block: int, groups: Mapping[str, int]
    ) -> None:
        self._machine, self._texts, self._recipe = machine, texts, recipe
        self._layers, self._r4_block, self._groups = layers, r4_block, groups

    @cached_property
    def _statistics(self) -> Key:
        turned = [self._recipe.rotation, self._recipe.seed, self._r4_block]
        return {**self._texts.key, "rotation": turned}

    def sensitivity(self, index: int) -> Key:
        return {**self._statistics, "moment_tokens": MOMENT_TOKENS, "layer": index}

    def blocks(self, index: int) -> Key:
        """Of Sensitivity.blocks: rounding needs these few numbers without the Hessians beside them."""
        return {**self.sensitivity(index), "part": "blocks"}

    def hessians(self) -> list[Key]:
        """Of the layers and the head."""
        return [{**self._statistics, "cost_tokens": COST_TOKENS, "layer": i} for i in range(self._layers + 1)]

    def costs(self) -> list[Key]:
        """Of the layers and the head."""
        how = {**self._statistics, "rounding": self._recipe.rounding, "groups": self._groups, "damping": DAMPING}
        how |= {"rows": ROWS, "parts": [PARTS, ROW_DAMPING]}
        layers = [{**how, "layer": i} for i in range(self._layers)]
        return [*layers, {**how, "head": self._recipe.head_bits}]

    def build(self, widths: Widths) -> list[tuple[str, Key]]:
        """(stage, key) of the layers, the head and the embedding."""
        r = self._recipe
        layers = [("layers", self._layer(widths, i)) for i in range(self._layers)]
        embedding = {**self._machine, "rotation": [r.rotation, r.seed], "bits": r.embed_bits}
        return [*layers, ("heads", self._head(widths)), ("embeddings", embedding)]

    def reference(self) -> Key:
        """Of the source's answers on held-out text."""
        held_out = hashlib.sha256(self._texts.held_out.numpy().tobytes()).hexdigest()
        return {**self._texts.key, "held_out": held_out}

    def _rounding(self) -> Key:
        r = self._recipe
        how = {"rounding": r.rounding, "groups": self._groups}
        if r.rounding == "rtn":
            return {**self._machine, **how, "rotation": [r.rotation, r.seed, self._r4_block]}
        return {
            **self._statistics,
            **how,
            "embed": r.embed_bits,
            "gptq": [DAMPING, SWEEPS, NEAR, PARTS, ROW_DAMPING, MOMENT_TOKENS],
            "means": True,
        }

    def _layer(self, widths: Widths, index: int) -> Key:
        # With error feedback a layer depends on all layers before it, whose states it was rounded on.
        chain = widths[: index + 1] if self._recipe.rounding == "gptq" else widths[index : index + 1]
        return {**self._rounding(), "layer": index, "widths": [[w[name] for name in LINEARS] for w in chain]}

    def _head(self, widths: Widths) -> Key:
        last = self._layer(widths, self._layers - 1) if self._recipe.rounding == "gptq" else {}
        return {**self._rounding(), **last, "head": self._recipe.head_bits}
