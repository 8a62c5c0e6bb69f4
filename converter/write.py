"""Writes a Halfturn checkpoint: every size is known before the first byte, every tensor goes straight to its place.

The folder is built as a hidden sibling, `.OUT.partial`, and renamed at the end, so OUT is complete or absent. The same
tensors give the same bytes: no times, no random names, one fixed order. numpy only.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from halfturn.converter.architectures import NORMS, ModelConfig
from halfturn.converter.codecs.tiles import TILE, round_up
from halfturn.converter.out_folder import OutFolder, check_disk
from halfturn.error import Error

FORMAT = 1
EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
NORM = "model.norm"
SHARD_BYTES = 4_000_000_000
RESERVED_BYTES = 64_000_000  # for tokenizer, card, plots
HEADER_ALIGNMENT = 32  # codes follow the header and a tile is 32*bits bytes: all tiles of a mapped file are aligned
DTYPES: dict[str, np.dtype[Any]] = {  # in file order, so that each tensor is aligned to its own type
    "U32": np.dtype("<u4"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I8": np.dtype("i1"),
}


class Planned(NamedTuple):
    """A tensor that will be written: name, safetensors dtype, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return DTYPES[self.dtype].itemsize * int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class LinearPlan:
    """How one matrix [outs, ins] is stored: one grid segment, `groups` scales a row, its online Hadamard."""

    outs: int
    ins: int
    bits: int
    groups: int = 1
    bias: bool = False
    r4_block: int = 1

    def __post_init__(self) -> None:
        if self.groups < 1 or round_up(self.ins) % (self.groups * TILE):
            raise Error(f"{self.groups} groups don't divide {round_up(self.ins)} inputs in multiples of {TILE}")

    def tensors(self, name: str) -> list[Planned]:
        outs, ins = round_up(self.outs), round_up(self.ins)
        planned = [
            Planned(f"{name}.codes", "U32", (ins // TILE, outs // TILE, 8 * self.bits)),
            Planned(f"{name}.scales", "F16", (self.groups, outs)),
            Planned(f"{name}.levels", "I8", (2**self.bits,)),
        ]
        return [*planned, Planned(f"{name}.bias", "F32", (self.outs,))] if self.bias else planned

    @property
    def bytes(self) -> int:
        """Bytes in the file, all overhead included."""
        return sum(tensor.bytes for tensor in self.tensors(""))

    def manifest(self) -> dict[str, Any]:
        entry: dict[str, Any] = {"segments": [{"codec": "grid", "bits": self.bits, "rows": round_up(self.ins)}]}
        return {**entry, "r4_block": self.r4_block} if self.r4_block > 1 else entry


def plan_linears(
    config: ModelConfig, bits: Mapping[str, int], groups: Mapping[str, int] | int = 1, r4_block: int = 1
) -> dict[str, LinearPlan]:
    """Full name -> LinearPlan in file order: embedding, layers, head. bits: by full name without ".weight"."""

    def plan(name: str, shape: tuple[int, int], bias: bool = False) -> LinearPlan:
        if name not in bits:
            raise Error(f"no width was chosen for {name}")
        count = groups if isinstance(groups, int) else groups.get(name, 1)
        block = r4_block if name.endswith("mlp.down_proj") else 1
        return LinearPlan(shape[0], shape[1], bits[name], count, bias, block)

    table = (config.vocab_size, config.hidden_size)
    linears = {EMBEDDING: plan(EMBEDDING, table)}
    for index in range(config.num_hidden_layers):
        for short, shape in config.linear_shapes().items():
            name = f"model.layers.{index}.{short}"
            bias = config.attention_bias if short.startswith("self_attn") else config.mlp_bias
            linears[name] = plan(name, shape, bias)
    linears[HEAD] = plan(HEAD, table)
    return linears


def plan_norms(config: ModelConfig, means: bool) -> list[Planned]:
    """The norms' weights, and their means where the checkpoint has them."""
    layers = [f"model.layers.{i}.{norm}" for i in range(config.num_hidden_layers) for norm in NORMS]
    parts = ("weight", "mean") if means else ("weight",)
    return [Planned(f"{norm}.{part}", "F16", (config.hidden_size,)) for norm in [*layers, NORM] for part in parts]


def bits_per_weight(config: ModelConfig, linears: Mapping[str, LinearPlan], means: bool = False) -> dict[str, float]:
    """Decoder, file and bytes, from the plan alone.

    "decoder": the layers' linears with scales, levels, biases and padding, over their weights. "file": all tensors over
    the source's weights, a tied embedding counted once. "bytes": of all tensors.
    """
    decoder = [plan for name, plan in linears.items() if name not in (EMBEDDING, HEAD)]
    norms = sum(norm.bytes for norm in plan_norms(config, means))
    total = norms + sum(plan.bytes for plan in linears.values())
    return {
        "decoder": 8 * sum(plan.bytes for plan in decoder) / sum(plan.outs * plan.ins for plan in decoder),
        "file": 8 * total / config.parameters(),
        "bytes": total,
    }


class Writer:
    """A checkpoint being written to OUT, which is taken as OutFolder takes it if it isn't one already.

    folder: where files may be added before `finish` (allocation.json, ...). bytes: of all tensors.
    """

    def __init__(
        self,
        out: str | Path | OutFolder,
        config: ModelConfig,
        linears: Mapping[str, LinearPlan],
        *,
        rotation: str,
        means: bool = False,
        overwrite: bool = False,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        """means: the norms' means will be written too (write_mean)."""
        if rotation not in ("hadamard", "none"):
            raise Error(f"rotation is {rotation!r}, it can be hadamard or none")
        self.config, self.linears, self._rotation, self._means = config, dict(linears), rotation, means
        self._shards = _split(_all_tensors(config, linears, means), shard_bytes)
        self.bytes = sum(tensor.bytes for shard in self._shards for tensor in shard)
        self._files: list[IO[bytes]] = []
        self._places: dict[str, tuple[IO[bytes], int, Planned]] = {}
        self._written: set[str] = set()
        self._out = out if isinstance(out, OutFolder) else OutFolder(out, overwrite)
        self.out, self.folder = self._out.out, self._out.folder
        try:
            check_disk(self.out.parent, self.bytes + RESERVED_BYTES)
            self._lay_out()
            for planned in plan_norms(config, means=False):
                self.write(planned.name, np.ones(planned.shape, np.float16))
        except BaseException:
            self.abort()
            raise

    def write_linear(
        self,
        name: str,
        tiles: np.ndarray,
        scales: np.ndarray,
        levels: np.ndarray,
        bias: np.ndarray | None = None,
    ) -> None:
        """One matrix: tiles uint32 (codecs/tiles.py), scales float16 [groups, outs padded], levels int8, bias float."""
        plan = self.linears.get(name)
        if plan is None:
            raise Error(f"{name} is not a linear of this checkpoint")
        if (bias is not None) != plan.bias:
            raise Error(f"{name} {'has' if bias is not None else 'lacks'} a bias, its plan says otherwise")
        if not np.isfinite(scales).all() or (scales < 0).any():
            raise Error(f"{name} has scales that are negative, NaN or infinite")
        if scales[:, plan.outs :].any():
            raise Error(f"{name} has scales that aren't 0 in its padding, outputs {plan.outs} to {scales.shape[1]}")
        steps = np.diff(levels.astype(np.int16))
        if levels.min() < -127 or (steps < (0 if plan.bits == 8 else 1)).any():
            raise Error(f"{name} has levels that do not increase from -127 or above: {levels.tolist()}")
        if bias is not None and not np.isfinite(bias).all():
            raise Error(f"{name} has a bias that is NaN or infinite")
        for part, value in (("codes", tiles), ("scales", scales), ("levels", levels), ("bias", bias)):
            if value is not None:
                self.write(f"{name}.{part}", value)

    def write_mean(self, norm: str, mean: np.ndarray) -> None:
        """What RMSNorm `norm` gives on average, float16 [hidden]."""
        if not np.isfinite(mean).all():
            raise Error(f"{norm} has a mean that is NaN or infinite")
        self.write(f"{norm}.mean", mean)

    def write(self, name: str, value: np.ndarray) -> None:
        """One planned tensor, in any order, once. Raises Error where name, dtype or shape isn't as planned."""
        if name not in self._places:
            raise Error(f"{name} is not a tensor of this checkpoint")
        file, offset, planned = self._places[name]
        if value.shape != planned.shape or value.dtype != DTYPES[planned.dtype]:
            raise Error(
                f"{name} is {value.dtype} {list(value.shape)}, planned were {planned.dtype} {list(planned.shape)}"
            )
        if name in self._written:
            raise Error(f"{name} was written before")
        file.seek(offset)
        file.write(np.ascontiguousarray(value).data)
        self._written.add(name)

    def write_config(self, measured: Mapping[str, Any] | None = None) -> None:
        """config.json; after it and all tensors, `folder` can be loaded. May be called again with other numbers."""
        config = {
            **self.config.to_dict(),
            "tie_word_embeddings": False,
            "quantization_config": {
                "quant_method": "halfturn",
                "format": FORMAT,
                "rotation": self._rotation,
                "source_tied": self.config.tie_word_embeddings,
                "means": self._means,
                "linears": {name: plan.manifest() for name, plan in self.linears.items()},
                "measured": dict(measured or {}),
            },
        }
        self._check_complete()
        for file in self._files:
            file.flush()
        (self.folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")

    def finish(
        self,
        copy_tokenizer: Callable[[Path], None],
        card: str,
        measured: Mapping[str, Any] | None = None,
        check: Callable[[Path], None] = lambda folder: None,
    ) -> Path:
        """Writes config, tokenizer and README.md, makes everything durable and renames the folder to OUT.

        check: raises Error for a folder that must not become OUT.
        """
        self.write_config(measured)
        copy_tokenizer(self.folder)
        (self.folder / "README.md").write_text(card, "utf-8")
        for file in self._files:
            file.close()
        check(self.folder)
        self._out.publish()
        return self.out

    def abort(self) -> None:
        """Removes what was written; for a conversion that failed."""
        for file in self._files:
            with contextlib.suppress(OSError):  # a full disk: what was not written yet can't be
                file.close()
        self._out.abort()

    def _lay_out(self) -> None:
        """Creates the shards with their headers, and the index if there are several."""
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(self._shards, 1):
            several = f"model-{number:05d}-of-{len(self._shards):05d}.safetensors"
            name = several if len(self._shards) > 1 else "model.safetensors"
            file = open(self.folder / name, "wb")  # noqa: SIM115 - closed by finish and abort
            self._files.append(file)
            header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
            begin = 0
            for tensor in shard:
                end = begin + tensor.bytes
                header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, end]}
                begin = end
                weight_map[tensor.name] = name
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-(len(text) + 8) % HEADER_ALIGNMENT)
            file.write(len(text).to_bytes(8, "little") + text)
            for tensor in shard:
                offset = 8 + len(text) + header[tensor.name]["data_offsets"][0]
                self._places[tensor.name] = (file, offset, tensor)
        if len(self._shards) > 1:
            index = {"metadata": {"total_size": self.bytes}, "weight_map": dict(sorted(weight_map.items()))}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")

    def _check_complete(self) -> None:
        missing = [name for name in self._places if name not in self._written]
        if missing:
            raise Error(f"{len(missing)} of {len(self._places)} tensors were not written, the first is {missing[0]}")


def _all_tensors(config: ModelConfig, linears: Mapping[str, LinearPlan], means: bool) -> list[list[Planned]]:
    """What is written, in groups that stay in one shard."""
    return [*(plan.tensors(name) for name, plan in linears.items()), plan_norms(config, means)]


def _split(groups: list[list[Planned]], shard_bytes: int) -> list[list[Planned]]:
    """Shards of at most shard_bytes where a single group allows it; inside a shard, tensors sorted by dtype."""
    shards: list[list[Planned]] = [[]]
    for group in groups:
        size = sum(tensor.bytes for tensor in group)
        if shards[-1] and sum(tensor.bytes for tensor in shards[-1]) + size > shard_bytes:
            shards.append([])
        shards[-1] += group
    order = list(DTYPES)
    return [sorted(shard, key=lambda tensor: order.index(tensor.dtype)) for shard in shards]
