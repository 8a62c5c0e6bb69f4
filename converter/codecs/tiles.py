"""Codes <-> tiles: the order in which the file stores quantized weights (numpy only).

A tile is 16 inputs x 16 outputs. Its 256 codes follow the lanes of the tensor-core fragment m16n8k16: element 8*l + j
of lane l = 4*q + c and j = 4*h + 2*kh + b is output q + 8*h, input 2*c + b + 8*kh of the tile. The bits of a code are
split into planes, widest first and low bits first; a plane of p bits packs p bits of every element, little-endian.
"""

from __future__ import annotations

import numpy as np

from halfturn.error import Error

TILE = 16
PLANES: dict[int, tuple[int, ...]] = {
    2: (2,),
    3: (2, 1),
    4: (4,),
    5: (4, 1),
    6: (4, 2),
    7: (4, 2, 1),
    8: (8,),
}


def round_up(size: int) -> int:
    """The next multiple of 16: a dimension as it is in the file."""
    return -(-size // TILE) * TILE


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 codes [out_padded, in_padded] -> uint32 tiles [in_padded/16, out_padded/16, 8*bits]. Raises Error."""
    planes = _planes(bits)
    if codes.ndim != 2 or codes.dtype != np.uint8 or codes.shape[0] % TILE or codes.shape[1] % TILE or not codes.size:
        raise Error(f"codes are {codes.dtype} {list(codes.shape)}, tiles need uint8 and multiples of {TILE}")
    if bits < 8 and codes.max() >> bits:
        raise Error(f"a code is {codes.max()}, the largest of {bits} bits is {2**bits - 1}")
    outs, ins = codes.shape[0] // TILE, codes.shape[1] // TILE
    axes = codes.reshape(outs, 2, 8, ins, 2, 4, 2)  # out tile, h, q, in tile, kh, c, b
    elements = axes.transpose(3, 0, 2, 5, 1, 4, 6).reshape(ins, outs, 256)
    packed = np.empty((ins, outs, 32 * bits), np.uint8)
    shift = begin = 0
    for width in planes:
        fields = ((elements >> shift) & (2**width - 1)).reshape(ins, outs, 32 * width, 8 // width)
        plane = packed[:, :, begin : begin + 32 * width]
        plane[...] = fields[..., 0]
        for i in range(1, 8 // width):
            plane |= fields[..., i] << (i * width)
        begin += 32 * width
        shift += width
    return packed.view("<u4")


def unpack_codes(tiles: np.ndarray, bits: int) -> np.ndarray:
    """uint32 tiles [in_padded/16, out_padded/16, 8*bits] -> uint8 codes [out_padded, in_padded]. Raises Error."""
    planes = _planes(bits)
    if tiles.ndim != 3 or tiles.dtype != np.uint32 or tiles.shape[2] != 8 * bits:
        raise Error(f"tiles are {tiles.dtype} {list(tiles.shape)}, {bits} bits need uint32 [in/16, out/16, {8 * bits}]")
    ins, outs = tiles.shape[:2]
    packed = np.ascontiguousarray(tiles, "<u4").view(np.uint8).reshape(ins, outs, 32 * bits)
    elements = np.zeros((ins, outs, 256), np.uint8)
    shift = begin = 0
    for width in planes:
        plane = packed[:, :, begin : begin + 32 * width]
        fields = elements.reshape(ins, outs, 32 * width, 8 // width)
        for i in range(8 // width):
            fields[..., i] |= ((plane >> (i * width)) & (2**width - 1)) << shift
        begin += 32 * width
        shift += width
    axes = elements.reshape(ins, outs, 8, 4, 2, 2, 2)  # in tile, out tile, q, c, h, kh, b
    return np.ascontiguousarray(axes.transpose(1, 4, 2, 0, 5, 3, 6).reshape(outs * TILE, ins * TILE))


def _planes(bits: int) -> tuple[int, ...]:
    if bits not in PLANES:
        raise Error(f"codes of {bits} bits are not stored; widths are 2 to 8")
    return PLANES[bits]
