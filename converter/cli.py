"""The commands `halfturn convert` and `halfturn eval kl`."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click

from halfturn.console import megabytes, print_json
from halfturn.options import engine_options, json_option, load_model, threads_option

if TYPE_CHECKING:
    from rich.progress import TaskID
    from rich.table import Table


class Progress:
    """`progress(stage, done, total)`: a bar a stage on stderr, with the time left; lines where there is no terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        console = Console(stderr=True)
        self._live = console.is_terminal
        columns = (TextColumn("{task.description:>24}"), BarColumn(), MofNCompleteColumn())
        self._bars = Bars(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Progress:
        if self._live:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._bars.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        new = stage not in self._tasks
        if self._live:
            if new:
                self._tasks[stage] = self._bars.add_task(stage, total=total)
            self._bars.update(self._tasks[stage], completed=done, total=total)
        elif new:
            self._tasks[stage] = self._bars.add_task(stage, total=total, visible=False)
            print(f"{stage} ...", file=sys.stderr, flush=True)


@click.command("convert")
@click.argument("source", metavar="SOURCE")
@click.argument("out", metavar="OUT", type=click.Path())
@click.option(
    "--bpw",
    type=float,
    default=4.0,
    show_default=True,
    help="Stored bits per weight of the decoder's linears, all overhead included; any number.",
)
@click.option(
    "--uniform", is_flag=True, help="The same width everywhere, as far as --bpw allows, instead of allocation."
)
@click.option("--rotation", type=click.Choice(["hadamard", "none"]), default="hadamard", show_default=True)
@click.option(
    "--rounding",
    type=click.Choice(["gptq", "rtn"]),
    default="gptq",
    show_default=True,
    help="With error feedback, or to nearest.",
)
@click.option(
    "--calibration",
    type=click.Path(exists=True, dir_okay=False),
    multiple=True,
    metavar="FILE",
    help="UTF-8 text to calibrate on; repeatable.  [default: the model writes its own]",
)
@click.option("--calibration-tokens", type=click.IntRange(1024), default=24576, show_default=True, metavar="N")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, metavar="N")
@click.option("--head-bits", type=click.IntRange(2, 8), default=6, show_default=True, metavar="N", help="Of lm_head.")
@click.option(
    "--embed-bits", type=click.IntRange(2, 8), default=8, show_default=True, metavar="N", help="Of embed_tokens."
)
@click.option(
    "--bits", multiple=True, metavar="PATTERN=N", help="Fixes widths, as in '*.v_proj=6'; repeatable, later ones win."
)
@click.option("--group-size", type=click.IntRange(16), metavar="N", help="Inputs that share a scale.  [default: all]")
@click.option(
    "--tensor-parallel",
    type=click.IntRange(1),
    default=2,
    show_default=True,
    metavar="N",
    help="Ways of splitting the model that no online Hadamard block may straddle.",
)
@click.option(
    "--work-folder",
    "--work",
    type=click.Path(file_okay=False),
    metavar="FOLDER",
    help="Where results are kept for resuming and for other bitrates.  [default: .halfturn-work beside OUT]",
)
@click.option("--overwrite", is_flag=True, help="Replace OUT if it is a Halfturn checkpoint.")
@threads_option
@json_option
def convert_command(source: str, out: str, as_json: bool, **settings: Any) -> None:
    """Turn a half-precision model into a Halfturn checkpoint.

    SOURCE is a Hugging Face folder, a hub id or a GGUF file; OUT is the folder to write, which appears only when it is
    complete. A conversion that was stopped resumes with the same command, and gives the same bytes.
    """
    from dataclasses import fields

    from halfturn.converter.convert import ConvertOptions, convert
    from halfturn.converter.recipe import Recipe

    command = command_line(source, out, settings)
    recipe = Recipe(**{field.name: settings.pop(field.name) for field in fields(Recipe)})
    options = ConvertOptions(recipe=recipe, command=command, **settings)
    with Progress() as progress:
        result = convert(source, out, options, progress)
    if as_json:
        print_json(result)
        return
    from rich.console import Console

    console = Console()
    console.print(widths_table(result["widths"]))
    console.print(summary(result), markup=False, emoji=False, highlight=False)  # a folder's name may have brackets


def command_line(source: str, out: str, settings: Mapping[str, Any]) -> str:
    """The command that repeats this conversion: only what differs from the defaults and matters for the result.

    Of paths on this machine only the last names: cards are published, and where somebody keeps models is not.
    """

    def last_name(path: str) -> str:
        return os.path.basename(os.path.abspath(os.path.expanduser(path)))

    shown = last_name(source) if os.path.exists(os.path.expanduser(source)) else source
    words = ["halfturn", "convert", shown, last_name(out), "--bpw", repr(settings["bpw"])]
    for parameter in convert_command.params:
        name = parameter.name or ""
        value = settings.get(name)
        if name in ("bpw", "work_folder", "overwrite") or value is None or value == parameter.default or value == ():
            continue
        flag = parameter.opts[0]
        if value is True:
            words.append(flag)
        elif value is not False:
            for each in value if isinstance(value, tuple) else (value,):
                words += [flag, last_name(each) if name == "calibration" else str(each)]
    return shlex.join(words)


def widths_table(widths: Mapping[str, int]) -> Table:
    """Layers down, kinds of matrices across, bits in the cells."""
    from rich.table import Table

    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in widths))
    layers: dict[str, dict[str, int]] = {}
    for name, bits in widths.items():
        layers.setdefault(name.split(".")[2], {})[name.rpartition(".")[2]] = bits
    table = Table(title="bits", header_style="bold")
    table.add_column("layer", justify="right")
    for kind in kinds:
        table.add_column(kind.removesuffix("_proj"), justify="right")
    for layer, row in layers.items():
        table.add_row(layer, *(str(row[kind]) for kind in kinds))
    means = [sum(row[kind] for row in layers.values()) / len(layers) for kind in kinds]
    table.add_section()
    table.add_row("mean", *(f"{mean:.2f}" for mean in means))
    return table


def summary(result: Mapping[str, Any]) -> str:
    predicted = "" if result["predicted_kl"] is None else f" (predicted {result['predicted_kl']:.4f})"
    lines: Sequence[str] = (
        f"{result['output']}: {megabytes(result['weight_bytes'])} of weights, {result['decoder_bpw']:.3f} bits a "
        f"decoder weight, {result['file_bpw']:.3f} over all; {megabytes(result['bytes'])} with tokenizer and card",
        f"against the source, on {result['measured_tokens']} tokens it had not seen: "
        f"KL {result['mean_kl']:.4f} nats a token{predicted}, "
        f"perplexity x {result['perplexity_ratio']:.4f}, same top token {100 * result['top1_agreement']:.2f}%",
        f"{result['seconds']:.0f} s, {megabytes(result['peak_rss_bytes'])} of memory at most; "
        f"kept for other bitrates: {result['work_folder']}",
    )
    return "\n".join(lines)


@click.command("kl")
@click.argument("model", metavar="MODEL")
@click.option("--reference", required=True, metavar="SOURCE", help="The model that was converted.")
@click.option(
    "--text",
    "path",
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE",
    help="UTF-8 text, tokenized once as it is.  [default: SOURCE writes its own]",
)
@click.option(
    "--wikitext-join", is_flag=True, help='Take lines as rows of WikiText, joined as papers do ("\\n\\n".join(rows)).'
)
@click.option("--context", type=click.IntRange(2), default=512, show_default=True, metavar="N", help="Tokens a window.")
@click.option("--windows", "count", type=click.IntRange(1), metavar="N", help="Only the first N.  [default: all]")
@engine_options
@json_option
def eval_kl_command(
    model: str,
    reference: str,
    path: str | None,
    wikitext_join: bool,
    context: int,
    count: int | None,
    device: Any,
    mode: Any,
    kv_bits: tuple[int, int],
    threads: int | None,
    as_json: bool,
) -> None:
    """KL divergence of MODEL, as the engine runs it, from the model that was converted.

    KL(reference || model) in nats a token over every position of windows that don't overlap, without BOS; the
    reference computes in float32. --json prints mean_kl, perplexity, reference_perplexity, perplexity_ratio,
    top1_agreement, tokens, windows, context and mode.
    """
    import torch

    from halfturn.converter.measure import evaluate_kl
    from halfturn.evaluate import read_text

    if threads:
        torch.set_num_threads(threads)
    text = None if path is None else read_text(path, wikitext_join)
    loaded = load_model(model, device=device, mode=mode, kv_bits=kv_bits, context=context, threads=threads)
    with Progress() as progress:
        result = evaluate_kl(loaded, reference, text, context, count, progress)
    if as_json:
        print_json(result)
        return
    click.echo(
        f"KL {result['mean_kl']:.5f} nats a token, top-1 agreement {100 * result['top1_agreement']:.2f}%, perplexity "
        f"{result['perplexity']:.4f} (reference {result['reference_perplexity']:.4f}), {result['tokens']} tokens"
    )
