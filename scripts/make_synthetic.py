#!/usr/bin/env python3
"""Writes a Halfturn checkpoint of a given shape with random codes: for measuring speed without the model.

    scripts/make_synthetic.py OUT --shape llama-3.2-1b [--bits 4 --head-bits 6 --embed-bits 8 --layers N --overwrite]
    scripts/make_synthetic.py OUT --shape llama-3.1-8b --bits 3 4 5

SHAPE is a name below or a Hugging Face config.json. Weights are random with the usual spread, so numbers stay
finite and the text is noise; the tokenizer knows every byte and fills the rest of the vocabulary with made-up words.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from halfturn.converter.architectures import ModelConfig, canonical_config, find_family
from halfturn.converter.checkpoint import read_json
from halfturn.converter.codecs.tiles import round_up
from halfturn.converter.write import EMBEDDING, HEAD, LinearPlan, Writer, bits_per_weight, plan_linears, plan_norms
from halfturn.error import Error

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def shape(
    hidden: int,
    ffn: int,
    layers: int,
    heads: int,
    kv: int,
    head: int,
    vocab: int,
    context: int,
    theta: float,
    **more: Any,
) -> ModelConfig:
    return ModelConfig(hidden, ffn, layers, heads, kv, head, vocab, context, 1e-5, theta, **more)


SHAPES = {
    "smollm2-135m": shape(576, 1536, 30, 9, 3, 64, 49152, 8192, 1e5, tie_word_embeddings=True),
    "smollm2-360m": shape(960, 2560, 32, 15, 5, 64, 49152, 8192, 1e5, tie_word_embeddings=True),
    "tinyllama-1.1b": shape(2048, 5632, 22, 32, 4, 64, 32000, 2048, 1e4),
    "llama-3.2-1b": shape(
        2048, 8192, 16, 32, 8, 64, 128256, 131072, 5e5, rope_scaling=LLAMA3, tie_word_embeddings=True
    ),
    "llama-3.2-3b": shape(
        3072, 8192, 28, 24, 8, 128, 128256, 131072, 5e5, rope_scaling=LLAMA3, tie_word_embeddings=True
    ),
    "llama-2-7b": shape(4096, 11008, 32, 32, 32, 128, 32000, 4096, 1e4),
    "llama-3.1-8b": shape(4096, 14336, 32, 32, 8, 128, 128256, 131072, 5e5, rope_scaling={**LLAMA3, "factor": 8.0}),
    "llama-3.1-70b": shape(8192, 28672, 80, 64, 8, 128, 128256, 131072, 5e5, rope_scaling={**LLAMA3, "factor": 8.0}),
}
BOS, EOS = 0, 1


def find_shape(name: str) -> ModelConfig:
    if name in SHAPES:
        return SHAPES[name]
    if not Path(name).is_file():
        raise Error(f"{name} is neither a config.json nor one of {', '.join(SHAPES)}")
    config = read_json(Path(name), "it describes the model")
    return canonical_config(config, find_family(config))


def random_linear(
    name: str, plan: LinearPlan, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """Tiles, scales, levels and bias; the weights' standard deviation is 1 for the embedding, else 1/sqrt(inputs)."""
    tiles_shape = plan.tensors(name)[0].shape
    tiles = rng.integers(0, 2**32, tiles_shape, dtype=np.uint32)
    count = 2**plan.bits
    levels = np.minimum(np.arange(count) - 127, 127) if plan.bits == 8 else np.linspace(-127, 127, count).round()
    spread = 1.0 if name == EMBEDDING else 1 / math.sqrt(plan.ins)
    scales = rng.uniform(0.8, 1.2, (plan.groups, round_up(plan.outs))) * (spread / levels.std())
    scales[:, plan.outs :] = 0
    bias = rng.standard_normal(plan.outs, dtype=np.float32) * 0.1 if plan.bias else None
    return tiles, scales.astype(np.float16), levels.astype(np.int8), bias


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """A byte-level BPE tokenizer of exactly `vocabulary` tokens: two special ones, the bytes, made-up words."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]  # GPT-2's names of bytes
    words = [f"Ġw{i}" for i in range(vocabulary - 2 - len(alphabet))]
    if len(alphabet) + 2 > vocabulary:
        raise Error(f"the vocabulary has {vocabulary} tokens, bytes and special tokens need {len(alphabet) + 2}")
    names = ["<s>", "</s>", *alphabet, *words]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": names[i], **plain} for i in (BOS, EOS)],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "vocab": {name: i for i, name in enumerate(names)}, "merges": []},
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": names[BOS],
        "eos_token": names[EOS],
        "add_bos_token": True,
        "chat_template": "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",
    }
    contents: dict[str, Any] = {"tokenizer.json": tokenizer, "tokenizer_config.json": settings}
    for file, content in contents.items():
        (folder / file).write_text(json.dumps(content, ensure_ascii=False) + "\n", "utf-8")


def write(
    out: Path,
    config: ModelConfig,
    bits: Sequence[int],
    head_bits: int,
    embed_bits: int,
    *,
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes the checkpoint, whose matrices take the widths in turn; returns its sizes. Raises Error."""
    config = dataclasses.replace(config, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=None)
    layers = range(config.num_hidden_layers)
    names = [f"model.layers.{i}.{short}" for i in layers for short in config.linear_shapes()]
    widths = dict(zip(names, itertools.cycle(bits)))
    # r4_block as the converter chooses it: the largest power of two up to 1024 that divides half of the input.
    block = math.gcd(config.intermediate_size // 2, 1024)
    linears = plan_linears(config, {**widths, EMBEDDING: embed_bits, HEAD: head_bits}, r4_block=block)
    rng = np.random.Generator(np.random.SFC64(seed))
    writer = Writer(out, config, linears, rotation="hadamard", means=True, overwrite=overwrite)
    try:
        for name, plan in linears.items():
            writer.write_linear(name, *random_linear(name, plan, rng))
        for planned in plan_norms(config, means=True):
            if planned.name.endswith(".mean"):
                writer.write(planned.name, rng.normal(0, 0.5, planned.shape).astype(np.float16))
        card = "# Random weights\n\nFor measuring speed. Written by scripts/make_synthetic.py.\n"
        writer.finish(lambda folder: write_tokenizer(folder, config.vocab_size), card)
    except BaseException:
        writer.abort()
        raise
    return {"output": str(out), **bits_per_weight(config, linears, means=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", default="llama-3.2-1b", help=f"config.json, or {', '.join(SHAPES)}")
    several = "several: matrices take them in turn"
    parser.add_argument("--bits", type=int, nargs="+", choices=range(2, 9), default=[4], metavar="2..8", help=several)
    parser.add_argument("--head-bits", type=int, choices=range(2, 9), default=6, metavar="2..8")
    parser.add_argument("--embed-bits", type=int, choices=range(2, 9), default=8, metavar="2..8")
    parser.add_argument("--layers", type=int, help="fewer or more layers than the shape has")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true")
    a = parser.parse_args()
    begin = time.perf_counter()
    try:
        config = find_shape(a.shape)
        if a.layers is not None:
            config = dataclasses.replace(config, num_hidden_layers=a.layers)
        sizes = write(a.out, config, a.bits, a.head_bits, a.embed_bits, seed=a.seed, overwrite=a.overwrite)
    except Error as error:
        sys.exit(str(error))
    print(json.dumps({**sizes, "seconds": round(time.perf_counter() - begin, 2)}))


if __name__ == "__main__":
    main()
