"""Products on a card against numpy: every width and mode, odd sizes, groups, biases; equal to the bit where due."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

import gemm_cuda as card
from gemm_cuda import GEMM, GEMV, Matrix, Operand, product

# "straight": the integers of 8 bits; "split": levels increase, the lower half at most and the upper half at least zero;
# "mirrored": the last level is the first one's negative, and so on.
WIDTHS = [2, 3, 4, 5, 6, 7, 8, "straight", "2 mirrored", "4 split", "5 split"]
TOGETHER = [[4, 4, 4], [2, "straight", 5], [7, 3], [6, 8, 4]]  # matrices of one product
# With levels as converted.
USUAL = [["4 split", "5 split", 7], [6, "straight", "2 mirrored"], ["4 split"] * 3, ["straight"] * 2]
TILINGS = range(4)
HOPPER_TILINGS = (4, 5)
SHAPES = [  # in, out, groups
    (576, 272, 1),
    (1536, 100, 1),
    (80, 100, 1),
    (48, 272, 1),
    (16, 16, 1),
    (70, 40, 1),  # no multiples of 16
    (576, 272, 2),
    (96, 100, 6),  # groups of 16
    (160, 40, 5),  # of 32
    (192, 272, 3),  # of 64
    (576, 100, 6),  # of 96
    (96, 9000, 6),  # so many outputs that blocks copy the operand of 3 rows and more
]


@pytest.fixture(scope="module")
def ops() -> ctypes.CDLL:
    try:
        return card.load()
    except card.Unavailable as reason:
        pytest.skip(str(reason))


def random_matrix(ops: ctypes.CDLL, random: np.random.Generator, width: int | str, in_: int, out: int,
                  groups: int = 1, bias: bool = True) -> Matrix:  # fmt: skip
    straight, split = width == "straight", str(width).endswith("split")
    bits = 8 if straight else int(str(width)[0])
    codes = random.integers(0, 1 << bits, (out, in_), np.uint8)
    scales = (random.uniform(0.5, 1.5, (groups, -(-out // 16) * 16)) / 1000).astype(np.float16)
    levels = random.integers(-127, 128, 1 << bits).astype(np.int8)
    if split:
        levels = np.sort(np.where(np.arange(1 << bits) < 1 << bits - 1, -1, 1) * np.abs(levels)).astype(np.int8)
    if str(width).endswith("mirrored"):
        levels = np.append(levels[: len(levels) // 2], -levels[: len(levels) // 2][::-1])
    if straight:
        levels = np.append(np.arange(-127, 128), 127).astype(np.int8)
    offsets = random.standard_normal(out).astype(np.float32) if bias else None
    return Matrix(ops, bits, codes, scales, levels, offsets)


def random_operand(random: np.random.Generator, half: bool, rows: int, in_: int) -> Operand:
    if half:
        return Operand(random.standard_normal((rows, in_)).astype(np.float16))
    codes = random.integers(-127, 128, (rows, in_)).astype(np.int8)
    return Operand(codes, (random.uniform(0.5, 1.5, rows) / 100).astype(np.float32))


def expected(m: Matrix, x: Operand, rows: int, before: np.ndarray | None) -> np.ndarray:
    """int8 with one group: exact sums, then the kernel's own float32 operations. Otherwise float64."""
    groups = len(m.scales)
    size = -(-m.in_ // 16) * 16 // groups
    weights = m.levels[m.codes].astype(np.float64)  # float64 sums of these integers are exact
    values = x.x[:rows].astype(np.float64)
    scales = m.scales[:, : m.out]
    if x.scales is not None and groups == 1:
        sums = (values @ weights.T).astype(np.int64).astype(np.float32)
        y = sums * (x.scales[:rows, None] * scales[0].astype(np.float32))
        y = y if m.bias is None else y + m.bias
        return y if before is None else before + y
    parts = [slice(g * size, min((g + 1) * size, m.in_)) for g in range(groups)]
    y = sum((values[:, p] @ weights[:, p].T) * scales[g].astype(np.float64) for g, p in enumerate(parts))
    if x.scales is not None:
        y = y * x.scales[:rows, None].astype(np.float64)
    y = y if m.bias is None else y + m.bias
    return y if before is None else before + y


def compare(y: np.ndarray, m: Matrix, x: Operand, rows: int, before: np.ndarray | None = None) -> None:
    want = expected(m, x, rows, before)
    assert y.shape == want.shape and np.isfinite(y).all()
    if x.scales is not None:
        # Near zero a sum's rounding error is that of its terms.
        tolerance = 1e-6 if len(m.scales) == 1 else 2e-6 * np.sqrt(len(m.scales))
        np.testing.assert_allclose(y, want, rtol=tolerance, atol=tolerance * float(np.sqrt(np.mean(want**2))))
    else:
        errors = np.linalg.norm(y - want, axis=1) / np.linalg.norm(want, axis=1)
        assert errors.max() < 2e-3


@pytest.mark.parametrize("half", [False, True], ids=["a8", "f16"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", [GEMV, GEMM], ids=["gemv", "gemm"])
def test_products(ops: ctypes.CDLL, kind: int, width: int | str, half: bool) -> None:
    random = np.random.default_rng(1)
    row_counts = [1, 2, 7, 8, 9, 16, 17, 32] if kind == GEMV else [33, 64, 65, 128, 200]
    for i, (in_, out, groups) in enumerate(SHAPES):
        m = random_matrix(ops, random, width, in_, out, groups, bias=i % 3 != 2)
        x = random_operand(random, half, max(row_counts), in_)
        # Every count with the first shape, of the others two each.
        for rows in row_counts if i == 0 else [row_counts[i % len(row_counts)], row_counts[(i + 3) % len(row_counts)]]:
            before = random.standard_normal((rows, out)).astype(np.float32) if (i + rows) % 2 else None
            (y,) = product(ops, kind, [m], x, rows, None if before is None else [before])
            compare(y, m, x, rows, before)


@pytest.mark.parametrize("half", [False, True], ids=["a8", "f16"])
@pytest.mark.parametrize("width", WIDTHS)
def test_tilings_and_other_rows_change_nothing(ops: ctypes.CDLL, width: int | str, half: bool) -> None:
    random = np.random.default_rng(2)
    for in_, out, groups in [(576, 272, 1), (1104, 528, 1), (80, 100, 1), (192, 100, 3)]:
        m = random_matrix(ops, random, width, in_, out, groups)
        x = random_operand(random, half, 200, in_)
        (y,) = product(ops, GEMM, [m], x, 200, extra=64)
        compare(y, m, x, 200)
        for rows in (1, 33, 65, 200):
            for tiling in TILINGS:
                (other,) = product(ops, GEMM, [m], x, rows, tiling=tiling)
                assert np.array_equal(other, y[:rows]), (in_, out, groups, rows, tiling)


@pytest.mark.parametrize("half", [False, True], ids=["a8", "f16"])
@pytest.mark.parametrize("width", [3, 4, "straight"])
def test_large(ops: ctypes.CDLL, width: int | str, half: bool) -> None:
    random = np.random.default_rng(3)
    m = random_matrix(ops, random, width, 1536, 4096)
    x = random_operand(random, half, 2200, 1536)  # more than 16 blocks of 128 rows
    for rows in (513, 2200):
        (y,) = product(ops, GEMM, [m], x, rows)
        compare(y, m, x, rows)
    (first,) = product(ops, GEMM, [m], x, 2200, tiling=0)
    compare(first, m, x, 2200)
    for tiling in TILINGS[1:]:
        assert np.array_equal(product(ops, GEMM, [m], x, 2200, tiling=tiling)[0], first)


@pytest.mark.parametrize("half", [False, True], ids=["a8", "f16"])
@pytest.mark.parametrize("width", [*range(2, 8), "straight"])
def test_hopper(ops: ctypes.CDLL, width: int | str, half: bool) -> None:
    """The kernels of compute capability 9.0, int8 also against the others: equal to the bit."""
    if card.hopper_tiling(ops, False, 4, [4096], 1024) is None:
        pytest.skip("this card is not of compute capability 9.0")
    random = np.random.default_rng(7)
    for i, (in_, out) in enumerate([(576, 272), (1536, 100), (70, 40), (16, 16), (128, 1040), (4096, 384)]):
        m = random_matrix(ops, random, width, in_, out, bias=i % 3 != 1)
        x = random_operand(random, half, 1024, in_)
        for rows in (256, 300, 513, 1024) if i == 0 else ((300, 1024), (513, 256))[i % 2]:
            before = [random.standard_normal((rows, out)).astype(np.float32)] if (i + rows) % 2 else None
            (old,) = product(ops, GEMM, [m], x, rows, before, tiling=0)
            results = [
                product(ops, GEMM, [m], x, rows, before, tiling, extra)[0]
                for tiling in HOPPER_TILINGS
                for extra in (0, 64)
            ]
            compare(results[0], m, x, rows, before[0] if before else None)
            for other in results[1:] if half else [*results, old]:
                assert np.array_equal(other, results[0]), (in_, out, rows)
        # A row's results depend on nothing but the row.
        (few,) = product(ops, GEMM, [m], x, 40, tiling=HOPPER_TILINGS[0])
        (many,) = product(ops, GEMM, [m], x, 300, tiling=HOPPER_TILINGS[1])
        assert np.array_equal(few, many[:40]), (in_, out)


def test_hopper_is_picked(ops: ctypes.CDLL) -> None:
    if card.hopper_tiling(ops, False, 4, [4096], 1024) is None:
        pytest.skip("this card is not of compute capability 9.0")
    assert card.hopper_tiling(ops, False, 4, [4096], 255) == card.hopper_tiling(ops, True, 4, [32768], 255) == -1
    random = np.random.default_rng(8)
    m = random_matrix(ops, random, 4, 192, 32768)
    x = random_operand(random, False, 512, 192)
    for rows in (40, 256, 512):
        picked = card.hopper_tiling(ops, False, 4, [32768], rows)
        assert picked in HOPPER_TILINGS
        (y,) = product(ops, GEMM, [m], x, rows)
        assert np.array_equal(product(ops, GEMM, [m], x, rows, tiling=picked)[0], y)
        compare(y, m, x, rows)


@pytest.mark.parametrize("half", [False, True], ids=["a8", "f16"])
def test_gemv_rows_do_not_depend_on_others(ops: ctypes.CDLL, half: bool) -> None:
    random = np.random.default_rng(4)
    shapes = [(2, 576, 272, 1), (4, 1536, 100, 1), (5, 80, 48, 1), (8, 192, 272, 3)]
    split = [("4 split", 1536, 100, 1), ("5 split", 576, 48, 1)]
    for width, in_, out, groups in [*shapes, *split]:
        m = random_matrix(ops, random, width, in_, out, groups)
        x = random_operand(random, half, 64, in_)
        (y,) = product(ops, GEMV, [m], x, 64)
        for rows in (1, 2, 7, 8, 9, 16, 17, 32, 33, 50):
            assert np.array_equal(product(ops, GEMV, [m], x, rows, extra=8)[0], y[:rows]), (width, rows)


@pytest.mark.parametrize("width", [2, "2 mirrored", 3, "4 split", 5, "straight"])
def test_rows_that_blocks_make_an_operand_of(ops: ctypes.CDLL, width: int | str) -> None:
    """Exact sums of the same codes: the rows and their maxima are such that codes and scales are known."""
    random = np.random.default_rng(11)
    for in_, out in [(576, 272), (4096, 9000), (4096, 528), (14336, 528), (80, 40)]:
        m = random_matrix(ops, random, width, in_, out)
        codes = random.integers(-127, 128, (2, in_)).astype(np.int8)
        codes[:, 5] = 127
        for rows in (1, 2):
            x = codes[:rows].astype(np.float32)
            (y,) = card.product_of_rows(ops, [m], x, False)
            compare(y, m, Operand(codes, np.ones(2, np.float32)), rows)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_gemv_equals_gemm(ops: ctypes.CDLL, width: int | str, add: bool) -> None:
    """int8: exact sums and the same operations on them."""
    random = np.random.default_rng(5)
    for i, (in_, out) in enumerate([(576, 272), (1536, 100), (80, 100), (6208, 64), (592, 9000)]):
        m = random_matrix(ops, random, width, in_, out, bias=i % 2 == 0)
        x = random_operand(random, False, 64, in_)
        before = [random.standard_normal((64, out)).astype(np.float32)] if add else None
        (y,) = product(ops, GEMM, [m], x, 64, before)
        for rows in (1, 3, 9, 32, 33, 64):
            (vector,) = product(ops, GEMV, [m], x, rows, [before[0][:rows]] if before else None)
            assert np.array_equal(vector, y[:rows]), (in_, out, rows)


@pytest.mark.parametrize("half", [False, True], ids=["a8", "f16"])
@pytest.mark.parametrize("rows", [1, 9, 32])
def test_gemv_of_several_matrices(ops: ctypes.CDLL, rows: int, half: bool) -> None:
    random = np.random.default_rng(6)
    x = random_operand(random, half, rows, 576)
    for widths in TOGETHER + USUAL:
        matrices = [
            random_matrix(ops, random, width, 576, out, 2 if width == 3 else 1, bias=out != 48)
            for width, out in zip(widths, (272, 48, 100))
        ]
        together = product(ops, GEMV, matrices, x, rows)
        for m, y in zip(matrices, together):
            compare(y, m, x, rows)
            assert np.array_equal(product(ops, GEMV, [m], x, rows)[0], y)


@pytest.mark.parametrize("half", [False, True], ids=["a8", "f16"])
@pytest.mark.parametrize("tiling", [-1, *TILINGS, *HOPPER_TILINGS])
def test_gemm_of_several_matrices(ops: ctypes.CDLL, tiling: int, half: bool) -> None:
    """Neighbours of one width share a launch: what they give alone, to the bit. In half the kernels of 9.0 add up in
    another order than the others, so that there only a given tiling says what a single launch gives."""
    if tiling in HOPPER_TILINGS and card.hopper_tiling(ops, False, 4, [4096], 1024) is None:
        pytest.skip("this card is not of compute capability 9.0")
    random = np.random.default_rng(9)
    x = random_operand(random, half, 300, 576)
    more = [[width] * 3 for width in WIDTHS] + [[5, 5, 6], [3, 7, 7], [8, "straight", "straight"], [4, 4, 4, 4]]
    for i, widths in enumerate(TOGETHER + more):
        # The first of three in groups shares no launch with the others, and two with other groups do.
        groups = [(1, 1, 1), (2, 1, 1), (1, 2, 3)][i % 3]
        if tiling in HOPPER_TILINGS:
            if 8 in widths:
                continue
            groups = (1, 1, 1)
        matrices = [
            random_matrix(ops, random, width, 576, out, group, bias=out != 48)
            for width, out, group in zip(widths, (272, 48, 100, 16), (*groups, 1))
        ]
        rows = (300, 65, 256, 33)[i % 4]
        before = [random.standard_normal((rows, m.out)).astype(np.float32) for m in matrices] if i % 2 else None
        together = product(ops, GEMM, matrices, x, rows, before, tiling)
        for j, (m, y) in enumerate(zip(matrices, together)):
            old = before[j] if before else None
            compare(y, m, x, rows, old)
            if not half or tiling >= 0:
                (alone,) = product(ops, GEMM, [m], x, rows, None if old is None else [old], tiling)
                assert np.array_equal(alone, y), (widths, groups, rows, j)


@pytest.mark.parametrize("half", [False, True], ids=["a8", "f16"])
def test_gemm_of_several_large_matrices(ops: ctypes.CDLL, half: bool) -> None:
    """More rows than one slab of 16 row blocks has, and more blocks than fit the card at once."""
    random = np.random.default_rng(10)
    x = random_operand(random, half, 2200, 192)
    matrices = [random_matrix(ops, random, 4, 192, out) for out in (4096, 1040, 1024)]
    for tiling in (-1, 0, 2):
        together = product(ops, GEMM, matrices, x, 2200, tiling=tiling)
        for m, y in zip(matrices, together):
            compare(y, m, x, 2200)
            if not half or tiling >= 0:
                assert np.array_equal(product(ops, GEMM, [m], x, 2200, tiling=tiling)[0], y), (m.out, tiling)
