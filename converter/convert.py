"""A conversion from beginning to end, in the order in which it happens; every step's work is elsewhere."""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfturn import __version__
from halfturn.converter.allocate import (
    Allocation,
    Matrix,
    allocate,
    feasible_range,
    parse_overrides,
    table,
    uniform,
)
from halfturn.converter.architectures import LINEARS, ModelConfig
from halfturn.converter.card import Card, Quality, model_card, printable
from halfturn.converter.checkpoint import open_source
from halfturn.converter.codecs.grid import WIDTHS
from halfturn.converter.out_folder import OutFolder, check_disk, find_place, siblings
from halfturn.converter.plot import plot_allocation
from halfturn.converter.quantized import Quantized
from halfturn.converter.recipe import Recipe
from halfturn.converter.stages import Report, Stages
from halfturn.converter.validate import check_checkpoint, check_files
from halfturn.converter.work import WorkFolder
from halfturn.converter.write import EMBEDDING, HEAD, RESERVED_BYTES, LinearPlan, Writer, bits_per_weight, plan_linears
from halfturn.error import Error
from halfturn.machine import peak_memory

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk, a quota, a file


@dataclass(frozen=True)
class ConvertOptions:
    """bpw: stored bits per weight of the decoder's linears. bits: rules 'PATTERN=N'. work_folder None: beside OUT."""

    bpw: float = 4.0
    uniform: bool = False
    recipe: Recipe = field(default_factory=Recipe)
    bits: tuple[str, ...] = ()
    work_folder: str | Path | None = None
    overwrite: bool = False
    threads: int | None = None
    command: str = "halfturn convert"


@dataclass(frozen=True)
class Candidate:
    """An allocation that was built and measured."""

    chosen: Allocation
    model: Quantized
    quality: Mapping[str, Any]


def convert(source_name: str, out: str | Path, options: ConvertOptions, report: Report) -> dict[str, Any]:
    """Converts a model and writes OUT. Returns what `halfturn convert --json` prints. Raises Error."""
    began = time.monotonic()
    there = find_place(out, options.overwrite)  # before a source is downloaded for it
    _check_widths(options.recipe)
    if options.threads:
        torch.set_num_threads(options.threads)
    source = open_source(source_name)
    folder = Path(options.work_folder) if options.work_folder else _default_work_folder(there, source.name)
    _check_apart(source.path, "source", "choose another place for OUT", there)
    _check_apart(folder, "work folder", "name one outside with --work", there)
    check_files(source)
    fixed = _fixed_widths(source.config, options)
    report("read the source", 0, 1)
    with ExitStack() as held:
        place = held.enter_context(OutFolder(out, options.overwrite))
        work = held.enter_context(WorkFolder(folder, source.check_unchanged))
        stages = Stages(source, options.recipe, work, report)
        report("read the source", 1, 1)
        _check_room(stages, place, options, fixed)
        matrices = stages.matrices(predict=not options.uniform)
        head_cost = 0.0 if options.uniform else stages.costs()[HEAD][options.recipe.head_bits]
        plain = uniform(matrices, options.bpw, fixed)
        chosen = plain if options.uniform else allocate(matrices, options.bpw, fixed)
        best = _build(stages, chosen)
        if not options.uniform and best.quality["mean_kl"] > plain.cost + head_cost:
            best = min(best, _build(stages, plain), key=lambda candidate: candidate.quality["mean_kl"])
        predicted = None if options.uniform else best.chosen.cost + head_cost
        linears = _plan(stages, best.chosen)
        measured = {"text": _judged_on(options.recipe), "predicted_kl": predicted, **best.quality}
        means = dict(best.model.means())
        sizes = bits_per_weight(source.config, linears, bool(means))
        calibrated = options.recipe.rounding == "gptq" or not options.uniform
        tokens = stages.texts.calibration.numel() if calibrated else 0
        card = _card(place.out, source, sizes, best, predicted, options, tokens)
        try:
            writer = Writer(place, source.config, linears, rotation=options.recipe.rotation, means=bool(means))
            try:
                _write_tensors(writer, best.model, means, report)
                _write_allocation(writer.folder, matrices, best.chosen, plain, options)
                writer.finish(source.copy_tokenizer, model_card(card), measured, check_checkpoint)
            except BaseException:
                writer.abort()
                raise
        except OSError as error:
            what = "make room there" if error.errno in FULL else "see what is wrong there"
            raise Error(
                f"{out} could not be written ({error}); {what}, then run the same command again: it resumes"
            ) from None
    return {
        "output": str(out),
        "decoder_bpw": sizes["decoder"],
        "file_bpw": sizes["file"],
        "bytes": sum(file.stat().st_size for file in place.out.iterdir()),
        "weight_bytes": int(sizes["bytes"]),
        "mean_kl": best.quality["mean_kl"],
        "perplexity_ratio": best.quality["perplexity_ratio"],
        "top1_agreement": best.quality["top1_agreement"],
        "seconds": time.monotonic() - began,
        "peak_rss_bytes": peak_memory(),
        "predicted_kl": predicted,
        "allocation": best.chosen.method,
        "widths": best.chosen.widths,
        "measured_tokens": best.quality["tokens"],
        "work_folder": str(folder),
    }


def _check_apart(used: Path, what: str, advice: str, out: Path) -> None:
    """Refuses what would be removed while it is used."""
    real = Path(os.path.realpath(used))
    for taken in (out, *siblings(out)):
        if taken == real or taken in real.parents:
            raise Error(f"the {what} {used} is in {taken}, which the conversion replaces; {advice}")


def _check_room(stages: Stages, place: OutFolder, options: ConvertOptions, fixed: Mapping[str, int]) -> None:
    """Refuses a target that can't be met, and a disk without room for what it takes."""
    matrices = stages.matrices(predict=False)
    plain = uniform(matrices, options.bpw, fixed)
    planned = bits_per_weight(stages.config, _plan(stages, plain), means=True)["bytes"]
    # An allocation may spend what the uniform one leaves over.
    left_over = min(options.bpw, feasible_range(matrices, fixed)[1]) - plain.bpw
    packed = int(planned + left_over / 8 * sum(matrix.weights for matrix in matrices))
    # Widths can be known only where costs are: elsewhere nothing that was rounded to them is here either.
    chosen = plain if options.uniform else None
    if chosen is None and stages.has_costs():
        chosen = allocate(stages.matrices(predict=True), options.bpw, fixed)
    built = stages.built_bytes(_by_layer(stages.config, chosen.widths)) if chosen else 0
    kept = max(0, packed - built) + stages.kept_bytes(predict=not options.uniform)
    if os.stat(stages.work.path).st_dev == os.stat(place.folder).st_dev:
        check_disk(place.out.parent, packed + kept + RESERVED_BYTES)
    else:
        check_disk(place.out.parent, packed + RESERVED_BYTES)
        check_disk(stages.work.path, kept)


def _check_widths(recipe: Recipe) -> None:
    for name, bits in (("--head-bits", recipe.head_bits), ("--embed-bits", recipe.embed_bits)):
        if bits not in WIDTHS:
            raise Error(f"{name} is {bits}: widths are {WIDTHS[0]} to {WIDTHS[-1]}")


def _fixed_widths(config: ModelConfig, options: ConvertOptions) -> dict[str, int]:
    names = [f"model.layers.{i}.{short}" for i in range(config.num_hidden_layers) for short in LINEARS]
    return parse_overrides(options.bits, names)


def _default_work_folder(out: Path, source: str) -> Path:
    """One folder for a source's conversions into the same place, so that another bitrate finds what it can reuse."""
    return out.absolute().parent / ".halfturn-work" / printable(Path(source).name)


def _by_layer(config: ModelConfig, widths: Mapping[str, int]) -> list[dict[str, int]]:
    return [{s: widths[f"model.layers.{i}.{s}"] for s in LINEARS} for i in range(config.num_hidden_layers)]


def _build(stages: Stages, chosen: Allocation) -> Candidate:
    model = stages.build(_by_layer(stages.config, chosen.widths))
    return Candidate(chosen, model, stages.judge(model))


def _plan(stages: Stages, chosen: Allocation) -> dict[str, LinearPlan]:
    widths = {**chosen.widths, EMBEDDING: stages.recipe.embed_bits, HEAD: stages.recipe.head_bits}
    groups = {name: stages.groups[name.split(".", 3)[3]] for name in chosen.widths}
    return plan_linears(stages.config, widths, groups, stages.rotation.r4_block)


def _write_tensors(writer: Writer, model: Quantized, means: Mapping[str, Tensor], report: Report) -> None:
    count = writer.config.num_hidden_layers
    writer.write_linear(EMBEDDING, *model.table("embedding").arrays())
    for index in range(count):
        for short, (packed, bias) in model.packed(index).items():
            name = f"model.layers.{index}.{short}"
            writer.write_linear(name, *packed.arrays(), None if bias is None else bias.numpy())
        report("write", index + 1, count)
    writer.write_linear(HEAD, *model.table("head").arrays())
    for norm, mean in means.items():
        writer.write_mean(norm, mean.numpy())


def _write_allocation(
    folder: Path, matrices: Sequence[Matrix], chosen: Allocation, plain: Allocation, options: ConvertOptions
) -> None:
    """allocation.json, and allocation.png where costs were predicted."""
    text = json.dumps(_without_nan(table(matrices, chosen, options.bpw)), indent=1, allow_nan=False)
    (folder / "allocation.json").write_text(text + "\n", "utf-8")
    if not options.uniform:
        others = [plain] if plain is not chosen else []
        plot_allocation(folder / "allocation.png", list(matrices), [chosen, *others])


def _without_nan(value: Any) -> Any:
    """Unknown costs become null, which JSON has."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _judged_on(recipe: Recipe) -> str:
    if recipe.calibration:
        names = printable(", ".join(Path(file).name for file in recipe.calibration))
        return f"windows of {names} that calibration did not see"
    return f"text sampled from the source itself (seed {recipe.seed})"


def _card(
    out: Path,
    source: Any,
    sizes: Mapping[str, float],
    best: Candidate,
    predicted: float | None,
    options: ConvertOptions,
    tokens: int,
) -> Card:
    """tokens: that the conversion calibrated on."""
    recipe, quality = options.recipe, best.quality
    means = {
        short.split(".")[1]: sum(bits) / len(bits)
        for short in LINEARS
        for bits in ([w for name, w in best.chosen.widths.items() if name.endswith(short)],)
    }
    calibration = ""
    if tokens:
        count = len(recipe.calibration)
        what = f"{count} text file{'s' * (count > 1)}" if count else "text sampled from the source itself"
        calibration = f"{tokens:,} tokens of {what}"
    return Card(
        name=out.name,
        source=source.name,
        config=source.config,
        decoder_bits=sizes["decoder"],
        file_bytes=int(sizes["bytes"]),
        command=options.command,
        version=__version__,
        quality=Quality(
            quality["mean_kl"],
            quality["perplexity_ratio"],
            quality["top1_agreement"],
            quality["tokens"],
            _judged_on(recipe),
            predicted,
        ),
        rotation=recipe.rotation,
        rounding=recipe.rounding,
        calibration=calibration,
        widths={**means, "embed_tokens": float(recipe.embed_bits), "lm_head": float(recipe.head_bits)},
        facts=source.card_facts(),
    )
