"""A quantized model as the work folder holds it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from halfturn.converter.architectures import LINEARS, NORMS, ModelConfig
from halfturn.converter.packed import Packed, unpack
from halfturn.converter.work import WorkFolder
from halfturn.converter.write import NORM
from halfturn.error import Error


class Quantized:
    """A quantized model in the work folder, read one layer at a time."""

    def __init__(self, config: ModelConfig, work: WorkFolder, keys: Sequence[tuple[str, Any]]) -> None:
        """keys: (stage, key) of every layer in order, then of the head, then of the embedding."""
        self._config, self._work, self._keys = config, work, keys

    def _read(self, index: int) -> dict[str, Tensor]:
        found = self._work.get(*self._keys[index])
        if found is None:
            raise Error("the work folder changed during the conversion: run the same command again")
        return found[0]

    def packed(self, index: int) -> dict[str, tuple[Packed, Tensor | None]]:
        """Layer `index`'s matrices and biases by short name."""
        read = self._read(index)
        return {name: (unpack(read, name), read.get(f"{name}.bias")) for name in LINEARS}

    def means(self) -> Iterator[tuple[str, Tensor]]:
        """Every norm's full name and mean [hidden], as far as they are known: rounding to nearest sees no states."""
        count = self._config.num_hidden_layers
        for index in range(count + 1):
            read = self._read(index)
            names = {"mean": NORM} if index == count else {f"{n}.mean": f"model.layers.{index}.{n}" for n in NORMS}
            yield from ((names[key], read[key]) for key in names if key in read)

    def table(self, which: str) -> Packed:
        """The packed "head" or "embedding"."""
        return unpack(self._read({"head": -2, "embedding": -1}[which]), "table")

    def layer(self, index: int) -> dict[str, Tensor]:
        """Layer `index` in plain float32."""
        tensors = {f"{norm}.weight": torch.ones(self._config.hidden_size) for norm in NORMS}
        for name, (packed, bias) in self.packed(index).items():
            tensors[f"{name}.weight"] = packed.weight(*self._config.linear_shapes()[name])
            if bias is not None:
                tensors[f"{name}.bias"] = bias
        return tensors

    def embedding(self) -> Tensor:
        return self.table("embedding").weight(self._config.vocab_size, self._config.hidden_size)

    def head(self) -> Tensor:
        return self.table("head").weight(self._config.vocab_size, self._config.hidden_size)
