#!/usr/bin/env python3
"""Times the CUDA card's matrix products alone: the GEMV of up to 32 rows and the GEMM of more.

    scripts/bench_kernels.py [--bits 4 --mode a8 f16 --rows 1 8 64 2048 --shape 4096:4096+1024+1024 14336:4096]
    scripts/bench_kernels.py --rows 128 --tilings --json

A shape is IN:OUT, or IN:OUT+OUT+OUT for matrices that are multiplied with the same rows, in one launch. "reading" is a
kernel that only reads as many bytes and one row, launched in the same way: the least a GEMV could take. "gemm 4" and
"gemm 5" are the kernels of compute capability 9.0; "gemm >4" says that the GEMM picked one itself. Weights are cycled
through more memory than the card's cache holds; times are medians over replays of a CUDA graph.
GB/s counts codes and scales once; the share is of a copy's bytes read and written per second.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import gemm_cuda as card

SHAPES = ["4096:4096", "4096:4096+1024+1024", "4096:14336+14336", "4096:28672", "14336:4096"]


def torch_seconds(in_: int, outs: Sequence[int], rows: int) -> float | None:
    """torch.matmul in half precision, where torch and its CUDA are there."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    x = torch.randn(rows, in_, device="cuda", dtype=torch.float16)
    w = torch.randn(sum(outs), in_, device="cuda", dtype=torch.float16)
    for _ in range(5):
        torch.matmul(x, w.T)
    times = []
    for _ in range(9):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(10):
            torch.matmul(x, w.T)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-4)
    return float(np.median(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, nargs="+", default=[4])
    parser.add_argument("--mode", nargs="+", choices=["a8", "f16"], default=["a8", "f16"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 512, 2048])
    parser.add_argument("--shape", nargs="+", default=SHAPES)
    parser.add_argument("--tilings", action="store_true", help="each tiling of the GEMM, not only the one it picks")
    parser.add_argument("--gemm-from", type=int, default=33, help="rows from which the GEMM is used")
    parser.add_argument("--no-graph", action="store_true", help="launch one by one")
    parser.add_argument("--launches", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    try:
        ops = card.load()
    except card.Unavailable as reason:
        sys.exit(f"bench_kernels: {reason}")
    name, copy = ops.device_name().decode(), card.copy_rate(ops)
    results: list[dict[str, Any]] = []

    def report(line: str) -> None:
        if not args.json:
            print(line, flush=True)

    report(f"{name}, copies {copy / 1e9:.0f} GB/s")
    head = ("kernel", "us", "GB/s", "copy", "TFLOPS")
    report(f"{'shape':>22} {'bits':>4} {'mode':>5} {'rows':>5} " + "{:>7} {:>9} {:>6} {:>5} {:>7}".format(*head))
    for shape in args.shape:
        in_text, outs_text = shape.split(":")
        in_, outs = int(in_text), [int(out) for out in outs_text.split("+")]
        for bits in args.bits:
            size = sum(-(-in_ // 16) * -(-out // 16) * 32 * bits + 32 * -(-out // 16) for out in outs)
            if 1 in args.rows:
                seconds = float(np.median(card.time_reading(ops, size, in_, args.launches, not args.no_graph,
                                                            args.repeats)))  # fmt: skip
                rate = size / seconds
                results.append({"shape": shape, "bits": bits, "rows": 1, "kernel": "reading", "seconds": seconds,
                                "bytes_per_second": rate, "share_of_copy": rate / copy})  # fmt: skip
                report(f"{shape:>22} {bits:4} {'':>5} {1:5} reading {seconds * 1e6:9.2f} "
                       f"{rate / 1e9:6.0f} {rate / copy:5.0%}")  # fmt: skip
            for mode in args.mode:
                for rows in args.rows:
                    gemm = rows >= args.gemm_from
                    picked = card.hopper_tiling(ops, mode == "f16", bits, outs, rows) if gemm else None
                    tilings = range(4) if picked is None else range(6)
                    for tiling in [-1, *tilings] if gemm and args.tilings else [-1]:
                        kind = card.GEMM if gemm else card.GEMV_OF_ROWS if rows <= 2 else card.GEMV
                        seconds = float(np.median(card.time_product(
                            ops, kind, mode == "f16", bits, in_, outs, rows, tiling, args.launches,
                            not args.no_graph, args.repeats)))  # fmt: skip
                        kernel = ("gemm" if gemm else "gemv") + (f" {tiling}" if tiling >= 0 else "")
                        if tiling < 0 and picked is not None and picked >= 0:  # one of compute capability 9.0
                            kernel += f" >{picked}"
                        rate, flops = size / seconds, 2 * rows * in_ * sum(outs) / seconds
                        results.append({"shape": shape, "bits": bits, "mode": mode, "rows": rows, "kernel": kernel,
                                        "seconds": seconds, "bytes_per_second": rate, "share_of_copy": rate / copy,
                                        "flops": flops})  # fmt: skip
                        report(f"{shape:>22} {bits:4} {mode:>5} {rows:5} {kernel:>7} {seconds * 1e6:9.2f} "
                               f"{rate / 1e9:6.0f} {rate / copy:5.0%} {flops / 1e12:7.1f}")  # fmt: skip
        if 2048 in args.rows and (seconds := torch_seconds(in_, outs, 2048) or 0):
            flops = 2 * 2048 * in_ * sum(outs) / seconds
            results.append({"shape": shape, "bits": 16, "mode": "f16", "rows": 2048, "kernel": "torch",
                            "seconds": seconds, "flops": flops})  # fmt: skip
            report(f"{shape:>22}   16   f16  2048   torch {seconds * 1e6:9.2f} {'':12} {flops / 1e12:7.1f}")
    if args.json:
        print(json.dumps({"card": name, "copy_bytes_per_second": copy, "results": results}, indent=1))


if __name__ == "__main__":
    main()
