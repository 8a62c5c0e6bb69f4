"""Tiles: hand-computed positions of codes, every width against one bit at a time."""

from __future__ import annotations

import numpy as np
import pytest

from halfturn.converter.codecs.tiles import PLANES, pack_codes, unpack_codes
from halfturn.error import Error


def only(out: int, in_: int, code: int, shape: tuple[int, int] = (16, 16)) -> np.ndarray:
    codes = np.zeros(shape, np.uint8)
    codes[out, in_] = code
    return codes


@pytest.mark.parametrize(
    ("bits", "out", "in_", "code", "words"),
    [
        (4, 0, 0, 7, {0: 7}),
        (4, 0, 1, 7, {0: 7 << 4}),  # b: the next element of the lane
        (4, 0, 8, 7, {0: 7 << 8}),  # kh: two elements on
        (4, 8, 0, 7, {0: 7 << 16}),  # h: four elements on
        (4, 0, 2, 7, {1: 7}),  # c: the next lane
        (4, 1, 0, 7, {4: 7}),  # q: four lanes on
        (4, 15, 15, 9, {31: 9 << 28}),
        (4, 5, 11, 9, {21: 9 << 12}),  # q 5, c 1, kh 1, b 1: lane 21, element 3, t = 171
        (2, 5, 11, 3, {10: 3 << 22}),  # bit 342
        (3, 5, 11, 0b101, {10: 1 << 22, 16 + 5: 1 << 11}),
        (5, 5, 11, 0b10110, {21: 6 << 12, 32 + 5: 1 << 11}),
        (6, 5, 11, 0b100101, {21: 5 << 12, 32 + 10: 2 << 22}),
        (7, 5, 11, 0b1100101, {21: 5 << 12, 32 + 10: 2 << 22, 48 + 5: 1 << 11}),
        (8, 5, 11, 0xAB, {42: 0xAB << 24}),  # byte 171
    ],
)
def test_known_positions(bits: int, out: int, in_: int, code: int, words: dict[int, int]) -> None:
    tile = pack_codes(only(out, in_, code), bits)
    assert tile.shape == (1, 1, 8 * bits) and tile.dtype == np.uint32
    assert {int(i): int(tile[0, 0, i]) for i in np.flatnonzero(tile)} == words


def test_tiles_are_ordered_by_input_then_output() -> None:
    tiles = pack_codes(only(17, 33, 3, shape=(32, 48)), 4)
    assert tiles.shape == (3, 2, 32)
    assert np.argwhere(tiles).tolist() == [[2, 1, 4]] and tiles[2, 1, 4] == 3 << 4


def pack_slowly(codes: np.ndarray, bits: int) -> np.ndarray:
    """One bit at a time, from the format's description."""
    outs, ins = codes.shape[0] // 16, codes.shape[1] // 16
    tiles = np.zeros((ins, outs, 8 * bits), np.uint32)
    for (out, in_), code in np.ndenumerate(codes):
        q, h = out % 16 % 8, out % 16 // 8
        c, b, kh = in_ % 16 % 8 // 2, in_ % 2, in_ % 16 // 8
        t = 8 * (4 * q + c) + b + 2 * kh + 4 * h
        begin, left = 0, int(code)
        for plane in PLANES[bits]:
            for i in range(plane):
                bit = begin + t * plane + i
                tiles[in_ // 16, out // 16, bit // 32] |= np.uint32((left & 1) << (bit % 32))
                left >>= 1
            begin += 256 * plane
    return tiles


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width_against_the_slow_reference_and_back(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (32, 48), dtype=np.uint8)
    tiles = pack_codes(codes, bits)
    assert np.array_equal(tiles, pack_slowly(codes, bits))
    assert np.array_equal(unpack_codes(tiles, bits), codes)


def test_tiles_refuse_what_they_cannot_hold() -> None:
    with pytest.raises(Error, match="a code is 8, the largest of 3 bits is 7"):
        pack_codes(only(0, 0, 8), 3)
    with pytest.raises(Error, match=r"codes are uint8 \[16, 20\]"):
        pack_codes(np.zeros((16, 20), np.uint8), 4)
    with pytest.raises(Error, match="codes of 9 bits"):
        pack_codes(only(0, 0, 0), 9)
    with pytest.raises(Error, match=r"tiles are uint32 \[1, 1, 32\], 5 bits need"):
        unpack_codes(np.zeros((1, 1, 32), np.uint32), 5)
