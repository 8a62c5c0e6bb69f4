"""What users choose of a conversion, and every cached result depends on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """What decides the numbers of a conversion, widths apart. calibration: text files, none for self-sampled text."""

    rotation: str = "hadamard"
    rounding: str = "gptq"
    calibration: tuple[str, ...] = ()
    calibration_tokens: int = 24576
    seed: int = 0
    tensor_parallel: int = 2
    group_size: int | None = None
    embed_bits: int = 8
    head_bits: int = 6
