"""The stages of a conversion, each cached in the work folder under everything that it depends on.

Whatever is interrupted is found again up to the last finished layer; whatever another bitrate shares is not computed
twice. Results depend only on the keys, so a resumed conversion gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from halfturn.converter import calibrate
from halfturn.converter.allocate import Matrix
from halfturn.converter.architectures import ATTENTION, LINEARS, ModelConfig
from halfturn.converter.checkpoint import Source
from halfturn.converter.codecs.grid import WIDTHS, encode_group
from halfturn.converter.costs import layer_costs
from halfturn.converter.gptq import Factor, Part, factorize, row_parts
from halfturn.converter.keys import COST_TOKENS, MOMENT_TOKENS, Keys, Widths, machine_key
from halfturn.converter.llama import GROUPS, fast_products, final_states
from halfturn.converter.measure import compare_states, reference_states
from halfturn.converter.packed import Packed, join_rows, pack, pack_symmetric, unpack_symmetric
from halfturn.converter.quantized import Quantized
from halfturn.converter.recipe import Recipe
from halfturn.converter.rotate import Rotation
from halfturn.converter.text import Texts
from halfturn.converter.work import WorkFolder
from halfturn.converter.write import EMBEDDING, HEAD
from halfturn.error import Error

TABLE_ROWS = 8192  # rows of the embedding or the head that are quantized together

Report = Callable[[str, int, int], None]  # (stage, done, total)


class Stages:
    """Everything that a conversion computes; `report(stage, done, total)` follows along."""

    def __init__(self, source: Source, recipe: Recipe, work: WorkFolder, report: Report) -> None:
        self.source, self.recipe, self.work, self.report = source, recipe, work, report
        self.config: ModelConfig = source.config
        self.rotation = Rotation(source.config, recipe.rotation, recipe.seed, recipe.tensor_parallel)
        self.groups = {name: self._groups(name, shape[1]) for name, shape in source.config.linear_shapes().items()}
        machine = machine_key(source)
        self.texts = Texts(source, work, machine, report, recipe.calibration, recipe.calibration_tokens, recipe.seed)
        layers, r4_block = source.config.num_hidden_layers, self.rotation.r4_block
        self.keys = Keys(machine, self.texts, recipe, layers, r4_block, self.groups)

    def _groups(self, name: str, columns: int) -> int:
        size = self.recipe.group_size
        if size is None:
            return 1
        if size < 16 or size % 16 or columns % size:
            raise Error(f"--group-size {size} doesn't divide the {columns} inputs of {name} in multiples of 16")
        return columns // size

    def _has(self, stage: str, key: dict[str, Any]) -> bool:
        return self.work.get(stage, key) is not None

    # --- predicted costs ----------------------------------------------------------------------------------------------

    def layer(self, index: int) -> dict[str, Tensor]:
        """One layer, norms folded and rotated."""
        with fast_products(False):
            return self.rotation.layer(index, self.source.layer(index))

    def embedding(self) -> Tensor:
        with fast_products(False):
            return self.rotation.embedding(self.source.embedding())

    def head(self) -> Tensor:
        with fast_products(False):
            return self.rotation.head(self.source.head(), self.source.final_norm())

    def _has_blocks(self) -> bool:
        return all(self._has("sensitivities", self.keys.blocks(i)) for i in range(self.config.num_hidden_layers))

    def _find_sensitivities(self) -> None:
        """Puts every layer's Sensitivity (and the head's) into the work folder; from the start if one is missing."""
        count = self.config.num_hidden_layers
        if self._has_blocks() and all(self._has("sensitivities", self.keys.sensitivity(i)) for i in range(count + 1)):
            return
        sequences = max(1, MOMENT_TOKENS // self.texts.calibration.shape[1])
        with fast_products():
            found = calibrate.sensitivities(
                self.config,
                self.layer,
                self.embedding(),
                torch.ones(self.config.hidden_size),
                self.head(),
                self.texts.calibration[:sequences],
                self.rotation.r4_block,
                self.recipe.seed,
            )
            for done, (index, layer) in enumerate(found, 1):
                blocks = {name: s.blocks for name, s in layer.items() if s.blocks is not None}
                if blocks:
                    self.work.put("sensitivities", self.keys.blocks(index), blocks)
                tensors = {f"{name}.moment": s.moment for name, s in layer.items()}
                tensors |= {f"{name}.hessian": pack_symmetric(s.hessian) for name, s in layer.items()}
                self.work.put("sensitivities", self.keys.sensitivity(index), tensors)
                self.report("sensitivities", done, count + 1)

    def _found(self, key: dict[str, Any]) -> dict[str, Tensor]:
        """What _find_sensitivities() put under a key."""
        entry = self.work.get("sensitivities", key)
        if entry is None:
            raise Error("the work folder changed during the conversion: run the same command again")
        return entry[0]

    def matrices(self, predict: bool) -> list[Matrix]:
        """The decoder's linears with what each width costs (NaN where not predicted)."""
        costs = self.costs() if predict else {}
        unknown = dict.fromkeys(WIDTHS, float("nan"))
        return [
            Matrix(name, *shape, costs.get(name, unknown), self.groups[short], self._bias(short))
            for i in range(self.config.num_hidden_layers)
            for short, shape in self.config.linear_shapes().items()
            for name in (f"model.layers.{i}.{short}",)
        ]

    def _bias(self, short: str) -> bool:
        return self.config.attention_bias if short in ATTENTION else self.config.mlp_bias

    def kept_bytes(self, predict: bool) -> int:
        """About what the work folder will hold of statistics beside those that it has."""
        if not predict and self.recipe.rounding == "rtn":
            return 0
        keys = (self.keys.sensitivity, self.keys.blocks)
        layers = range(self.config.num_hidden_layers + 1)
        entries = [("sensitivities", key(i)) for i in layers for key in keys]
        entries += [("hessians", key) for key in self.keys.hessians() if predict]
        return max(0, calibrate.statistics_bytes(self.config, predict) - self.work.size(entries))

    def built_bytes(self, widths: Widths) -> int:
        """What the work folder has of build(widths)."""
        return self.work.size(self.keys.build(widths))

    def has_costs(self) -> bool:
        """Whether an earlier conversion predicted all that costs() gives."""
        return all(self._known_costs(i, key) is not None for i, key in enumerate(self.keys.costs()))

    def costs(self) -> dict[str, dict[int, float]]:
        """Predicted KL a token of every width by full name; "lm_head" has its chosen width only."""
        count, keys = self.config.num_hidden_layers, self.keys.costs()
        found = [self._known_costs(i, key) for i, key in enumerate(keys)]
        if None in found:
            self._find_sensitivities()
            for i, hessians in enumerate(self._hessians()):
                if found[i] is None:
                    weights = self.layer(i) if i < count else {"lm_head.weight": self.head()}
                    found[i] = self._layer_costs(i, weights, hessians)
                    self.work.put("costs", keys[i], {}, found[i])
                self.report("predicted costs", i + 1, count + 1)
        return {name: cost for layer in found if layer is not None for name, cost in layer.items()}

    def _known_costs(self, index: int, key: dict[str, Any]) -> dict[str, dict[int, float]] | None:
        """What _layer_costs gave before."""
        entry = self.work.get("costs", key)
        if entry is None:
            return None
        is_head = index == self.config.num_hidden_layers
        names = ["lm_head"] if is_head else [f"model.layers.{index}.{short}" for short in LINEARS]
        widths = (self.recipe.head_bits,) if is_head else WIDTHS
        try:
            costs = {name: {bits: float(entry[1][name][str(bits)]) for bits in widths} for name in names}
        except (KeyError, TypeError, ValueError):
            self.work.discard("costs", key)
            return None
        return costs

    def _layer_costs(
        self, index: int, weights: Mapping[str, Tensor], hessians: Mapping[str, Tensor]
    ) -> dict[str, dict[int, float]]:
        """By full name; index num_hidden_layers is the head."""
        is_head = index == self.config.num_hidden_layers
        found = self._found(self.keys.sensitivity(index))
        blocks = {} if is_head else self._found(self.keys.blocks(index))
        groups = (("lm_head",),) if is_head else GROUPS
        prefix = "" if is_head else f"model.layers.{index}."
        costs = layer_costs(
            groups,
            weights,
            {
                short: calibrate.Sensitivity(
                    found[f"{short}.moment"], unpack_symmetric(found[f"{short}.hessian"]), blocks.get(short)
                )
                for group in groups
                for short in group
            },
            hessians,
            (self.recipe.head_bits,) if is_head else WIDTHS,
            prefix=prefix,
            rounding=self.recipe.rounding,
            group_size=None if is_head else self.recipe.group_size,
        )
        return {prefix + short: cost for short, cost in costs.items()}

    def _hessians(self) -> Iterator[dict[str, Tensor]]:
        """Each layer's input Hessians on original states, by the first linear of the group; at last the head's."""
        count, keys = self.config.num_hidden_layers, self.keys.hessians()
        length, after = self.texts.calibration.shape[1], MOMENT_TOKENS // self.texts.calibration.shape[1]
        tokens = (
            self.texts.calibration[after : after + max(1, COST_TOKENS // length)]
            if len(self.texts.calibration) > after
            else self.texts.calibration
        )
        missing = [i for i, key in enumerate(keys) if not self._has("hessians", key)]
        states = calibrate.first_states(tokens, self.embedding()) if missing else []
        for i, key in enumerate(keys):
            cached = self.work.get("hessians", key) if i not in missing else None
            with fast_products():
                if cached is not None and i < max(missing, default=-1):
                    calibrate.advance(self.config, self.layer(i), states, self.rotation.r4_block)
                elif cached is None and i < count:
                    found = calibrate.layer_hessians(self.config, self.layer(i), states, self.rotation.r4_block)
                elif cached is None:
                    found = {"lm_head": calibrate.head_moments(self.config, states, states)[0]}
            # Also a fresh one is the stored half and its mirror image: sums differ in the last bit on the two sides.
            halves = cached[0] if cached is not None else {name: pack_symmetric(h) for name, h in found.items()}
            if cached is None:
                self.work.put("hessians", key, halves)
            yield {name: unpack_symmetric(half) for name, half in halves.items()}

    # --- quantized model ----------------------------------------------------------------------------------------------

    def build(self, widths: Widths) -> Quantized:
        """Quantizes embedding, layers and head at these widths, as far as the work folder doesn't have them."""
        count, gptq, keys = self.config.num_hidden_layers, self.recipe.rounding == "gptq", self.keys.build(widths)
        quantized = Quantized(self.config, self.work, keys)
        if not self._has(*keys[-1]):
            self.work.put(*keys[-1], self._table(EMBEDDING, self.embedding(), self.recipe.embed_bits).tensors("table"))
        missing = [i for i in range(count + 1) if not self._has(*keys[i])]
        if gptq and missing and not self._has_blocks():
            self._find_sensitivities()
        states, originals = (
            calibrate.first_states(self.texts.calibration, table()) if gptq and missing else []
            for table in (quantized.embedding, self.embedding)
        )
        for i in range(max(missing, default=-1) + 1):
            with fast_products(gptq):
                if i == count:
                    self.work.put(*keys[i], self._head(states, originals))
                elif i in missing:
                    self.work.put(*keys[i], self._round(i, widths[i], states, originals))
                elif gptq:
                    calibrate.advance(self.config, quantized.layer(i), states, self.rotation.r4_block)
                    calibrate.advance(self.config, self.layer(i), originals, self.rotation.r4_block)
            self.report("quantize", i + 1, count + 1)
        return quantized

    def _round(
        self, index: int, widths: Mapping[str, int], states: list[Tensor], originals: list[Tensor]
    ) -> dict[str, Tensor]:
        """One layer's packed matrices and biases and its norms' means; moves the states through the layer."""
        tensors = self.layer(index)
        stored = {name: bias for name, bias in tensors.items() if name.endswith(".bias")}

        def quantize(names: Sequence[str], hessian: Tensor | None, pulls: Sequence[Tensor] | None) -> dict[str, Tensor]:
            weights = [tensors[f"{name}.weight"] for name in names]
            new, parts = {}, list[Part]()
            if hessian is not None and names == GROUPS[0]:
                blocks = self._found(self.keys.blocks(index))
                parts = row_parts(torch.cat([blocks[name].mean(0) for name in calibrate.COUPLED]))
            with fast_products(False):
                grids = encode_group(
                    weights,
                    hessian,
                    [widths[name] for name in names],
                    pulls=pulls,
                    parts=parts,
                    rounding=self.recipe.rounding,
                    group_size=self.recipe.group_size,
                    names=[f"model.layers.{index}.{name}" for name in names],
                )
            for name, weight, grid in zip(names, weights, grids):
                packed = pack(grid)
                stored.update(packed.tensors(name))
                new[name] = packed.weight(*weight.shape)
            return new

        if self.recipe.rounding == "rtn":
            for group in GROUPS:
                quantize(group, None, None)
        else:
            means = calibrate.round_layer(self.config, tensors, states, originals, self.rotation.r4_block, quantize)
            stored.update({f"{norm}.mean": mean.half() for norm, mean in means.items()})
        return stored

    def _head(self, states: list[Tensor], originals: list[Tensor]) -> dict[str, Tensor]:
        """The packed head as "table", and the "mean" of what it reads."""
        if self.recipe.rounding == "rtn":
            return self._table(HEAD, self.head(), self.recipe.head_bits).tensors("table")
        hessian, lacks, mean = calibrate.head_moments(self.config, states, originals)
        table = self._table(HEAD, self.head(), self.recipe.head_bits, factorize(hessian, name=HEAD), lacks)
        return {**table.tensors("table"), "mean": mean.half()}

    def _table(
        self,
        name: str,
        weight: Tensor,
        bits: int,
        factor: Factor | None = None,
        lacks: Sequence[Tensor] | None = None,
    ) -> Packed:
        """The embedding or the head, some thousand rows at a time: rows don't depend on each other."""
        with fast_products(False):
            parts = [
                encode_group([part], factor, [bits], pulls=lacks and [part @ lack for lack in lacks], names=[name])[0]
                for part in weight.split(TABLE_ROWS)
            ]
            return pack(join_rows(parts))

    # --- quality ------------------------------------------------------------------------------------------------------

    def judge(self, quantized: Quantized) -> dict[str, Any]:
        """The quantized model against the source on held-out text; see measure.Comparison.result."""
        tokens = self.texts.held_out
        key = self.keys.reference()
        found = self.work.get("reference", key)
        if found is None:
            states = reference_states(self.source, tokens, lambda d, t: self.report("source's answers", d, t))
            self.work.put("reference", key, {"states": states})
        else:
            states = found[0]["states"]

        def layers() -> Iterator[Mapping[str, Tensor]]:
            for index in range(self.config.num_hidden_layers):
                yield quantized.layer(index)
                self.report("measure", index + 1, self.config.num_hidden_layers)

        with torch.inference_mode():
            got = final_states(self.config, quantized.embedding(), layers(), tokens, self.rotation.r4_block)
        return compare_states(self.source, states, got, quantized.head(), tokens)
