#!/usr/bin/env python3
"""Measures what Python adds to each native step (scheduling, text, stops, delivery), with an engine that costs nothing.

    scripts/bench_overhead.py [--steps 2000 --repeat 5]

Prints microseconds a step for several batch sizes, the best of the repeats. At 300 tokens/s a step takes 3300 us.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import fake_native
from halfturn import Generator, SamplingParams


class InstantModel(fake_native.Model):
    """Draws the same token for everybody."""

    sample = fake_native.Sample(7)

    def step(self, items: Sequence[fake_native.Item]) -> list[Any]:
        return [self.sample if item.sampler else None for item in items]


def microseconds(model: Any, batch: int, steps: int, stop: Sequence[str], repeat: int) -> float:
    best = float("inf")
    params = SamplingParams(temperature=0, max_tokens=steps, stop=stop)
    for _ in range(repeat):
        with Generator(model) as generator:
            start = time.perf_counter()
            generator.generate([[1]] * batch, params)
            best = min(best, (time.perf_counter() - start) / steps * 1e6)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = fake_native.load(Path(folder))
        pages = 32 * (args.steps // 32 + 2)
        model.native = InstantModel(context=args.steps + 32, pages=pages)
        for batch in (1, 8, 32):
            plain, stops = (microseconds(model, batch, args.steps, s, args.repeat) for s in ((), ("zzz", "\n\n")))
            print(f"batch {batch:2}: {plain:6.1f} us a step, {stops:6.1f} with two stop strings")


if __name__ == "__main__":
    main()
