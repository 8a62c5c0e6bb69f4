"""The grid codec for one matrix at a time; the converter encodes those together that read the same input."""

from __future__ import annotations

from typing import Any

from halfturn.converter.codecs.grid import GridTensors, encode_group


def encode(weight: Any, hessian: Any, bits: int, *, name: str = "matrix", **settings: Any) -> GridTensors:
    """One matrix [out, in]; settings as encode_group has them."""
    return encode_group([weight], hessian, [bits], names=[name], **settings)[0]


def rtn(weight: Any, bits: int, *, name: str = "matrix", group_size: int | None = None) -> GridTensors:
    """One matrix [out, in], rounded to nearest."""
    return encode(weight, None, bits, name=name, group_size=group_size)
