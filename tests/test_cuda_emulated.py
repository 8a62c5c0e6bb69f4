"""The CUDA kernels on a CPU, thread by thread (tests/cpp/emulated): products, attention and sampling without a card.

Copies arrive at once or as late as a kernel allows, so that one that reads or writes too early is found.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import gemm_cuda as card
import kernels
import test_attention as on_card_attention
import test_gemm_cuda as on_card
import test_sampler_cuda as on_card_sampler
from gemm_cuda import GEMM, GEMV
from kernels import KernelError, call


@pytest.fixture(scope="module", params=[False, True], ids=["at once", "late"])
def ops(request: pytest.FixtureRequest) -> Iterator[ctypes.CDLL]:
    try:
        library = card.load_emulated()
    except card.Unavailable as reason:
        pytest.skip(str(reason))
    call(library.emulator_late, int(request.param))
    yield library
    call(library.emulator_late, 0)


@pytest.mark.parametrize("width", [2, 3, "2 mirrored", "4 split", "5 split", 6, 7, "straight", 8])
def test_gemv(ops: ctypes.CDLL, width: int | str) -> None:
    on_card.test_products(ops, GEMV, width, half=width in (3, 8))


def test_gemm(ops: ctypes.CDLL) -> None:
    random = np.random.default_rng(1)
    for width, half, rows, in_, out, groups in ((3, False, 65, 192, 80, 1), (4, True, 40, 160, 40, 5),
                                                ("straight", False, 130, 80, 48, 1)):  # fmt: skip
        m = on_card.random_matrix(ops, random, width, in_, out, groups)
        x = on_card.random_operand(random, half, rows, in_)
        for tiling in on_card.TILINGS:
            (y,) = card.product(ops, GEMM, [m], x, rows, tiling=tiling)
            on_card.compare(y, m, x, rows)


def test_several_matrices_in_a_launch(ops: ctypes.CDLL) -> None:
    on_card.test_gemv_of_several_matrices(ops, 9, False)


@pytest.mark.parametrize("width", [3, "4 split", 5, 6, "straight"])
def test_tiles_that_are_left(ops: ctypes.CDLL, width: int | str) -> None:
    """On a card of 6 multiprocessors, with no, some or all blocks having one tile, or a pair, more than others."""
    random = np.random.default_rng(3)
    for tiles in (11, 12, 13, 18, 19, 23, 27):
        m = on_card.random_matrix(ops, random, width, 192, 16 * tiles - 3)
        for rows in (1, 3, 12, 20):
            x = on_card.random_operand(random, False, rows, 192)
            (y,) = card.product(ops, GEMV, [m], x, rows)
            on_card.compare(y, m, x, rows)


@pytest.mark.parametrize("rows", [1, 3, 12])
def test_all_warps_on_one_pair(ops: ctypes.CDLL, rows: int) -> None:
    random = np.random.default_rng(2)
    for width in (2, "4 split", 6):
        m = on_card.random_matrix(ops, random, width, 6208, 72)
        x = on_card.random_operand(random, False, rows, 6208)
        (y,) = card.product(ops, GEMV, [m], x, rows)
        on_card.compare(y, m, x, rows)


@pytest.mark.parametrize("half", [False, True], ids=["a8", "f16"])
@pytest.mark.parametrize("in_", [80, 576, 1088, 4096, 6208, 6272, 8192, 14400])
def test_rows_that_blocks_make_an_operand_of(ops: ctypes.CDLL, in_: int, half: bool) -> None:
    """RMSNorm with and without weights and means, and rows as they are; one and two teams, and one of all warps."""
    random = np.random.default_rng(in_)
    out = 72 if in_ > 6000 else 272
    widths = {80: (3, 8), 576: (2, 4, 7), 4096: (2, "4 split"), 6208: (3,), 14400: (2,)}
    widths |= {1088: ("2 mirrored",), 6272: ("2 mirrored",)}  # alone, as only then bits are counted
    matrices = [on_card.random_matrix(ops, random, width, in_, out) for width in widths.get(in_, ("4 split",))]
    for rows in (1, 2):
        x = random.standard_normal((rows, in_)).astype(np.float32) * np.where(np.arange(in_) % 97 == 3, 9, 1)
        x = np.ascontiguousarray(x, np.float32)
        weight, mean = ((1 + random.standard_normal(in_) / 4).astype(np.float16) for _ in range(2))
        kinds: list[dict[str, Any]] = [{}, {"maxima": np.abs(x).max(axis=1, keepdims=True) * np.float32([[0.5, 1, 0]])}]
        kinds += [dict(norm=True, **more) for more in ({}, {"weight": weight}, {"weight": weight, "mean": mean})]
        for kind in kinds:
            if "mean" in kind and half:
                continue
            norm, padded = "norm" in kind, -(-in_ // 1024) * 1024
            teams = -(-padded // (4096 if norm else 8192))
            room = (99 << 10) - 1024 - 5120 * 8 * teams  # beside the warps' rings and sums
            if teams > 2 or rows * padded * (2 if half else 1) > room:
                with pytest.raises(KernelError, match="takes no such rows"):
                    card.product_of_rows(ops, matrices, x, half, **kind)
                continue
            values = x.astype(np.float64)
            if norm:
                values /= np.sqrt(np.mean(values**2, axis=1, keepdims=True) + 1e-5)
                values = values * kind.get("weight", np.float16(1)).astype(np.float64)
                values -= kind.get("mean", np.float16(0)).astype(np.float64)
            if not half:
                scales = np.abs(values).max(axis=1, keepdims=True) / 127
                values = np.rint(values / scales) * scales
            for m, y in zip(matrices, card.product_of_rows(ops, matrices, x, half, **kind)):
                weights = m.levels[m.codes] * m.scales[0, : m.out, None].astype(np.float64)
                want = values @ weights.T + m.bias
                assert np.linalg.norm(y - want) < 1e-3 * np.linalg.norm(want - m.bias), (rows, kind.keys())


@pytest.mark.parametrize("half", [False, True], ids=["a8", "f16"])
def test_values_that_are_not_numbers_reach_the_products(ops: ctypes.CDLL, half: bool) -> None:
    random = np.random.default_rng(5)
    matrix = on_card.random_matrix(ops, random, 4, 576, 80)
    x = random.standard_normal((2, 576)).astype(np.float32)
    weight, mean = ((1 + random.standard_normal(576) / 4).astype(np.float16) for _ in range(2))
    kinds: list[dict[str, Any]] = [{}, dict(norm=True), dict(norm=True, weight=weight)]
    for kind in kinds if half else [*kinds, dict(norm=True, mean=mean)]:
        for bad in (np.nan,) if half else (np.nan, np.inf):  # halves are saturated
            x[0, 7] = bad
            (y,) = card.product_of_rows(ops, [matrix], x, half, **kind)
            assert not np.isfinite(y[0]).any() and np.isfinite(y[1]).all(), (bad, kind.keys())


@pytest.fixture(scope="module", params=[False, True], ids=["at once", "late"])
def attention(request: pytest.FixtureRequest) -> Iterator[ctypes.CDLL]:
    try:
        library = kernels.load("emulated")
    except card.Unavailable as reason:
        pytest.skip(str(reason))
    call(library.emulator_late, int(request.param))
    yield library
    call(library.emulator_late, 0)


@pytest.mark.parametrize(
    ("bits", "shape"),
    [((8, 8), (128, 4, 1)), ((4, 4), (64, 3, 1)), ((16, 16), (96, 2, 2)), ((8, 4), (34, 5, 1)), ((4, 16), (256, 2, 1)),
     ((16, 8), (128, 12, 1))],
)  # fmt: skip
def test_decode(attention: ctypes.CDLL, bits: tuple[int, int], shape: tuple[int, int, int]) -> None:
    on_card_attention.check_decode(attention, bits, shape, 126, (0, 15, 16, 127, 128, 270))


@pytest.mark.parametrize(
    ("bits", "dim", "group"),
    [((8, 8), 128, 4), ((4, 4), 64, 3), ((16, 16), 80, 1), ((8, 4), 34, 12), ((16, 8), 256, 2)],
)
def test_fused_decode(attention: ctypes.CDLL, bits: tuple[int, int], dim: int, group: int) -> None:
    on_card_attention.check_fused_decode(attention, bits, dim, group, np.array([0, 31, 32, 128, 300], np.int32))


@pytest.mark.parametrize(
    ("bits", "shape"), [((8, 8), (64, 3, 1)), ((4, 4), (24, 2, 2)), ((16, 16), (80, 2, 1)), ((8, 4), (256, 1, 1))]
)
def test_prefill(attention: ctypes.CDLL, bits: tuple[int, int], shape: tuple[int, int, int]) -> None:
    on_card_attention.check_prefill(attention, bits, shape, 100, (5, 64))


@pytest.mark.parametrize("bits", on_card_attention.BITS)
def test_what_is_stored(attention: ctypes.CDLL, bits: int) -> None:
    on_card_attention.check_stored(attention, bits, 60, (24, 80, 256))


@pytest.mark.parametrize("half", [True, False], ids=["f16", "a8"])
@pytest.mark.parametrize("size, block", [(24, 8), (100, 4), (1536, 512), (3072, 1024)])
def test_activation(attention: ctypes.CDLL, size: int, block: int, half: bool) -> None:
    on_card_attention.check_activation(attention, size, block, half)


def test_decode_does_not_see_what_another_request_left(attention: ctypes.CDLL) -> None:
    on_card_attention.check_what_another_left(attention)


@pytest.fixture
def sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests of test_sampler_cuda.py use this library."""
    try:
        library = on_card_sampler.load_emulated()
    except card.Unavailable as reason:
        pytest.skip(str(reason))
    monkeypatch.setattr(on_card_sampler, "load", lambda: library)


@pytest.mark.parametrize("shape", on_card_sampler.SHAPES)
def test_same_tokens_as_the_cpu(sampler: None, shape: str) -> None:
    on_card_sampler.test_same_tokens_as_the_cpu(1200, shape)


def test_ties(sampler: None) -> None:
    on_card_sampler.test_greedy_ties_go_to_the_lowest_id()
    on_card_sampler.test_ties_at_the_edge_of_a_filter_go_to_low_ids()


def test_penalties_logprobs_and_faults(sampler: None) -> None:
    on_card_sampler.test_penalties_biases_and_bans(300)
    on_card_sampler.test_logprobs_are_of_the_raw_logits(300)
    on_card_sampler.test_broken_logits_have_the_cpus_sentences(300)
    on_card_sampler.test_impossible_tokens()


def test_rows_of_a_batch(sampler: None) -> None:
    on_card_sampler.test_a_row_is_the_same_alone_and_in_a_batch(5000)
