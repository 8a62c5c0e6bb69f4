"""RoPE, the KV cache and attention against float64 in numpy, for each instruction set of this machine and its card.

What is called check_...() runs in test_cuda_emulated.py too.
"""

from __future__ import annotations

import ctypes
import math

import numpy as np
import pytest

import kernels
from compiled import Unavailable
from halfturn import _C
from kernels import KernelError, Pool

BITS = (16, 8, 4)
CPUS = _C.cpu_features()["available"]


@pytest.fixture(scope="module", params=[*CPUS, "cuda"])
def ops(request: pytest.FixtureRequest) -> ctypes.CDLL:
    return opened(request.param)


@pytest.fixture(scope="module", params=CPUS)
def cpu(request: pytest.FixtureRequest) -> ctypes.CDLL:
    return opened(request.param)


@pytest.fixture(scope="module")
def card() -> ctypes.CDLL:
    return opened("cuda")


def opened(name: str) -> ctypes.CDLL:
    try:
        return kernels.load(name)
    except Unavailable as reason:
        pytest.skip(str(reason))


def hadamard_matrix(size: int) -> np.ndarray:
    """Sylvester's, orthonormal: sign of entry (i, j) is the parity of the bits that i and j share."""
    i = np.arange(size)
    parity = np.array([[bin(a & b).count("1") & 1 for b in i] for a in i])
    return (1 - 2 * parity) / math.sqrt(size)


def rope(x: np.ndarray, rotary: np.ndarray) -> np.ndarray:
    """x [tokens, heads, dim] turned as transformers does it: pairs (i, i + dim/2)."""
    half = x.shape[-1] // 2
    cos, sin = rotary[:, None, 0].astype(np.float64), rotary[:, None, 1].astype(np.float64)
    a, b = x[..., :half].astype(np.float64), x[..., half:].astype(np.float64)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def reference(q: np.ndarray, k: np.ndarray, v: np.ndarray, position: int) -> np.ndarray:
    """Causal attention in float64. q [tokens, heads, dim] from `position` on, k and v [positions, kv_heads, dim]."""
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    scores = np.einsum("qhd,khd->hqk", q.astype(np.float64), k) / math.sqrt(q.shape[-1])
    visible = np.arange(len(k))[None, :] <= position + np.arange(len(q))[:, None]
    scores = np.where(visible, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), v)


class Sequence:
    """Random queries, keys and values of a sequence, stored in scattered pages of a pool."""

    def __init__(self, ops: ctypes.CDLL, tokens: int, heads: int, kv_heads: int, dim: int, k_bits: int, v_bits: int,
                 rotate: bool = False, seed: int = 0) -> None:  # fmt: skip
        rng = np.random.default_rng(seed)
        count = -(-tokens // 32)
        self.pool = Pool(ops, 2, kv_heads, dim, k_bits, v_bits, count + 3, rotate)
        self.pages = rng.permutation(count + 3)[:count].astype(np.int32)
        self.q = (2 * rng.standard_normal((tokens, heads, dim))).astype(np.float32)
        self.k = rng.standard_normal((tokens, kv_heads, dim)).astype(np.float32)
        self.v = rng.standard_normal((tokens, kv_heads, dim)).astype(np.float32)
        self.rotary = kernels.rope_table(ops, dim, tokens, range(tokens))
        self.layer = 1
        self.q_turned, self.k_turned = self.pool.store(self.layer, self.pages, 0, self.rotary, self.q, self.k, self.v)

    def attend(self, begin: int, end: int, chunk: int = 1 << 30) -> np.ndarray:
        return self.pool.attend(self.layer, self.pages, begin, self.q_turned[begin:end].copy(), chunk)

    def decode(self, begin: int, end: int) -> np.ndarray:
        return self.pool.decode(self.layer, self.pages, begin, self.q_turned[begin:end].copy())

    def stored(self) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values as the cache's codes say: float64 [tokens, kv_heads, dim]."""
        tokens, heads = self.k.shape[:2]
        pages = [[self.pool.read(self.layer, int(p), h) for h in range(heads)] for p in self.pages]
        k = np.concatenate([np.stack([head[0] for head in page], 1) for page in pages])[:tokens]
        v = np.concatenate([np.stack([head[1] for head in page], 1) for page in pages])[:tokens]
        return k, v


@pytest.mark.parametrize("block", [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024])
def test_hadamard_of_unit_vectors_is_sylvesters_matrix(cpu: ctypes.CDLL, block: int) -> None:
    matrix = hadamard_matrix(block)
    for blocks in (1, 3):
        for unit in {0, 1, block // 3, block - 1} & set(range(block)):
            x = np.zeros(blocks * block, np.float32)
            x[(blocks - 1) * block + unit] = 1
            expected = np.zeros_like(x)
            expected[(blocks - 1) * block :] = matrix[unit]
            np.testing.assert_allclose(kernels.hadamard(cpu, x, block), expected, rtol=1e-6)


def test_hadamard_twice_is_the_identity(cpu: ctypes.CDLL) -> None:
    x = np.random.default_rng(1).standard_normal(3072).astype(np.float32)
    for block in (2, 8, 64, 256, 1024):
        np.testing.assert_allclose(kernels.hadamard(cpu, kernels.hadamard(cpu, x, block), block), x, atol=2e-6)


@pytest.mark.parametrize("size", [1, 3, 16, 100, 576, 1537])
def test_row_operations(cpu: ctypes.CDLL, size: int) -> None:
    rng = np.random.default_rng(size)
    x, y = (5 * rng.standard_normal((2, size))).astype(np.float32)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt(np.mean(wide**2) + 1e-5) * y
    np.testing.assert_allclose(kernels.rms_norm(cpu, x, y, 1e-5), expected, rtol=2e-6)
    mean = rng.standard_normal(size).astype(np.float32)
    np.testing.assert_allclose(kernels.rms_norm(cpu, x, y, 1e-5, mean), expected - mean, rtol=2e-6, atol=2e-5)
    np.testing.assert_allclose(kernels.swiglu(cpu, x, y), wide / (1 + np.exp(-wide)) * y, rtol=2e-6)
    big = np.concatenate([x, np.array([1e6, -1e6, 65519.9, 1e-8, 6e-8], np.float32)])
    halves = kernels.round_to_half(cpu, big, big.size + 7)
    np.testing.assert_array_equal(halves[: big.size], np.clip(big, -65504, 65504).astype(np.float16).astype(np.float32))
    assert not halves[big.size :].any()


def test_row_operations_at_the_edges(cpu: ctypes.CDLL) -> None:
    zeros, ones = np.zeros(40, np.float32), np.ones(40, np.float32)
    assert not kernels.rms_norm(cpu, zeros, ones, 1e-5).any()
    gate = np.array([0, 200, -200, 1e4, -1e4] * 8, np.float32)
    np.testing.assert_allclose(kernels.swiglu(cpu, gate, ones), np.maximum(gate, 0), atol=1e-30)


SCALINGS = {
    "none": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0, "max_positions": 4096},
    "llama3": {"factor": 8.0, "low": 1.0, "high": 4.0, "original": 8192.0},
}


@pytest.mark.parametrize("kind", list(SCALINGS))
def test_rope_table(cpu: ctypes.CDLL, kind: str) -> None:
    """The formulas of transformers' modeling_rope_utils.py, written down again in float64."""
    dim, theta, context = 64, 500000.0, 16384
    options = SCALINGS[kind]
    base = theta
    if kind == "dynamic":
        base *= (2.0 * context / 4096.0 - 1.0) ** (dim / (dim - 2))
    inverse = base ** -(np.arange(0, dim, 2) / dim)
    if kind == "linear":
        inverse /= 4.0
    if kind == "llama3":
        wavelength = 2 * math.pi / inverse
        smooth = (8192.0 / wavelength - 1.0) / 3.0
        inverse = np.where(
            wavelength < 8192.0 / 4.0,
            inverse,
            np.where(wavelength > 8192.0, inverse / 8, (1 - smooth) * inverse / 8 + smooth * inverse),
        )
    positions = [0, 1, 2, 127, 128, 5000, 16383]
    table = kernels.rope_table(cpu, dim, context, positions, theta=theta, kind=kind, **options)
    angles = np.array(positions)[:, None] * inverse
    np.testing.assert_allclose(table, np.stack([np.cos(angles), np.sin(angles)], 1), atol=1e-7)


def test_dynamic_rope_is_plain_within_the_trained_context(cpu: ctypes.CDLL) -> None:
    dynamic = kernels.rope_table(cpu, 16, 2048, [7, 2047], kind="dynamic", factor=4.0, max_positions=2048)
    np.testing.assert_array_equal(dynamic, kernels.rope_table(cpu, 16, 2048, [7, 2047]))


def test_rope_refuses_positions_outside_the_context(cpu: ctypes.CDLL) -> None:
    with pytest.raises(KernelError, match="position 300 is outside the context of 200"):
        kernels.rope_table(cpu, 16, 200, [300])


@pytest.mark.parametrize("dim", [8, 64, 80, 96, 128])
@pytest.mark.parametrize("rotate", [False, True])
def test_queries_and_keys_are_turned(ops: ctypes.CDLL, dim: int, rotate: bool) -> None:
    for k_bits in BITS:
        s = Sequence(ops, 5, 6, 2, dim, k_bits, 16, rotate)
        turned_q, turned_k = rope(s.q, s.rotary), rope(s.k, s.rotary)
        if rotate and k_bits < 16:
            block = dim & -dim
            r3 = np.kron(np.eye(dim // block), hadamard_matrix(block))
            turned_q, turned_k = turned_q @ r3, turned_k @ r3
        np.testing.assert_allclose(s.q_turned, turned_q, atol=3e-6)
        np.testing.assert_allclose(s.k_turned, turned_k, atol=3e-6)


@pytest.mark.parametrize("dim", [8, 64, 80, 100])
def test_what_the_cache_stores(ops: ctypes.CDLL, dim: int) -> None:
    """16 bits: the nearest halves. 8: half a step of largest/127 away. 4: at most half a step of largest/7."""
    for bits, step in ((16, None), (8, 1 / 127), (4, 1 / 7)):
        s = Sequence(ops, 70, 2, 2, dim, bits, bits)
        for stored, exact in zip(s.stored(), (s.k_turned, s.v)):
            if step is None:
                np.testing.assert_array_equal(stored, exact.astype(np.float16).astype(np.float64))
                continue
            padded = np.zeros((*exact.shape[:2], -(-dim // 32) * 32))
            padded[..., :dim] = exact
            largest = np.repeat(np.abs(padded).reshape(*exact.shape[:2], -1, 32).max(-1), 32, -1)[..., :dim]
            error = np.abs(stored - exact)
            # a scale is rounded to half precision; the extreme of 4 bits may be clipped by one step at -9
            limit = {8: 0.5 * step * 1.02, 4: 1.02 * step}[bits] * largest
            assert (error <= limit + 1e-6).all()


def test_four_bits_on_a_gaussian(ops: ctypes.CDLL) -> None:
    """Known: on N(0, 1) largest/7 as the scale of 32 values has a mean squared error of .0094, the extreme at -8 .0074,
    the best of 80 scales .0066."""
    s = Sequence(ops, 2048, 1, 1, 64, 4, 4, seed=3)
    for stored, exact in zip(s.stored(), (s.k_turned, s.v)):
        assert 0.0064 < np.mean((stored - exact) ** 2) < 0.0070


def test_codes_that_need_every_level(ops: ctypes.CDLL) -> None:
    """Plateaus: 16 levels in, the same 16 levels out, and the zero of an all-zero group."""
    pool = Pool(ops, 1, 1, 64, 4, 4, 1)
    v = np.concatenate([np.arange(-8, 8), np.arange(-8, 8), np.zeros(32)]).astype(np.float32).reshape(1, 1, 64) / 4
    rotary = np.stack([np.ones(32), np.zeros(32)]).astype(np.float32)[None]
    pool.store(0, np.zeros(1, np.int32), 0, rotary, v, v, v)
    for stored in pool.read(0, 0, 0):
        np.testing.assert_array_equal(stored[0], v[0, 0])


@pytest.mark.parametrize("bits", [(k, v) for k in BITS for v in BITS])
@pytest.mark.parametrize("shape", [(64, 9, 3), (8, 8, 4), (80, 4, 4), (96, 8, 1), (128, 6, 3), (34, 5, 1)])
def test_attention(ops: ctypes.CDLL, bits: tuple[int, int], shape: tuple[int, int, int]) -> None:
    """Equal to attention in float64 on the values that the cache stores, from every kind of position."""
    dim, heads, kv_heads = shape
    s = Sequence(ops, 300, heads, kv_heads, dim, *bits, rotate=True)
    k, v = s.stored()
    for begin, end in ((0, 1), (0, 300), (31, 33), (128, 129), (255, 257), (299, 300), (100, 240)):
        expected = reference(s.q_turned[begin:end], k[:end], v[:end], begin)
        # tensor cores take queries, keys, weights and values in half precision
        rtol, atol = (2e-3, 2e-3) if kernels.on_card(ops) else (1e-7, 4e-6)
        np.testing.assert_allclose(s.attend(begin, end), expected, rtol, atol, err_msg=f"{begin}..{end}")


@pytest.mark.parametrize("bits", [(16, 16), (8, 8), (4, 4), (8, 4)])
def test_attention_is_the_same_to_the_bit_in_any_chunks(cpu: ctypes.CDLL, bits: tuple[int, int]) -> None:
    for dim, heads, kv_heads in ((64, 9, 3), (80, 8, 1), (24, 2, 2)):
        s = Sequence(cpu, 530, heads, kv_heads, dim, *bits)
        whole = s.attend(0, 530)
        for chunk in (1, 2, 5, 7, 32, 100):
            np.testing.assert_array_equal(s.attend(0, 530, chunk), whole, err_msg=f"chunks of {chunk}")
        in_chunks = s.pool.attend_in_chunks(s.layer, s.pages, 0, s.q_turned)
        np.testing.assert_array_equal(in_chunks, whole, err_msg="chunks of keys")


def test_rotation_leaves_scores_alone(ops: ctypes.CDLL) -> None:
    """R3 turns queries and keys alike: with 8 bits the result stays near that of exact keys."""
    s = Sequence(ops, 100, 4, 2, 64, 8, 16, rotate=True)
    expected = reference(rope(s.q, s.rotary), rope(s.k, s.rotary), s.v.astype(np.float64), 0)
    assert np.abs(s.attend(0, 100) - expected).max() < 0.05


def test_attention_does_not_see_what_another_request_left(ops: ctypes.CDLL) -> None:
    """Positions behind the last one may hold anything, here infinities and NaN in half precision."""
    s = Sequence(ops, 40, 2, 1, 32, 16, 16)
    expected = s.attend(0, 20)
    bad = np.full((20, 1, 32), np.nan, np.float32)
    s.pool.store(s.layer, s.pages, 20, s.rotary[20:], s.q[20:], bad, bad)
    np.testing.assert_array_equal(s.attend(0, 20), expected)
    np.testing.assert_array_equal(s.attend(19, 20), expected[19:])


def test_attention_with_large_scores(ops: ctypes.CDLL) -> None:
    """Scores in the thousands, growing and falling along the keys: the online softmax neither overflows nor loses."""
    s = Sequence(ops, 260, 2, 1, 64, 16, 16)
    for sign in (1, -1):
        k = s.k * (sign * np.linspace(1, 200, 260, dtype=np.float32))[:, None, None]
        q, _ = s.pool.store(s.layer, s.pages, 0, s.rotary, 20 * s.q, k, s.v)
        stored_k, stored_v = s.stored()
        atol = 2e-3
        if kernels.on_card(ops):
            scale = np.float32(math.log2(math.e) / 8)  # tensor cores take scaled queries in half precision,
            q = ((q * scale).astype(np.float16).astype(np.float64) / float(scale)).astype(np.float32)
            atol = 5e-2  # and cut off what they add
            decoded = s.pool.decode(s.layer, s.pages, 0, q)
            np.testing.assert_allclose(decoded, reference(q, stored_k, stored_v, 0), atol=atol)
        out = s.pool.attend(s.layer, s.pages, 0, q)
        np.testing.assert_allclose(out, reference(q, stored_k, stored_v, 0), atol=atol)


def test_one_hot_attention(ops: ctypes.CDLL) -> None:
    """Known answer: a query that matches one key by far returns that key's value."""
    pool = Pool(ops, 1, 1, 64, 16, 16, 3)
    pages = np.array([2, 0, 1], np.int32)
    still = np.tile(np.stack([np.ones(32), np.zeros(32)]).astype(np.float32), (64, 1, 1))
    k = (np.eye(64, dtype=np.float32) * 1000)[:, None]
    v = np.random.default_rng(0).standard_normal((64, 1, 64)).astype(np.float32)
    q, _ = pool.store(0, pages, 0, still, k.copy(), k, v)
    np.testing.assert_array_equal(pool.attend(0, pages, 0, q), v.astype(np.float16).astype(np.float32))


def test_pool_sizes_and_refusals(cpu: ctypes.CDLL) -> None:
    halves, bytes_, nibbles = (Pool(cpu, 2, 3, 64, bits, bits, 4).page_bytes for bits in BITS)
    assert halves == 2 * 3 * 32 * 64 * 2 * 2
    assert bytes_ == 2 * 3 * 32 * (64 + 4) * 2
    assert nibbles == 2 * 3 * 32 * (32 + 4) * 2
    with pytest.raises(KernelError, match="cannot store 5 bits a value: choose 16, 8 or 4"):
        Pool(cpu, 1, 1, 64, 5, 8, 1)
    with pytest.raises(KernelError, match="even head_dim"):
        Pool(cpu, 1, 1, 63, 8, 8, 1)
    with pytest.raises(KernelError, match="does not fit any memory"):
        Pool(cpu, 64, 64, 64, 8, 8, 1 << 60)
    with pytest.raises(KernelError, match=r"positions needs .* bytes, which this machine"):
        Pool(cpu, 64, 64, 64, 8, 8, 1 << 34)


SHAPES_ON_CARD = [(8, 8, 4), (34, 5, 1), (64, 9, 3), (96, 4, 4), (128, 8, 2), (128, 7, 1), (256, 4, 4), (256, 8, 1)]


@pytest.mark.parametrize("bits", [(k, v) for k in BITS for v in BITS])
@pytest.mark.parametrize("shape", SHAPES_ON_CARD)
def test_decode_on_a_card(card: ctypes.CDLL, bits: tuple[int, int], shape: tuple[int, int, int]) -> None:
    check_decode(card, bits, shape, 0, (0, 1, 15, 16, 31, 127, 128, 255, 256, 299))


def check_decode(card: ctypes.CDLL, bits: tuple[int, int], shape: tuple[int, int, int], begin: int,
                 positions: tuple[int, ...]) -> None:  # fmt: skip
    """A row is the same to the bit alone and among all from `begin` to the last position."""
    dim, heads, kv_heads = shape
    tokens = positions[-1] + 1
    s = Sequence(card, tokens, heads, kv_heads, dim, *bits, rotate=True)
    k, v = s.stored()
    together = s.decode(begin, tokens)
    for position in positions:
        alone = s.decode(position, position + 1)
        expected = reference(s.q_turned[position : position + 1], k[: position + 1], v[: position + 1], position)
        np.testing.assert_allclose(alone, expected, rtol=2e-3, atol=2e-3, err_msg=f"position {position}")
        if position >= begin:
            np.testing.assert_array_equal(alone[0], together[position - begin], err_msg=f"position {position}")


@pytest.mark.parametrize("count", [3000, 9000])  # chunks of one length, and longer ones
@pytest.mark.parametrize("bits", [(16, 16), (8, 8), (4, 4)])
def test_long_decode_on_a_card(card: ctypes.CDLL, bits: tuple[int, int], count: int) -> None:
    s = Sequence(card, count, 8, 2, 128, *bits)
    expected = reference(s.q_turned[count - 10 :], *s.stored(), count - 10)
    out = s.decode(count - 10, count)
    np.testing.assert_allclose(out, expected, rtol=2e-3, atol=5e-4)
    np.testing.assert_array_equal(s.decode(count - 1, count), out[9:])
    np.testing.assert_allclose(s.attend(count - 10, count), expected, rtol=2e-3, atol=5e-4)


@pytest.mark.parametrize("bits", [(16, 16), (8, 8), (4, 4), (8, 4), (16, 8)])
@pytest.mark.parametrize("dim", [34, 64, 80, 128, 256])
@pytest.mark.parametrize("group", [1, 3, 4, 8, 12])  # 8 heads at a time
def test_fused_decode_on_a_card(card: ctypes.CDLL, bits: tuple[int, int], dim: int, group: int) -> None:
    check_fused_decode(card, bits, dim, group, np.array([0, 31, 32, 127, 128, 300, 2300], np.int32))


def check_fused_decode(card: ctypes.CDLL, bits: tuple[int, int], dim: int, group: int, positions: np.ndarray) -> None:
    """RoPE, the cache's writes and attention in one launch: the same bits as in two, in the cache too."""
    rng = np.random.default_rng(dim + group)
    rows, kv_heads, layer, context = len(positions), 2, 1, int(positions.max()) + 1
    stride = -(-context // 32)
    counts = [p // 32 + 1 for p in positions]
    free = rng.permutation(sum(counts)).astype(np.int32)
    pages = np.zeros((rows, stride), np.int32)
    for row, count in enumerate(counts):
        pages[row, :count], free = free[:count], free[count:]
    angles = np.arange(context)[:, None] * 10000.0 ** -(np.arange(0, dim, 2) / dim)
    rotary = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)

    pool = Pool(card, 2, kv_heads, dim, *bits, sum(counts), True)
    for row, position in enumerate(positions):
        if position:
            q, k, v = rng.standard_normal((3, position, kv_heads, dim)).astype(np.float32)
            pool.store(layer, pages[row], 0, rotary[:position], q, k, v)
    q = rng.standard_normal((rows, group * kv_heads, dim)).astype(np.float32)
    k, v = rng.standard_normal((2, rows, kv_heads, dim)).astype(np.float32)
    before = pool.bytes()
    fused = pool.step(layer, pages, positions, rotary, q, k, v, fused=True)
    stored = pool.bytes()
    apart = pool.step(layer, pages, positions, rotary, q, k, v, fused=False)
    assert (before != stored).any()
    np.testing.assert_array_equal(stored, pool.bytes())
    np.testing.assert_array_equal(fused, apart)
    assert np.isfinite(fused).all()
    for row in range(rows):
        one = slice(row, row + 1)
        alone = pool.step(layer, pages[one], positions[one], rotary, q[one], k[one], v[one], fused=True)
        np.testing.assert_array_equal(alone, fused[one], err_msg=f"position {positions[row]}")
    np.testing.assert_array_equal(stored, pool.bytes())


ACTIVATIONS = [(24, 8), (100, 4), (1536, 512), (3072, 1024), (8192, 256), (8192, 1), (8960, 256), (11008, 256),
               (14336, 1024), (16384, 1024), (16400, 16), (28672, 1024), (32768, 512), (32768, 1024)]  # fmt: skip


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("size, block", ACTIVATIONS)
def test_activation_on_a_card(card: ctypes.CDLL, size: int, block: int, half: bool) -> None:
    check_activation(card, size, block, half)


def check_activation(card: ctypes.CDLL, size: int, block: int, half: bool) -> None:
    rng = np.random.default_rng(size + block)
    gate, up = np.zeros((2, 3, -(-size // 16) * 16), np.float32)
    gate[:, :size], up[:, :size] = 3 * rng.standard_normal((2, 3, size))
    gate[2], up[2, 0] = -200, 0
    out = kernels.activate(card, gate, up, size, block, half)
    wide = gate[:, :size].astype(np.float64)
    expected = (wide / (1 + np.exp(-wide)) * up[:, :size]).reshape(3, -1, block) @ hadamard_matrix(block)
    expected = expected.reshape(3, size)
    largest = np.abs(expected).max(-1, keepdims=True)
    error = np.abs(out[:, :size] - expected)
    assert (error <= np.abs(expected) * 2**-10 + largest * (2e-6 if half else 0.51 / 127) + 1e-6).all()
    assert not out[:, size:].any()
    np.testing.assert_array_equal(kernels.activate(card, gate[1:2], up[1:2], size, block, half), out[1:2])
    few, maxima = kernels.activate_in_place(card, gate[:2], up[:2], size, block)
    np.testing.assert_array_equal(maxima, np.abs(few).max(-1))
    if half:
        np.testing.assert_array_equal(few[:, :size].astype(np.float16), out[:2, :size].astype(np.float16))
    else:  # the scale of a row's codes
        assert (np.abs(few[:, :size] - out[:2, :size]) <= 0.502 * maxima[:, None] / 127).all()
    up[1, 0] = np.nan
    out = kernels.activate(card, gate, up, size, block, half)
    assert not np.isfinite(out[1, :block] if half else out[1]).any() and np.isfinite(out[[0, 2]]).all()
    assert np.isposinf(kernels.activate_in_place(card, gate[:2], up[:2], size, block)[1][1]).any()


@pytest.mark.parametrize("bits", [(16, 16), (8, 8), (4, 4), (8, 4)])
def test_prefill_on_a_card_is_the_same_to_the_bit_in_any_tiles(card: ctypes.CDLL, bits: tuple[int, int]) -> None:
    for shape in ((64, 9, 3), (80, 8, 1), (24, 2, 2), (128, 4, 2), (256, 4, 2)):
        check_prefill(card, bits, shape, 330, (1, 5, 64, 100))


def check_prefill(card: ctypes.CDLL, bits: tuple[int, int], shape: tuple[int, int, int], tokens: int,
                  chunks: tuple[int, ...]) -> None:  # fmt: skip
    dim, heads, kv_heads = shape
    s = Sequence(card, tokens, heads, kv_heads, dim, *bits)
    k, v = s.stored()
    whole = s.attend(0, tokens)
    np.testing.assert_allclose(whole, reference(s.q_turned, k, v, 0), rtol=2e-3, atol=2e-3)
    for chunk in chunks:
        np.testing.assert_array_equal(s.attend(0, tokens, chunk), whole, err_msg=f"chunks of {chunk}")


@pytest.mark.parametrize("bits", BITS)
def test_a_card_stores_what_the_cpu_stores(card: ctypes.CDLL, bits: int) -> None:
    check_stored(card, bits, 200, (24, 80, 128, 256))


def check_stored(card: ctypes.CDLL, bits: int, tokens: int, dims: tuple[int, ...]) -> None:
    """Up to the last bits of float32: those may tip a code or, at 4 bits, the choice between two scales."""
    for dim in dims:
        pair = [Sequence(ops, tokens, 2, 2, dim, bits, bits, rotate=True) for ops in (card, kernels.load(CPUS[0]))]
        np.testing.assert_allclose(pair[0].q_turned, pair[1].q_turned, atol=3e-6)
        for ours, theirs in zip(pair[0].stored(), pair[1].stored()):
            assert np.mean(ours == theirs) > 0.995
            assert np.abs(ours - theirs).max() < {16: 0.01, 8: 0.06, 4: 1.0}[bits]


def test_scales_of_bytes_on_a_card_are_right_to_the_last_bit(card: ctypes.CDLL) -> None:
    """Without divisions proper: largest / 127 as a half, and 1 over it, for every half and what leads to none."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    random = np.random.default_rng(1)
    others = [random.uniform(0, 1, 10000) * 10.0**power for power in range(-7, 7)]
    largest = np.concatenate([halves * 127, *others, [np.inf, 1e30, 1e-40, 0]]).astype(np.float32)
    scales, inverses = np.zeros_like(largest), np.zeros_like(largest)
    kernels.call(card.byte_scales, largest, len(largest), scales, inverses)
    kernels.check(card)
    np.testing.assert_array_equal(scales, np.minimum(largest / np.float32(127), 65504).astype(np.float16))
    with np.errstate(divide="ignore"):
        np.testing.assert_array_equal(inverses, np.where(scales == 0, 0, np.float32(1) / scales))


def test_decode_on_a_card_does_not_see_what_another_request_left(card: ctypes.CDLL) -> None:
    check_what_another_left(card)


def check_what_another_left(card: ctypes.CDLL) -> None:
    s = Sequence(card, 40, 2, 1, 32, 16, 16)
    expected = s.decode(0, 20)
    bad = np.full((20, 1, 32), np.nan, np.float32)
    s.pool.store(s.layer, s.pages, 20, s.rotary[20:], s.q[20:], bad, bad)
    np.testing.assert_array_equal(s.decode(0, 20), expected)
