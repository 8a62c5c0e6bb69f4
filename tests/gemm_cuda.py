"""Products on a CUDA card with numpy arguments, compiled from tests/cpp/gemm_cuda.cu when needed.

    library = load()                                   # pytest.skip()s, or raises Unavailable(reason) for scripts
    matrix = Matrix(library, codes, scales, levels)    # codes [out, in] of a width, scales float16 [groups, out_padded]
    y = product(library, GEMM, [matrix], Int8(x, scales), rows)

Errors of the C++ side are raised as KernelError.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

import compiled
from compiled import ROOT, Unavailable
from halfturn import _C
from kernels import call, check

HOPPER = "-gencode arch=compute_90a,code=sm_90a"  # for csrc/cuda/hopper
GEMV, GEMM, GEMV_OF_ROWS = 0, 1, 2
STEP = 64
ORDER = [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]  # of a tile's inputs, csrc/cuda/operand.h


def sources() -> list[Path]:
    own = [ROOT / "tests/cpp/gemm_cuda.cu", *(ROOT / "csrc/cuda" / f for f in ("cuda.cpp", "gemv.cu", "gemm.cu"))]
    return own + sorted(ROOT.glob("csrc/cuda/instances/gem[mv]_*.cu"))


@lru_cache
def load() -> ctypes.CDLL:
    """The library of this machine's card: a minute of one core per two widths to compile. Raises Unavailable."""
    compiled.card()
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    hopper = "9.0" in subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()

    def targets(source: Path) -> list[str]:
        return HOPPER.split() if source.parent.name == "hopper" else ["-arch=native"]

    of_hopper = sorted(ROOT.glob("csrc/cuda/hopper/*.cu")) if hopper else []
    flags = "" if hopper else "-DHALFTURN_NO_HOPPER"
    return opened(compiled.for_card("gemm-cuda", sources() + of_hopper, flags, targets))


@lru_cache
def load_emulated() -> ctypes.CDLL:
    """The same kernels on the CPU: half a minute of two cores to compile. Raises Unavailable."""
    return opened(compiled.emulated("gemm-emulated", sources()))


def opened(library: Path) -> ctypes.CDLL:
    ops = ctypes.CDLL(str(library))
    ops.matrix_new.restype = ctypes.c_void_p
    ops.error_message.restype = ops.device_name.restype = ctypes.c_char_p
    call(ops.device_name)
    if reason := ops.error_message().decode():
        raise Unavailable(reason)
    return ops


class Matrix:
    """codes uint8 [out, in] in true sizes, scales float16 [groups, out padded], levels int8 [2^bits]."""

    def __init__(self, ops: ctypes.CDLL, bits: int, codes: np.ndarray, scales: np.ndarray, levels: np.ndarray,
                 bias: np.ndarray | None = None) -> None:  # fmt: skip
        self.ops, self.bits, self.codes, self.scales, self.levels, self.bias = ops, bits, codes, scales, levels, bias
        self.out, self.in_ = codes.shape
        padded = np.full((-(-self.out // 16) * 16, -(-self.in_ // 16) * 16), (1 << bits) - 2, np.uint8)
        padded[: self.out, : self.in_] = codes
        assert scales.dtype == np.float16 and scales.shape[1] == len(padded)
        assert levels.dtype == np.int8 and levels.shape == (1 << bits,)
        handle = call(ops.matrix_new, bits, self.in_, self.out, len(scales), _C.pack(padded, bits), scales, levels,
                      bias)  # fmt: skip
        check(ops)
        self.handle = ctypes.c_void_p(handle)

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            self.ops.matrix_free(self.handle)


class Operand:
    """int8 [rows, in] with float32 scales [rows], or float16 [rows, in] without."""

    def __init__(self, x: np.ndarray, scales: np.ndarray | None = None) -> None:
        assert x.dtype == (np.float16 if scales is None else np.int8)
        self.x, self.scales = x, scales

    def memory(self, rows: int, extra: int) -> tuple[np.ndarray, np.ndarray | None]:
        """[steps, rows padded by at least `extra`, 64] of the first rows; rows of padding are no numbers."""
        steps, padded = -(-self.x.shape[1] // STEP), (rows + extra + 7) // 8 * 8
        values = np.full((padded, steps * STEP), np.nan if self.scales is None else 77, self.x.dtype)
        values[:rows] = 0
        values[:rows, : self.x.shape[1]] = self.x[:rows]
        tiles = values.reshape(padded, steps * 4, 16)[..., ORDER].reshape(padded, steps, STEP)
        if self.scales is None:
            return np.ascontiguousarray(tiles.transpose(1, 0, 2)), None
        scales = np.full(padded, np.nan, np.float32)
        scales[:rows] = self.scales[:rows]
        return np.ascontiguousarray(tiles.transpose(1, 0, 2)), scales


def product(ops: ctypes.CDLL, kind: int, matrices: Sequence[Matrix], x: Operand, rows: int,
            before: Sequence[np.ndarray] | None = None, tiling: int = -1,
            extra: int = 0) -> list[np.ndarray]:  # fmt: skip
    """y [rows, out] of each matrix, added to `before` where there is one. Checks that nothing beside y is written."""
    memory, scales = x.memory(rows, extra)
    gap = 3
    y = [np.full((rows, m.out + gap), 123.25, np.float32) for m in matrices]
    for i, old in enumerate(before or ()):
        y[i][:, :-gap] = old
    count = len(matrices)
    handles = (ctypes.c_void_p * count)(*(m.handle for m in matrices))
    pointers = (ctypes.c_void_p * count)(*(v.ctypes.data for v in y))
    strides = np.array([v.shape[1] for v in y], np.int64)
    call(ops.product, kind, handles, count, memory, scales, rows, memory.shape[1], memory.shape[0], pointers, strides,
         int(before is not None), tiling)  # fmt: skip
    check(ops)
    for v in y:
        assert (v[:, -gap:] == 123.25).all()
    return [v[:, :-gap] for v in y]


def product_of_rows(
    ops: ctypes.CDLL, matrices: Sequence[Matrix], x: np.ndarray, half: bool, **source: Any
) -> list[np.ndarray]:
    """y of up to two rows x float32 [rows, in] that the blocks make an operand of: as they are, with their largest
    magnitudes `maxima` [rows, parts] if given, or with `norm` normed, times `weight`, less `mean` (float16 [in])."""
    norm, weight, mean, maxima = (source.get(name) for name in ("norm", "weight", "mean", "maxima"))
    y = [np.zeros((len(x), m.out), np.float32) for m in matrices]
    call(ops.product_of_rows, (ctypes.c_void_p * len(y))(*(m.handle for m in matrices)), len(y), x, len(x), x.shape[1],
         int(half), int(bool(norm)), weight, mean, maxima, 0 if maxima is None else maxima.shape[1],
         (ctypes.c_void_p * len(y))(*(a.ctypes.data for a in y)), np.array([m.out for m in matrices]))  # fmt: skip
    check(ops)
    return y


def hopper_tiling(ops: ctypes.CDLL, half: bool, bits: int, outs: Sequence[int], rows: int) -> int | None:
    """Which tiling for compute capability 9.0 the GEMM picks for matrices that share a launch: 4, 5, or -1 for none;
    None where there are none."""
    tiling = int(call(ops.hopper_tiling, int(half), bits, np.array(outs, np.int64), len(outs), rows))
    check(ops)
    return None if tiling < -1 else tiling


def time_product(ops: ctypes.CDLL, kind: int, half: bool, bits: int, in_: int, outs: Sequence[int], rows: int,
                 tiling: int = -1, launches: int = 20, graph: bool = True, repeats: int = 9) -> np.ndarray:  # fmt: skip
    """Seconds of a launch, one value per repeat."""
    seconds = np.zeros(repeats)
    call(ops.time_product, kind, int(half), tiling, bits, in_, np.array(outs, np.int64), len(outs), rows, launches,
         int(graph), repeats, seconds)  # fmt: skip
    check(ops)
    return seconds


def time_reading(ops: ctypes.CDLL, size: int, in_: int, launches: int = 20, graph: bool = True,
                 repeats: int = 9) -> np.ndarray:  # fmt: skip
    """Seconds of a launch that only reads `size` bytes of weights and one row, one value per repeat."""
    seconds = np.zeros(repeats)
    call(ops.time_reading, size, in_, launches, int(graph), repeats, seconds)
    check(ops)
    return seconds


def copy_rate(ops: ctypes.CDLL, size: int = 1 << 30, repeats: int = 9) -> float:
    """Bytes read and written per second, the median."""
    rates = np.zeros(repeats)
    call(ops.time_copy, size, repeats, rates)
    check(ops)
    return float(np.median(rates))
