"""Speed of one model on this machine, beside what the machine's memory allows.

Decoding one token reads every packed weight once, so a decode step can't be quicker than those bytes over the
machine's read bandwidth, which is measured in the same run. Every figure is a median over `repeat` runs.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from halfturn.error import Error
from halfturn.machine import peak_memory

if TYPE_CHECKING:
    from halfturn.model import Device, Mode, Model

# Larger than any last-level cache, so that the passes read memory.
BANDWIDTH_MEGABYTES = 512


def read_bandwidth(native: Any) -> float:
    """Bytes a second that the model's device moves from its memory, the best of several passes."""
    return float(native.read_bandwidth(BANDWIDTH_MEGABYTES))


def room(sequences: int, length: int) -> int:
    """Tokens of a KV cache in which so many sequences of `length` tokens share no page."""
    from halfturn import _C

    size: int = _C.Model.page_size
    return sequences * -(-length // size) * size


class Runner:
    """Drives the native step directly with greedy samplers: no scheduling, no text."""

    def __init__(self, model: Model, prompt_tokens: int, new_tokens: int, largest_batch: int) -> None:
        self.native, self.backend = model.native, model.backend
        self.prompt_tokens, self.new_tokens = prompt_tokens, new_tokens
        self.pages_each = -(-(prompt_tokens + new_tokens) // self.native.page_size)
        if prompt_tokens + new_tokens > self.native.context:
            raise Error(
                f"{prompt_tokens} + {new_tokens} tokens don't fit the context of {self.native.context}: "
                "use fewer --prompt-tokens or --new-tokens"
            )
        if self.pages_each * largest_batch > self.native.pages:
            raise Error(
                f"{largest_batch} sequences of {prompt_tokens + new_tokens} tokens need "
                f"{self.pages_each * largest_batch} pages of the KV cache, it has {self.native.pages}: "
                "use a smaller --batch"
            )
        draw = random.Random(1)
        self.prompts = [
            [draw.randrange(self.native.vocab_size) for _ in range(prompt_tokens)] for _ in range(largest_batch)
        ]
        self.first_tokens: list[int] = []

    def pages(self, sequence: int) -> list[int]:
        return list(range(sequence * self.pages_each, (sequence + 1) * self.pages_each))

    def sampler(self) -> Any:
        return self.backend.Sampler(temperature=0.0)

    def prefill(self, sequence: int) -> tuple[float, int]:
        """One step of the whole prompt: (seconds, its first token)."""
        item = self.backend.Item(self.prompts[sequence], 0, self.pages(sequence), self.sampler())
        started = time.perf_counter()
        (sample,) = self.native.step([item])
        return time.perf_counter() - started, sample.token

    def fill(self) -> None:
        """Puts every prompt into the KV cache, where decode() finds it again and again."""
        self.first_tokens = [self.prefill(sequence)[1] for sequence in range(len(self.prompts))]

    def decode(self, batch: int) -> float:
        """Seconds for `new_tokens` steps of `batch` sequences, each after its prompt; needs fill() once before."""
        tokens = self.first_tokens[:batch]
        samplers = [self.sampler() for _ in range(batch)]
        tables = [self.pages(sequence) for sequence in range(batch)]
        overlaps = batch <= self.native.overlap_rows  # as the engine thread does it
        started = time.perf_counter()
        for step in range(self.new_tokens):
            items = [
                self.backend.Item([] if overlaps and step else [token], self.prompt_tokens + step, table, sampler)
                for token, table, sampler in zip(tokens, tables, samplers, strict=True)
            ]
            if not overlaps:
                tokens = [sample.token for sample in self.native.step(items)]
                continue
            self.native.start(items)
            if step:
                self.native.finish()
        if overlaps:
            self.native.finish()
        return time.perf_counter() - started


def bench(
    path: str,
    prompt_tokens: int = 512,
    new_tokens: int = 128,
    batches: Sequence[int] = (1, 2, 4, 8),
    repeat: int = 5,
    device: Device = "auto",
    mode: Mode = "auto",
    kv_bits: tuple[int, int] = (8, 8),
    threads: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Loads the model at `path` and times it; `halfturn bench --help` lists the keys.

    prefill_tokens_per_second: one prompt of `prompt_tokens` in one step, its first token included.
    decode: per batch size, tokens_per_second of all sequences together; weight_bytes_per_token, the packed weights a
    step reads over the batch size; bandwidth_fraction, those reads a second over the measured read bandwidth (above 1
    where the weights stay in a cache). peak_rss_bytes is taken before the bandwidth test, whose buffer is not ours.
    """
    from halfturn.model import Model

    tell = progress or (lambda text: None)
    length = prompt_tokens + new_tokens
    tell("loading")
    started = time.perf_counter()
    model = Model.load(
        path,
        device=device,
        context=length,
        kv_bits=kv_bits,
        threads=threads,
        mode=mode,
        kv_tokens=room(max(batches), length),
    )
    load_seconds = time.perf_counter() - started
    native = model.native
    runner = Runner(model, prompt_tokens, new_tokens, max(batches))
    tell("warming up")
    runner.fill()
    runner.decode(max(batches))
    peak = peak_memory()
    tell("measuring read bandwidth")
    bandwidth = read_bandwidth(native)
    prefills: list[float] = []
    decodes: dict[int, list[float]] = {batch: [] for batch in batches}
    for turn in range(repeat):  # turn by turn, so that a slow minute of the machine touches every figure alike
        tell(f"run {turn + 1} of {repeat}")
        prefills.append(runner.prefill(0)[0])
        for batch in batches:
            decodes[batch].append(runner.decode(batch))
    tell("measuring read bandwidth")
    bandwidth = max(bandwidth, read_bandwidth(native))
    decode = []
    for batch in batches:
        per_step = statistics.median(decodes[batch]) / new_tokens
        decode.append(
            {
                "batch": batch,
                "tokens_per_second": batch / per_step,
                "weight_bytes_per_token": native.weight_bytes / batch,
                "bandwidth_fraction": native.weight_bytes / per_step / bandwidth,
            }
        )
    return {
        "prefill_tokens_per_second": prompt_tokens / statistics.median(prefills),
        "decode": decode,
        "load_seconds": load_seconds,
        "peak_rss_bytes": peak,
        "device": f"{native.device_name} ({native.isa})",
        "threads": native.threads,
        "mode": native.mode,
        "read_bandwidth_bytes_per_second": bandwidth,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "repeat": repeat,
    }


def show(result: dict[str, Any]) -> None:
    """Prints bench() as a table on stdout."""
    from rich.console import Console
    from rich.table import Table

    from halfturn.console import megabytes

    console = Console()
    table = Table("", "tokens/s", "weights read a token", "of read bandwidth")
    table.add_row(f"prefill of {result['prompt_tokens']}", f"{result['prefill_tokens_per_second']:.1f}", "", "")
    for row in result["decode"]:
        table.add_row(
            f"decode, batch {row['batch']}",
            f"{row['tokens_per_second']:.1f}",
            megabytes(row["weight_bytes_per_token"]),
            f"{row['bandwidth_fraction']:.0%}",
        )
    console.print(table)
    console.print(
        f"{result['device']}, {result['threads']} threads, mode {result['mode']}; memory reads "
        f"{result['read_bandwidth_bytes_per_second'] / 1e9:.1f} GB/s; loaded in {result['load_seconds']:.2f} s; "
        f"peak memory {megabytes(result['peak_rss_bytes'])}; medians of {result['repeat']}",
        highlight=False,
    )
