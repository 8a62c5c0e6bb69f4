"""The CPU kernels of one instruction set with numpy arguments, compiled from tests/cpp/kernels.cpp when needed, or
those of attention on a card, or on one that the CPU emulates, from tests/cpp/kernels_cuda.cu.

    ops = load("avx2")            # "generic", "avx2", "avx512", "cuda" or "emulated"
    pool = Pool(ops, layers=1, kv_heads=3, head_dim=64, k_bits=8, v_bits=8, pages=4)
    pool.store(0, pages, position, rotary, q, k, v); out = pool.attend(0, pages, position, q)

Errors of the C++ side are raised as KernelError.
"""

from __future__ import annotations

import ctypes
import os
import sysconfig
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

import compiled
from compiled import ROOT, isa_flags

SOURCES = ["tests/cpp/kernels.cpp", "csrc/pages.cpp", "csrc/rope.cpp"]
FLAGS = "-std=c++20 -O3 -fPIC -ffp-contract=fast -fno-math-errno -fno-trapping-math -Wno-psabi"
CUDA_SOURCES = ["tests/cpp/kernels_cuda.cu", "csrc/cuda/cuda.cpp", "csrc/cuda/rope.cu", "csrc/cuda/attention.cu",
                "csrc/cuda/flash.cu", "csrc/cuda/rows.cu", "csrc/rope.cpp"]  # fmt: skip
PAGE = 32


class KernelError(Exception):
    """A sentence from CHECK."""


@lru_cache
def load(isa: str) -> ctypes.CDLL:
    """The kernels of an instruction set, of this machine's card ("cuda") or of a card on the CPU ("emulated"): a second
    or two per thousand lines to compile. Raises Unavailable."""
    if isa in ("cuda", "emulated"):
        make = compiled.for_card if isa == "cuda" else compiled.emulated
        made = make(f"attention-{isa}", [ROOT / source for source in CUDA_SOURCES])
    else:
        compiler = os.environ.get("CXX", sysconfig.get_config_var("CXX") or "c++").split()[0]
        command = [
            compiler,
            *FLAGS.split(),
            *isa_flags().get(isa, "").split(),
            f"-DHALFTURN_ISA={isa}",
            "-I",
            str(ROOT / "csrc"),
        ]
        made = compiled.library(f"kernels-{isa}", command, [ROOT / source for source in SOURCES], [compiler, "-shared"])
    ops = ctypes.CDLL(str(made))
    for name in ("pool_new", "rope_new"):
        getattr(ops, name).restype = ctypes.c_void_p
    ops.error_message.restype = ctypes.c_char_p
    ops.pool_page_bytes.restype = ctypes.c_int64
    ops.rope_at.restype = ctypes.POINTER(ctypes.c_float)
    return ops


def on_card(ops: ctypes.CDLL) -> bool:
    return hasattr(ops, "decode_attention_rows")


def check(ops: ctypes.CDLL) -> None:
    if text := ops.error_message().decode():
        raise KernelError(text)


def call(function: Any, *arguments: Any) -> Any:
    """Calls a C function: integers as int64, floats as double, arrays as pointers to their (contiguous) data."""
    converted: list[Any] = []
    for argument in arguments:
        if isinstance(argument, np.ndarray):
            assert argument.flags.c_contiguous
            converted.append(ctypes.c_void_p(argument.ctypes.data))
        elif isinstance(argument, float):
            converted.append(ctypes.c_double(argument))
        elif isinstance(argument, (int, np.integer)):
            converted.append(ctypes.c_int64(int(argument)))
        else:
            converted.append(argument)
    return function(*converted)


def rms_norm(
    ops: ctypes.CDLL, x: np.ndarray, weight: np.ndarray, epsilon: float, mean: np.ndarray | None = None
) -> np.ndarray:
    out = np.empty_like(x)
    call(ops.rms_norm, x, weight, mean, x.size, epsilon, out)
    return out


def swiglu(ops: ctypes.CDLL, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    out = np.empty_like(gate)
    call(ops.swiglu, gate, up, gate.size, out)
    return out


def hadamard(ops: ctypes.CDLL, x: np.ndarray, block: int) -> np.ndarray:
    out = x.copy()
    call(ops.hadamard, out, x.size, block)
    return out


def round_to_half(ops: ctypes.CDLL, x: np.ndarray, padded: int) -> np.ndarray:
    out = np.full(padded, np.nan, np.float32)
    call(ops.round_to_half, x, x.size, padded, out)
    return out


def activate(ops: ctypes.CDLL, gate: np.ndarray, up: np.ndarray, size: int, block: int, half: bool) -> np.ndarray:
    """The operand of block Hadamard transforms of silu(gate) * up, on a card; rows are padded to tiles with zeros."""
    out = np.full((len(gate), -(-size // 64) * 64), np.nan, np.float32)
    call(ops.activate, size, gate.shape[1], block, len(gate), int(half), gate, up, out)
    check(ops)
    return out


def activate_in_place(ops: ctypes.CDLL, gate: np.ndarray, up: np.ndarray, size: int, block: int) -> tuple:
    """Few rows' block Hadamard transforms of silu(gate) * up, and the largest magnitude of each, on a card."""
    out, largest = np.full_like(gate, np.nan), np.full(len(gate), np.nan, np.float32)
    call(ops.activate_in_place, size, gate.shape[1], block, len(gate), gate, up, out, largest)
    check(ops)
    return out, largest


class Pool:
    """KvPool; queries are [tokens, heads, head_dim], keys and values [tokens, kv_heads, head_dim], all float32."""

    def __init__(self, ops: ctypes.CDLL, layers: int, kv_heads: int, head_dim: int, k_bits: int, v_bits: int,
                 pages: int, rotate: bool = False) -> None:  # fmt: skip
        self.ops, self.kv_heads, self.head_dim, self.bits = ops, kv_heads, head_dim, (k_bits, v_bits)
        self.groups, self.page_count = -(-head_dim // 32), pages
        handle = call(ops.pool_new, layers, kv_heads, head_dim, k_bits, v_bits, pages, int(rotate))
        check(ops)
        self.handle = ctypes.c_void_p(handle)

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            self.ops.pool_free(self.handle)

    @property
    def page_bytes(self) -> int:
        return int(self.ops.pool_page_bytes(self.handle))

    def store(self, layer: int, pages: np.ndarray, position: int, rotary: np.ndarray, q: np.ndarray, k: np.ndarray,
              v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        """Writes keys and values; returns q and k after RoPE and the Hadamard transform."""
        q, k = q.copy(), k.copy()
        call(self.ops.rope_and_store, self.handle, layer, pages, position, len(q), rotary, q.shape[1], q, k, v)
        check(self.ops)
        return q, k

    def attend(self, layer: int, pages: np.ndarray, position: int, q: np.ndarray, chunk: int = 1 << 30) -> np.ndarray:
        out = np.full_like(q, np.nan)
        call(self.ops.attention, self.handle, layer, q.shape[1], pages, position, len(q), chunk, q, out)
        check(self.ops)
        return out

    def attend_in_chunks(self, layer: int, pages: np.ndarray, position: int, q: np.ndarray) -> np.ndarray:
        """Token by token, each chunk of keys on its own, then merged."""
        out = np.full_like(q, np.nan)
        call(self.ops.attention_in_chunks, self.handle, layer, q.shape[1], pages, position, len(q), q, out)
        check(self.ops)
        return out

    def decode(self, layer: int, pages: np.ndarray, position: int, q: np.ndarray) -> np.ndarray:
        """Every token as a row of decode, all in one launch: on a card."""
        out = np.full_like(q, np.nan)
        call(self.ops.decode_attention_rows, self.handle, layer, q.shape[1], pages, position, len(q), q, out)
        check(self.ops)
        return out

    def step(self, layer: int, pages: np.ndarray, positions: np.ndarray, rotary: np.ndarray, q: np.ndarray,
             k: np.ndarray, v: np.ndarray, fused: bool) -> np.ndarray:  # fmt: skip
        """A step of decoding on a card, row r at positions[r] of a sequence of its own with pages[r]; q, k and v are
        not turned yet. `fused`: in one launch."""
        out = np.full_like(q, np.nan)
        call(self.ops.decode_step, self.handle, layer, q.shape[1], pages, pages.shape[1], positions, len(q), rotary,
             len(rotary), int(fused), q, k, v, out)  # fmt: skip
        check(self.ops)
        return out

    def bytes(self) -> np.ndarray:
        """All of the pool's memory, on a card."""
        out = np.empty(self.page_bytes * self.page_count, np.uint8)
        call(self.ops.pool_bytes, self.handle, out)
        check(self.ops)
        return out

    def read(self, layer: int, page: int, kv_head: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values of one page, decoded as pages.h describes them: float64 [32, head_dim] each."""
        parts = (ctypes.c_void_p * 4)()
        call(self.ops.pool_block, self.handle, layer, page, kv_head, parts)
        dim, groups = self.head_dim, self.groups

        def take(part: int, dtype: Any, *shape: int) -> np.ndarray:
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            return np.frombuffer(ctypes.string_at(parts[part] or 0, size), dtype).reshape(shape)

        def nibbles(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            signed = [((half ^ 8).astype(np.float64) - 8) for half in (codes & 15, codes >> 4)]
            return signed[0], signed[1]

        def scales(part: int) -> np.ndarray:  # [positions, groups * 32]
            return np.repeat(take(part, np.float16, groups, PAGE).astype(np.float64), 32, axis=0).T

        k_bits, v_bits = self.bits
        if k_bits == 16:
            k = take(0, np.float16, dim, PAGE).T.astype(np.float64)
        elif k_bits == 8:
            k = take(0, np.int8, dim, PAGE).T * scales(1)[:, :dim]
        else:
            k = np.stack(nibbles(take(0, np.uint8, dim // 2, PAGE)), 1).reshape(dim, PAGE).T * scales(1)[:, :dim]
        if v_bits == 16:
            v = take(2, np.float16, groups, PAGE, 32).transpose(1, 0, 2).reshape(PAGE, -1).astype(np.float64)
        elif v_bits == 8:
            v = take(2, np.int8, groups, PAGE, 32).transpose(1, 0, 2).reshape(PAGE, -1) * scales(3)
        else:
            low, high = nibbles(take(2, np.uint8, groups, PAGE, 16))
            v = np.concatenate([low, high], 2).transpose(1, 0, 2).reshape(PAGE, -1) * scales(3)
        return k, v[:, :dim]


def rope_table(ops: ctypes.CDLL, head_dim: int, context: int, positions: Sequence[int], theta: float = 10000.0,
               kind: str = "none", factor: float = 1.0, low: float = 1.0, high: float = 4.0, original: float = 0.0,
               max_positions: int = 2048) -> np.ndarray:  # fmt: skip
    """float32 [positions, 2, head_dim/2]."""
    number = ["none", "linear", "dynamic", "llama3"].index(kind)
    handle = ctypes.c_void_p(
        call(ops.rope_new, head_dim, max_positions, theta, number, factor, low, high, float(original), context)
    )
    try:
        rows = []
        for position in positions:
            pointer = call(ops.rope_at, handle, position)
            check(ops)
            rows.append(np.ctypeslib.as_array(pointer, (2, head_dim // 2)).copy())
        return np.stack(rows)
    finally:
        ops.rope_free(handle)
