"""The sampler: known answers of every filter, distributions of draws, penalties, log probabilities, refusals."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

import kernels
from kernels import KernelError, Sampler


@pytest.fixture(scope="module")
def ops() -> ctypes.CDLL:
    return kernels.load("generic")  # the sampler is the same for every instruction set


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    x = logits.astype(np.float64) / temperature
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def filtered(logits: np.ndarray, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
             min_p: float = 0.0) -> np.ndarray:  # fmt: skip
    """The exact distribution, by sorting everything: top-k, then top-p of what is left, then min-p."""
    p = softmax(logits, temperature)
    order = np.lexsort((np.arange(p.size), -logits))
    keep = np.ones(p.size, bool)
    if top_k:
        keep[order[top_k:]] = False
    ranked = np.where(keep, p, 0)[order]
    before = np.cumsum(ranked) - ranked  # mass of the better tokens
    keep[order[before >= top_p * ranked.sum()]] = False
    keep &= p >= min_p * p.max()
    return np.where(keep, p, 0) / p[keep].sum()


def check_draws(tokens: np.ndarray, p: np.ndarray) -> None:
    """No token outside the support; Pearson's statistic below what a right sampler exceeds once in 10^5."""
    counts = np.bincount(tokens, minlength=p.size)
    assert not counts[p == 0].any()
    expected = p * tokens.size
    small = expected < 8  # pooled, so that the statistic is near a chi-square
    observed = np.append(counts[~small], counts[small].sum())
    expected = np.append(expected[~small], expected[small].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = expected.size - 1
    assert statistic <= freedom + 4.3 * np.sqrt(2 * freedom) + 20


@pytest.mark.parametrize("size", [1, 3, 63, 64, 65, 1000, 49152])
def test_greedy_takes_the_largest(ops: ctypes.CDLL, size: int) -> None:
    rng = np.random.default_rng(size)
    logits = rng.standard_normal(size).astype(np.float32) - 50
    sampler = Sampler(ops, temperature=0)
    for best in {0, size // 2, size - 1}:
        changed = logits.copy()
        changed[best] = 3
        assert sampler.sample(changed)[0] == best
    assert sampler.sample(logits)[0] == logits.argmax()


def test_greedy_ties_go_to_the_lowest_id(ops: ctypes.CDLL) -> None:
    logits = np.zeros(3000, np.float32)
    assert Sampler(ops, temperature=0).sample(logits)[0] == 0
    logits[[2999, 1717, 1718]] = 1
    assert Sampler(ops, temperature=0).sample(logits)[0] == 1717
    assert Sampler(ops, top_k=1).sample(logits, 20).tolist() == [1717] * 20


SETTINGS = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 200},
    {"top_p": 0.9},
    {"top_p": 0.3, "temperature": 0.7},
    {"top_p": 0.999},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.8},
    {"top_k": 50, "min_p": 0.1, "top_p": 0.95, "temperature": 1.3},
    {"top_p": 0.5, "min_p": 0.02},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("size", [1000, 70])
def test_draws_follow_the_distribution(ops: ctypes.CDLL, settings: dict[str, float], size: int) -> None:
    logits = (3 * np.random.default_rng(5).standard_normal(size)).astype(np.float32)
    tokens = Sampler(ops, seed=11, **settings).sample(logits, 20000)  # type: ignore[arg-type]
    check_draws(tokens, filtered(logits, **settings))  # type: ignore[arg-type]


def test_draws_from_a_large_flat_vocabulary(ops: ctypes.CDLL) -> None:
    """Nearly uniform: top-p keeps tens of thousands of tokens, so that no short list of candidates suffices."""
    logits = (0.1 * np.random.default_rng(5).standard_normal(50001)).astype(np.float32)
    for settings in ({}, {"top_p": 0.9}, {"top_k": 30000}, {"min_p": 0.9}):
        tokens = Sampler(ops, seed=2, **settings).sample(logits, 600)  # type: ignore[arg-type]
        p = filtered(logits, **settings)  # type: ignore[arg-type]
        assert (p[tokens] > 0).all()
        # a thousand consecutive ids at a time
        coarse = np.add.reduceat(p, np.arange(0, p.size, 1000))
        check_draws(tokens // 1000, coarse)


def test_filters_on_a_small_known_distribution(ops: ctypes.CDLL) -> None:
    logits = np.log(np.float32([0.1, 0.4, 0.05, 0.25, 0.2]))

    def support(**settings: float) -> set[int]:
        return set(Sampler(ops, seed=3, **settings).sample(logits, 2000).tolist())  # type: ignore[arg-type]

    assert support() == {0, 1, 2, 3, 4}
    assert support(top_k=2) == {1, 3}
    assert support(top_k=5) == support(top_k=100) == {0, 1, 2, 3, 4}
    assert support(top_p=0.39) == {1}
    assert support(top_p=0.41) == {1, 3}
    assert support(top_p=0.66) == {1, 3, 4}
    assert support(top_k=2, top_p=0.6) == {1}  # of the two: 0.4 / 0.65
    assert support(min_p=0.45) == {1, 3, 4}
    assert support(min_p=0.24) == {0, 1, 3, 4}
    assert support(min_p=0.45, top_p=0.41) == {1, 3}
    assert support(temperature=0.01) == {1}


def test_ties_at_the_edge_of_a_filter_go_to_low_ids(ops: ctypes.CDLL) -> None:
    logits = np.zeros(500, np.float32)
    assert set(Sampler(ops, top_k=3).sample(logits, 300).tolist()) == {0, 1, 2}
    assert set(Sampler(ops, top_p=0.0079).sample(logits, 300).tolist()) == {0, 1, 2, 3}


def test_a_seed_and_the_step_decide(ops: ctypes.CDLL) -> None:
    logits = np.random.default_rng(1).standard_normal(2000).astype(np.float32)
    first = Sampler(ops, seed=7).sample(logits, 50)
    np.testing.assert_array_equal(Sampler(ops, seed=7).sample(logits, 50), first)
    assert (Sampler(ops, seed=8).sample(logits, 50) != first).sum() > 40
    # the number of earlier tokens counts, not what they were or how they were chosen
    sampler = Sampler(ops, seed=7)
    sampler.sample(np.zeros(5, np.float32), 20)
    np.testing.assert_array_equal(sampler.sample(logits, 30), first[20:])


def test_draws_do_not_repeat_across_neighbouring_seeds(ops: ctypes.CDLL) -> None:
    """One draw each of many seeds, and many draws of one, fill [0, 1) alike."""
    logits = np.zeros(16, np.float32)
    check_draws(np.array([Sampler(ops, seed=s).sample(logits)[0] for s in range(2000)]), np.full(16, 1 / 16))
    pairs = Sampler(ops, seed=0).sample(logits, 20001)
    check_draws(pairs[1:] * 16 + pairs[:-1], np.full(256, 1 / 256))


def test_penalties(ops: ctypes.CDLL) -> None:
    """Penalised logits, read off through the distribution that the draws follow."""
    logits = np.float32([2.0, 1.5, -0.5, 0.25, 0.0, 1.0])

    def greedy_after(prompt: list[int], generated: list[int], **settings: float) -> int:
        sampler = Sampler(ops, temperature=0, **settings)  # type: ignore[arg-type]
        sampler.accept(prompt)
        for token in generated:  # forced: its logit is far above the others
            assert sampler.sample(np.where(np.arange(6) == token, 1e6, 0).astype(np.float32))[0] == token
        return int(sampler.sample(logits)[0])

    assert greedy_after([0], []) == 0
    assert greedy_after([0], [], repetition=1.3) == 0  # 2 / 1.3 is above 1.5
    assert greedy_after([0], [], repetition=1.4) == 1
    assert greedy_after([0, 1, 5], [], repetition=100.0) == 3  # positive ones shrink to almost 0
    assert greedy_after([], [0], repetition=1.4) == 1
    assert greedy_after([0], [], presence=0.6) == 0  # prompts do not count
    assert greedy_after([], [0], presence=0.6) == 1
    assert greedy_after([], [0, 0, 0], presence=0.4) == 0  # once, however often
    assert greedy_after([], [0, 0], frequency=0.2) == 0
    assert greedy_after([], [0, 0, 0], frequency=0.2) == 1
    assert greedy_after([], [3], frequency=-2.0) == 3


def test_repetition_penalty_makes_negative_logits_smaller(ops: ctypes.CDLL) -> None:
    draws = []
    for seed in range(4000):
        sampler = Sampler(ops, seed=seed, repetition=2.0)
        sampler.accept([1])
        draws.append(sampler.sample(np.float32([-1.0, -1.0]))[0])
    check_draws(np.array(draws), softmax(np.array([-1.0, -2.0])))


def test_bias_and_bans(ops: ctypes.CDLL) -> None:
    logits = np.float32([1.0, 2.0, 3.0, 4.0])
    assert Sampler(ops, temperature=0, bias={0: 3.5}).sample(logits)[0] == 0
    assert Sampler(ops, temperature=0, bias={3: -100.0}).sample(logits)[0] == 2
    tokens = Sampler(ops, seed=1, bias={1: 1.5, 3: -0.5}).sample(logits, 20000)
    check_draws(tokens, softmax(logits + np.float32([0, 1.5, 0, -0.5])))
    sampler = Sampler(ops, temperature=0, banned=[3], bias={3: 100.0})
    assert sampler.sample(logits)[0] == 2
    sampler.ban([2, 3])
    assert sampler.sample(logits)[0] == 1
    sampler.ban([])
    assert sampler.sample(logits)[0] == 3
    banned = Sampler(ops, seed=1, banned=[3])
    check_draws(banned.sample(logits, 20000), np.append(softmax(logits[:3]), 0))


@pytest.mark.parametrize("size", [5, 64, 1000, 49152])
def test_logprobs_are_of_the_raw_logits(ops: ctypes.CDLL, size: int) -> None:
    logits = (4 * np.random.default_rng(size).standard_normal(size)).astype(np.float32)
    exact = np.log(softmax(logits))
    order = np.lexsort((np.arange(size), -logits))
    changes = {"banned": [int(order[0])], "bias": {int(order[1]): 2.0}}
    sampler = Sampler(ops, seed=1, temperature=0.3, top_k=3, logprobs=5, **changes)  # type: ignore[arg-type]
    tokens, logprobs, top, top_logprobs = sampler.sample_full(logits, 20)
    np.testing.assert_allclose(logprobs, exact[tokens], atol=2e-6)
    assert (tokens != order[0]).all()
    np.testing.assert_array_equal(top, np.tile(order[:5], (20, 1)))
    np.testing.assert_allclose(top_logprobs, exact[top], atol=2e-6)


def test_logprobs_without_alternatives(ops: ctypes.CDLL) -> None:
    logits = np.log(np.float32([0.25, 0.75]))
    _, logprobs, top, _ = Sampler(ops, temperature=0, logprobs=0).sample_full(logits)
    np.testing.assert_allclose(logprobs, np.log([0.75]), atol=1e-6)
    assert top.size == 0
    assert Sampler(ops, temperature=0).sample_full(logits)[1][0] == 0


def test_impossible_tokens(ops: ctypes.CDLL) -> None:
    """-inf is a probability of zero, in every filter."""
    logits = np.full(1000, -np.inf, np.float32)
    logits[[3, 900]] = [0.0, 0.0]
    for settings in SETTINGS:
        tokens = Sampler(ops, seed=1, **settings).sample(logits, 200)  # type: ignore[arg-type]
        assert set(tokens.tolist()) <= {3, 900}
    logits[:] = -np.inf
    logits[0] = -1e30
    assert Sampler(ops, seed=1).sample(logits, 5).tolist() == [0] * 5
    top = Sampler(ops, seed=1, logprobs=3).sample_full(logits)[2]
    assert top.tolist() == [[0, -1, -1]]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"temperature": -1.0}, "temperature is -1: use 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"repetition": 0.0}, "repetition_penalty is 0"),
        ({"presence": float("inf")}, "presence_penalty is inf"),
        ({"logprobs": 21}, "logprobs is 21: use 0 to 20"),
        ({"bias": {1: float("nan")}}, "logit_bias of token 1 is nan"),
    ],
)
def test_options_out_of_range(ops: ctypes.CDLL, settings: dict[str, float], message: str) -> None:
    with pytest.raises(KernelError, match=message):
        Sampler(ops, **settings)  # type: ignore[arg-type]


def test_logits_that_are_not_numbers(ops: ctypes.CDLL) -> None:
    for size in (1, 5, 64, 1000):
        for place in {0, size // 2, size - 1}:
            for bad in (np.nan, np.inf):
                logits = np.zeros(size, np.float32)
                logits[place] = bad
                with pytest.raises(KernelError, match="not numbers" if np.isnan(bad) else "is inf"):
                    Sampler(ops).sample(logits)
    with pytest.raises(KernelError, match="largest of the model's 7 logits is -inf"):
        Sampler(ops).sample(np.full(7, -np.inf, np.float32))
    with pytest.raises(KernelError, match="every one of the 2 tokens is banned"):
        Sampler(ops, banned=[0, 1]).sample(np.zeros(2, np.float32))
    with pytest.raises(KernelError, match="logit_bias names token 2, but the vocabulary has 2 tokens"):
        Sampler(ops, bias={2: 1.0}).sample(np.zeros(2, np.float32))
