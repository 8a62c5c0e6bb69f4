"""Halfturn: rotated mixed-precision inference for Llama-family models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halfturn.error import Error
    from halfturn.generator import Generator, Job, Output, Piece
    from halfturn.model import Model
    from halfturn.sampling import SamplingParams
    from halfturn.tokenizer import Tokenizer

__version__ = "0.1.0"
__all__ = ["Error", "Generator", "Job", "Model", "Output", "Piece", "SamplingParams", "Tokenizer"]

_HOME = {
    "Error": "error",
    "Generator": "generator",
    "Job": "generator",
    "Model": "model",
    "Output": "generator",
    "Piece": "generator",
    "SamplingParams": "sampling",
    "Tokenizer": "tokenizer",
}


def __getattr__(name: str) -> Any:
    """Names are imported on first use, so that `import halfturn` stays quick."""
    if name not in _HOME:
        raise AttributeError(f"module 'halfturn' has no attribute {name!r}")
    return getattr(import_module(f"halfturn.{_HOME[name]}"), name)
