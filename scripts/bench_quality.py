#!/usr/bin/env python3
"""The quality table: KL divergence on a text for every recipe and bitrate, beside what was predicted.

    scripts/bench_quality.py SOURCE TEXT OUT [--bpw 4.0 3.0 2.5] [--recipes gptq-hadamard-allocated ...]
                             [--windows 20 --context 512 --mode a8]

Converts SOURCE once for every row into OUT/<recipe>-<bpw> (skipped where that exists; all rows share OUT/work), runs
the result in the compiled engine, and prints a table. A recipe is ROUNDING-ROTATION-WIDTHS. The text is tokenized once
as it is, without BOS; the reference computes in float32.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

import torch

from halfturn.converter.checkpoint import open_source
from halfturn.converter.convert import ConvertOptions, convert
from halfturn.converter.measure import compare_engine, reference_states
from halfturn.converter.recipe import Recipe
from halfturn.evaluate import read_text, windows
from halfturn.model import Model

RECIPES = [
    "-".join(parts) for parts in itertools.product(("rtn", "gptq"), ("none", "hadamard"), ("uniform", "allocated"))
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bpw", type=float, nargs="+", default=[4.0, 3.0, 2.5])
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--mode", choices=["a8", "f16"], default="a8")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    source = open_source(options.source)
    tokens = states = None
    print(
        f"{'recipe':<26}{'target':>7}{'bpw':>7}{'predicted':>11}{'own text':>10}{'KL':>9}{'top-1':>8}{'ppl ratio':>10}"
    )
    for bpw, recipe in itertools.product(options.bpw, options.recipes):
        rounding, rotation, widths = recipe.split("-")
        folder = options.out / f"{recipe}-{bpw}"
        facts = options.out / f"{folder.name}.json"
        if not facts.exists():
            settings = ConvertOptions(
                bpw=bpw,
                uniform=widths == "uniform",
                recipe=Recipe(rotation=rotation, rounding=rounding),
                work_folder=options.out / "work",
                overwrite=True,
            )
            facts.write_text(json.dumps(convert(options.source, folder, settings, say)))
        made = json.loads(facts.read_text())
        model = Model.load(folder, context=options.context, mode=options.mode)
        if tokens is None or states is None:
            ids = windows(model.tokenizer, read_text(options.text), options.context, options.windows)
            tokens = torch.tensor(ids)
            states = reference_states(source, tokens)
        found = compare_engine(model, source, states, tokens)
        predicted = made["predicted_kl"]
        print(
            f"{recipe:<26}{bpw:>7}{made['decoder_bpw']:>7.3f}{'' if predicted is None else f'{predicted:.4f}':>11}"
            f"{made['mean_kl']:>10.4f}{found['mean_kl']:>9.4f}{found['top1_agreement']:>8.3f}"
            f"{found['perplexity_ratio']:>10.3f}",
            flush=True,
        )


def say(stage: str, done: int, total: int) -> None:
    print(f"\r{stage} {done}/{total}\033[K", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
