#!/usr/bin/env python3
"""Runs small models through the kernels of the CUDA backend: what compute-sanitizer watches. Of the GEMMs it runs what
small matrices pick, so not those of compute capability 9.0; of steps those as a whole; heads of up to 128.

scripts/gpu_sanitize.py [BITS...]        without arguments: every width
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from checkpoints import write_checkpoint
from halfturn import _C


def main() -> None:
    shape = dict(layers=1, heads=4, kv_heads=2, rotation="hadamard", r4_block=32, max_position_embeddings=4096)
    with tempfile.TemporaryDirectory() as folder:
        for bits, k, v, head_dim, groups in ((2, 4, 4, 16, 1), (3, 8, 8, 64, 1), (4, 16, 16, 16, 2), (5, 8, 4, 80, 1),
                                             (6, 4, 4, 128, 1), (7, 8, 8, 16, 1), (8, 8, 16, 64, 1)):  # fmt: skip
            if sys.argv[1:] and str(bits) not in sys.argv[1:]:
                continue
            path = Path(folder) / str(bits)
            vocab = 9000 if bits == 4 else 300  # many: the head's GEMV copies its operand
            intermediate = 6208 if bits in (2, 5) else 192  # many: all warps of a block share a pair of tiles
            write_checkpoint(
                path, **shape, vocab=vocab, hidden=4 * head_dim, intermediate=intermediate, head_dim=head_dim,
                bits=bits, groups=groups, means=bits != 5,
            )  # fmt: skip
            for mode in ("a8", "f16"):
                model = _C.Model(str(path), device="cuda", mode=mode, k_bits=k, v_bits=v, context=2304, kv_tokens=4096)
                tables = [list(range(8 * i, 8 * i + 8)) for i in range(9)]
                for rows in (70, 20, 9, 3):  # the GEMM, then the GEMV for 32, 16 and 8 rows
                    model.logits([_C.Item([7] * rows, 0, tables[0])])
                samplers = [
                    _C.Sampler(temperature=0.0), _C.Sampler(temperature=0.7, seed=1), _C.Sampler(top_k=5),
                    _C.Sampler(top_p=0.8, logprobs=3), _C.Sampler(min_p=0.1, repetition_penalty=1.2),
                    _C.Sampler(temperature=0.0, banned=[1, 2], logit_bias={5: 3.0}),
                ]  # fmt: skip
                for turn in range(2):
                    items = [_C.Item([5 + turn], 130 + turn, table, s) for table, s in zip(tables, samplers)]
                    for item in items:
                        model.step([item])
                    model.step(items)
                model.step([_C.Item([5], 2200, tables[0] * 9, samplers[0])])  # chunks of more than one part


if __name__ == "__main__":
    main()
