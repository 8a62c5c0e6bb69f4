"""The model card, README.md of a checkpoint: its size, its quality and how that was measured, how it was made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from halfturn.console import megabytes
from halfturn.converter.architectures import ModelConfig


@dataclass(frozen=True)
class Quality:
    """Against the source on the same tokens. mean_kl: KL(source || this), nats a token; ratio: of the perplexities.

    text: what the windows were cut from ("text sampled from the model itself, seed 0", "wiki.test.raw").
    """

    mean_kl: float
    perplexity_ratio: float
    top1_agreement: float
    tokens: int
    text: str
    predicted_kl: float | None = None


@dataclass(frozen=True)
class Card:
    """The numbers of a card.

    decoder_bits: bits a weight of the layers' linears with all overhead; file_bytes: of the tensors. widths:
    "down_proj" -> mean bits of a code. facts: "license" and "base_model" as the source states them
    (`Source.card_facts`).
    """

    name: str
    source: str
    config: ModelConfig
    decoder_bits: float
    file_bytes: int
    command: str
    version: str
    quality: Quality | None = None
    rotation: str = "hadamard"
    rounding: str = "gptq"
    calibration: str = ""
    widths: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)


def model_card(card: Card) -> str:
    """README.md with Hugging Face front matter; the same numbers give the same text."""
    text = "\n\n".join([_front_matter(card), _introduction(card), _size(card), *_quality(card), _how(card)]) + "\n"
    return printable(text)


def printable(text: str) -> str:
    """The text with ? for the bytes of file names that are not UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _front_matter(card: Card) -> str:
    lines = ["---", "library_name: halfturn", "pipeline_tag: text-generation"]
    for key in ("license", "base_model"):
        if key in card.facts:
            lines.append(f"{key}: {json.dumps(card.facts[key])}")  # quoted: YAML reads JSON strings
    if "base_model" in card.facts:
        lines.append("base_model_relation: quantized")
    return "\n".join([*lines, "tags:", "- halfturn", "- quantized", "- llama", "---"])


def _introduction(card: Card) -> str:
    return (
        f"# {card.name}\n\n"
        f"{card.source} with {card.decoder_bits:.2f} bits a weight, for Halfturn. "
        f"Run it with\n\n```\nhalfturn chat {card.name}\n```"
    )


def _size(card: Card) -> str:
    weights = card.config.parameters()
    rows = [
        ("decoder linears, all overhead included", "", f"{card.decoder_bits:.3f}"),
        ("whole file", megabytes(card.file_bytes), f"{8 * card.file_bytes / weights:.3f}"),
    ]
    text = _table(("", "size", "bits a weight"), rows)
    note = (
        f"The source has {weights / 1e6:,.1f} million weights; a tied embedding counts once, the file has both copies."
    )
    if not card.config.tie_word_embeddings:
        note = f"The source has {weights / 1e6:,.1f} million weights."
    if card.widths:
        widths = _table(("matrix", "mean bits of a code"), [(k, f"{v:.2f}") for k, v in card.widths.items()])
        note += f"\n\n{widths}"
    return f"## Size\n\n{text}\n\n{note}"


def _quality(card: Card) -> list[str]:
    q = card.quality
    if q is None:
        return ["## Quality\n\nNot measured."]
    rows = [
        ("KL divergence from the source, nats a token", f"{q.mean_kl:.4f}"),
        ("perplexity over the source's", f"{q.perplexity_ratio:.4f}"),
        ("same most likely token", f"{100 * q.top1_agreement:.2f}%"),
    ]
    if q.predicted_kl is not None:
        rows.append(("KL divergence that the allocation predicted", f"{q.predicted_kl:.4f}"))
    how = (
        f"Measured on {q.tokens:,} tokens of {q.text}: every position, the source in float32, the same tokens for both."
    )
    return [f"## Quality\n\n{_table(('against the source', ''), rows)}\n\n{how}"]


def _how(card: Card) -> str:
    turned = {"hadamard": "Random Hadamard rotations (R1, R2, R4; R3 for the cache)", "none": "No rotations"}
    rounded = {"gptq": "rounding with error feedback (GPTQ)", "rtn": "rounding to nearest"}
    text = f"{turned.get(card.rotation, card.rotation)}, {rounded.get(card.rounding, card.rounding)}"
    if card.calibration:
        text += f", calibrated on {card.calibration}"
    return f"## How it was made\n\n{text}. Halfturn {card.version}:\n\n```\n{card.command}\n```"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    align = [":--", *["--:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, tuple(align), *rows])
