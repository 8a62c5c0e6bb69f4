"""Checks of what users give: numbers, and files that come with a model. Each raises Error with one sentence."""

from __future__ import annotations

import json
import math
import os
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeGuard

from halfturn.error import Error, quoted

MAX_FILE_BYTES = 64 << 20  # of a json file or a template beside a model; real ones have a few kilobytes
MAX_TOKENIZER_BYTES = 256 << 20  # of a tokenizer's vocabulary; large real ones have 35 MB


def is_whole(value: object, low: float, high: float = math.inf) -> TypeGuard[int]:
    """Whether `value` is a whole number, numpy's too, and no bool, from `low` to `high`."""
    return isinstance(value, Integral) and not isinstance(value, bool) and low <= value <= high  # type: ignore[operator]


def is_number(value: object, low: float, high: float) -> TypeGuard[int | float]:
    """Whether `value` is a number, numpy's too, from `low` to `high`; NaN is none."""
    return isinstance(value, Real) and not isinstance(value, bool) and low <= value <= high  # type: ignore[operator]


def check_whole(name: str, value: object, low: int, high: int | None = None) -> int:
    """`value`, which must be whole, from `low` to `high`."""
    if not is_whole(value, low, math.inf if high is None else high):
        allowed = f"at least {low}" if high is None else f"from {low} to {high}"
        raise Error(f"{name} is {quoted(value)}: it must be a whole number, {allowed}")
    return value


def check_number(name: str, value: object, low: float, high: float, above: bool = False) -> None:
    """`value` must be a number from `low` to `high`, or `above` low."""
    if not is_number(value, low, high) or (above and value == low):
        allowed = f"above {low:g} and at most {high:g}" if above else f"from {low} to {high}"
        raise Error(f"{name} is {quoted(value)}: it must be a number {allowed}")


def is_there(file: Path) -> bool:
    """Whether there is such a file: no device or pipe, which might never end, nor a link that leads to no file."""
    if file.is_file():
        return True
    if file.exists():
        raise Error(f"{file} is not a regular file: download or convert the model again")
    if file.is_symlink():
        raise Error(f"{file} is a link to {os.readlink(file)}, where no file is: restore that file or remove the link")
    return False


def read_file(file: Path, limit: int = MAX_FILE_BYTES) -> bytes | None:
    """The bytes of a file of at most `limit` bytes, or None if there is none."""
    try:
        if not is_there(file):
            return None
        if (size := file.stat().st_size) > limit:
            raise Error(f"{file} has {size} bytes, at most {limit} are read: download or convert it again")
        return file.read_bytes()
    except (OSError, ValueError) as error:
        raise Error(f"{file} can't be read: {error}; download or convert the model again") from error


def read_json(file: Path) -> dict[str, Any]:
    """A json object from a file; empty if there is no file."""
    content = read_file(file)
    if content is None:
        return {}
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Error(f"{file} can't be read as json: {error}; download or convert the model again") from error
    if not isinstance(found, dict):
        raise Error(f"{file} holds a {type(found).__name__}, not a json object: download or convert the model again")
    return found
