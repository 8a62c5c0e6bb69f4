#!/usr/bin/env python3
"""Speed of whole models on a CUDA card: random checkpoints of known shapes, greedy, beside the card's bandwidth.

    scripts/bench_cuda.py [--models 8b-4 8b-345 8b-3 8b-2 8b-8 smollm2] [--folder FOLDER] [--repeat 5] [--json]

Decoding steps at several batch sizes and contexts, prompts of several lengths in both modes, loading and memory. Every
figure is a median; limits count the weights' bytes over the bandwidth of a copy on the card, measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from halfturn import _C
from halfturn.error import Error

ROOT = Path(__file__).resolve().parent.parent
MODELS = {  # name: shape, bits; several: matrices take them in turn, as in a model whose widths were allocated
    "8b-4": ("llama-3.1-8b", [4]),
    "8b-345": ("llama-3.1-8b", [3, 4, 5]),
    "8b-3": ("llama-3.1-8b", [3]),
    "8b-2": ("llama-3.1-8b", [2]),
    "8b-8": ("llama-3.1-8b", [8]),
    "smollm2": ("smollm2-135m", [4]),
}
LONG = [(32, 4096, [3968]), (1, 131072, [8000, 32000, 130900])]  # sequences, room of each, positions to decode at
STEPS = 48  # decoding steps of one run


def load(folder: Path, mode: str, context: int, sequences: int) -> Any:
    return _C.Model(str(folder), device="cuda", mode=mode, context=context, kv_tokens=sequences * context)


def decode(model: Any, batch: int, position: int, room: int, repeat: int) -> float:
    """Seconds of one step of `batch` sequences that have room for `room` tokens each, the first one at `position`."""
    pages_each = room // model.page_size
    tables = [list(range(i * pages_each, (i + 1) * pages_each)) for i in range(batch)]
    samplers = [_C.Sampler(temperature=0.0) for _ in range(batch)]
    runs = []
    for _ in range(repeat + 1):
        tokens = [17 + i for i in range(batch)]
        started = time.perf_counter()
        for step in range(STEPS):  # each begins before the one ahead of it is finished, as the engine thread does it
            given = [[t] for t in tokens] if step == 0 else [[]] * batch
            model.start([_C.Item(t, position + step, table, s) for t, table, s in zip(given, tables, samplers)])
            if step:
                model.finish()
        model.finish()
        runs.append((time.perf_counter() - started) / STEPS)
    return statistics.median(runs[1:])  # the first run captures the graph


def prefill(model: Any, tokens: int, repeat: int) -> float:
    """Seconds of one prompt and its first token."""
    prompt = [(7 * i + 11) % model.vocab_size for i in range(tokens)]
    pages = list(range(-(-tokens // model.page_size)))
    runs = []
    for _ in range(repeat + 1):
        started = time.perf_counter()
        model.step([_C.Item(prompt, 0, pages, _C.Sampler(temperature=0.0))])
        runs.append(time.perf_counter() - started)
    return statistics.median(runs[1:])


def measure(name: str, folder: Path, repeat: int) -> dict[str, Any]:
    free = _C.cuda_free_memory()  # asking makes CUDA's own context, which no model is charged with
    started = time.perf_counter()
    model = load(folder, "a8", 4096, 1)
    first = time.perf_counter() - started
    del model
    started = time.perf_counter()
    model = load(folder, "a8", 4096, 1)
    second = time.perf_counter() - started
    memory, held = model.memory(), free - _C.cuda_free_memory()
    result: dict[str, Any] = {
        "model": name,
        "load_seconds": [round(first, 2), round(second, 2)],
        "card_overhead_bytes": held - memory["weights"] - memory["embedding"] - memory["kv_cache"],
        "weight_bytes": model.weight_bytes,
    }
    bandwidth = model.read_bandwidth(2048)
    result["bandwidth"] = bandwidth
    limit = bandwidth / model.weight_bytes
    rows = []
    for position in (16, 3968):
        rate = 1 / decode(model, 1, position, 4096, repeat)
        rows.append({"batch": 1, "context": position, "tokens_per_second": rate, "of_limit": rate / limit})
    if name in ("8b-4", "smollm2"):
        result["prefill"] = {f"a8 {n}": n / prefill(model, n, repeat) for n in (2048, 512, 128)}
    del model
    if name in ("8b-4", "smollm2"):
        model = load(folder, "a8", 256, 64)
        for batch in (2, 4, 8, 16, 32, 64):
            rate = batch / decode(model, batch, 16, 256, repeat)
            rows.append({"batch": batch, "context": 16, "tokens_per_second": rate, "of_limit": rate / limit})
        del model
        model = load(folder, "f16", 4096, 1)
        rate = 1 / decode(model, 1, 16, 4096, repeat)
        rows.append({"batch": 1, "context": 16, "mode": "f16", "tokens_per_second": rate, "of_limit": rate / limit})
        result["prefill"] |= {f"f16 {n}": n / prefill(model, n, repeat) for n in (2048, 512, 128)}
        del model
    for batch, context, positions in LONG if name == "8b-4" else []:
        try:
            model = load(folder, "a8", context, batch)
        except Error as error:  # a KV cache of 9 GB
            print(f"{batch} x {context} positions are left out: {error}", file=sys.stderr)
            continue
        for position in positions:
            rate = batch / decode(model, batch, position, context, repeat)
            rows.append({"batch": batch, "context": position, "tokens_per_second": rate, "of_limit": rate / limit})
        del model
    result["decode"] = rows
    return result


def show(result: dict[str, Any]) -> None:
    print(
        f"{result['model']}: load {result['load_seconds']} s, card memory beside weights and KV "
        f"{result['card_overhead_bytes'] / 1e6:.0f} MB, bandwidth {result['bandwidth'] / 1e12:.2f} TB/s"
    )
    for row in result["decode"]:
        print(
            f"  decode {row.get('mode', 'a8'):<4} batch {row['batch']:>3} context {row['context']:>6}: "
            f"{row['tokens_per_second']:8.0f} tok/s, {100 * row['of_limit']:.0f}% of one row's limit"
        )
    for what, rate in result.get("prefill", {}).items():
        print(f"  prefill {what:>9}: {rate:8.0f} tok/s")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--folder", type=Path, help="where checkpoints are made and kept; default: temporary")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.models:
            shape, bits = MODELS[name]
            folder = (options.folder or Path(temporary)) / name
            if not folder.exists():
                script = [sys.executable, str(ROOT / "scripts/make_synthetic.py"), str(folder), "--shape", shape]
                subprocess.run([*script, "--bits", *map(str, bits)], check=True, stdout=subprocess.DEVNULL)
            result = measure(name, folder, options.repeat)
            if options.json:
                print(json.dumps(result), flush=True)
            else:
                show(result)
            if not options.folder:
                shutil.rmtree(folder)


if __name__ == "__main__":
    main()
