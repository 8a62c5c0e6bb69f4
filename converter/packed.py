"""Matrices as they are kept: quantized ones padded to tiles, as the file has them, and symmetric ones by halves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from halfturn.converter.codecs.grid import GridTensors, decode
from halfturn.converter.codecs.tiles import pack_codes, round_up, unpack_codes

PARTS = ("codes", "scales", "levels")
ROWS = 4096


@dataclass(frozen=True)
class Packed:
    """codes: uint32 tiles [in/16, out/16, 8*bits], held as int32; scales: float16 [groups, out]; levels: int8 [2^bits].

    in and out are padded to multiples of 16: codes of the padding are 0, scales of padded outputs are 0.
    """

    codes: Tensor
    scales: Tensor
    levels: Tensor

    @property
    def bits(self) -> int:
        return len(self.levels).bit_length() - 1

    def weight(self, outs: int, ins: int) -> Tensor:
        """The weights [outs, ins] in float32, without padding: what the runtime multiplies by."""
        codes = torch.from_numpy(unpack_codes(self.codes.numpy().view(np.uint32), self.bits))
        whole = torch.empty(outs, ins)
        for start in range(0, outs, ROWS):  # looking codes up takes several times their size
            rows = slice(start, min(start + ROWS, outs))
            whole[rows] = decode(GridTensors(codes[rows], self.scales[:, rows], self.levels))[:, :ins]
        return whole

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(tiles uint32, scales float16, levels int8), as the writer takes them."""
        return self.codes.numpy().view(np.uint32), self.scales.numpy(), self.levels.numpy()

    def tensors(self, name: str) -> dict[str, Tensor]:
        """For the work folder: NAME.codes, NAME.scales, NAME.levels."""
        return {f"{name}.{part}": getattr(self, part) for part in PARTS}


def pack(grid: GridTensors) -> Packed:
    """Pads a matrix [out, in] and puts its codes into tiles."""
    outs, ins = grid.codes.shape
    codes = np.zeros((round_up(outs), round_up(ins)), np.uint8)
    codes[:outs, :ins] = grid.codes.numpy()
    scales = torch.zeros(len(grid.scales), round_up(outs), dtype=torch.float16)
    scales[:, :outs] = grid.scales
    return Packed(torch.from_numpy(pack_codes(codes, grid.bits).view(np.int32)), scales, grid.levels)


def unpack(tensors: Mapping[str, Tensor], name: str) -> Packed:
    """The inverse of `Packed.tensors`."""
    return Packed(*(tensors[f"{name}.{part}"] for part in PARTS))


def join_rows(parts: list[GridTensors]) -> GridTensors:
    """Matrices of the same width and inputs, one under the other."""
    return GridTensors(
        torch.cat([part.codes for part in parts]), torch.cat([part.scales for part in parts], 1), parts[0].levels
    )


def pack_symmetric(matrix: Tensor) -> Tensor:
    """The upper triangle of a symmetric matrix, in one row."""
    return matrix[tuple(torch.triu_indices(*matrix.shape))]


def unpack_symmetric(triangle: Tensor) -> Tensor:
    """The symmetric matrix of an upper triangle."""
    size = (math.isqrt(8 * len(triangle) + 1) - 1) // 2
    matrix = torch.zeros(size, size)
    matrix[tuple(torch.triu_indices(size, size))] = triangle
    return matrix + matrix.triu(1).T
