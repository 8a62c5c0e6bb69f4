"""The sampler: known answers of every filter, distributions of draws, penalties, log probabilities, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from halfturn import _C
from halfturn.error import Error


class Sampler:
    """_C.Sampler with short names, many draws at a time from the same logits, and numpy arrays."""

    def __init__(self, *, repetition: float = 1.0, presence: float = 0.0, frequency: float = 0.0,
                 bias: dict[int, float] | None = None, **settings: Any) -> None:  # fmt: skip
        self.native = _C.Sampler(
            repetition_penalty=repetition,
            presence_penalty=presence,
            frequency_penalty=frequency,
            logit_bias=bias or {},
            **settings,
        )
        self.accept, self.ban = self.native.accept, self.native.ban

    def samples(self, logits: np.ndarray, count: int = 1) -> list[Any]:
        row = np.asarray(logits, np.float32)
        return [self.native.sample(row) for _ in range(count)]

    def sample(self, logits: np.ndarray, count: int = 1) -> np.ndarray:
        return np.array([s.token for s in self.samples(logits, count)])


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
def test_greedy_takes_the_largest(size: int) -> None:
    rng = np.random.default_rng(size)
    logits = rng.standard_normal(size).astype(np.float32) - 50
    sampler = Sampler(temperature=0)
    for best in {0, size // 2, size - 1}:
        changed = logits.copy()
        changed[best] = 3
        assert sampler.sample(changed)[0] == best
    assert sampler.sample(logits)[0] == logits.argmax()


def test_greedy_ties_go_to_the_lowest_id() -> None:
    logits = np.zeros(3000, np.float32)
    assert Sampler(temperature=0).sample(logits)[0] == 0
    logits[[2999, 1717, 1718]] = 1
    assert Sampler(temperature=0).sample(logits)[0] == 1717
    assert Sampler(top_k=1).sample(logits, 20).tolist() == [1717] * 20


SETTINGS: list[dict[str, Any]] = [
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
def test_draws_follow_the_distribution(settings: dict[str, Any], size: int) -> None:
    logits = (3 * np.random.default_rng(5).standard_normal(size)).astype(np.float32)
    tokens = Sampler(seed=11, **settings).sample(logits, 20000)
    check_draws(tokens, filtered(logits, **settings))


def test_draws_from_a_large_flat_vocabulary() -> None:
    """Nearly uniform: top-p keeps tens of thousands of tokens, so that no short list of candidates suffices."""
    logits = (0.1 * np.random.default_rng(5).standard_normal(50001)).astype(np.float32)
    choices: list[dict[str, Any]] = [{}, {"top_p": 0.9}, {"top_k": 30000}, {"min_p": 0.9}]
    for settings in choices:
        tokens = Sampler(seed=2, **settings).sample(logits, 600)
        p = filtered(logits, **settings)
        assert (p[tokens] > 0).all()
        # a thousand consecutive ids at a time
        coarse = np.add.reduceat(p, np.arange(0, p.size, 1000))
        check_draws(tokens // 1000, coarse)


def test_filters_on_a_small_known_distribution() -> None:
    logits = np.log(np.array([0.1, 0.4, 0.05, 0.25, 0.2], np.float32))

    def support(**settings: Any) -> set[int]:
        return set(Sampler(seed=3, **settings).sample(logits, 2000).tolist())

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


def test_ties_at_the_edge_of_a_filter_go_to_low_ids() -> None:
    logits = np.zeros(500, np.float32)
    assert set(Sampler(top_k=3).sample(logits, 300).tolist()) == {0, 1, 2}
    assert set(Sampler(top_p=0.0079).sample(logits, 300).tolist()) == {0, 1, 2, 3}


def test_a_seed_and_the_step_decide() -> None:
    logits = np.random.default_rng(1).standard_normal(2000).astype(np.float32)
    first = Sampler(seed=7).sample(logits, 50)
    np.testing.assert_array_equal(Sampler(seed=7).sample(logits, 50), first)
    assert (Sampler(seed=8).sample(logits, 50) != first).sum() > 40
    # the number of earlier tokens counts, not what they were or how they were chosen
    sampler = Sampler(seed=7)
    sampler.sample(np.zeros(5, np.float32), 20)
    np.testing.assert_array_equal(sampler.sample(logits, 30), first[20:])


def test_draws_do_not_repeat_across_neighbouring_seeds() -> None:
    """One draw each of many seeds, and many draws of one, fill [0, 1) alike."""
    logits = np.zeros(16, np.float32)
    check_draws(np.array([Sampler(seed=s).sample(logits)[0] for s in range(2000)]), np.full(16, 1 / 16))
    pairs = Sampler(seed=0).sample(logits, 20001)
    check_draws(pairs[1:] * 16 + pairs[:-1], np.full(256, 1 / 256))


def test_penalties() -> None:
    """Penalised logits, read off through the distribution that the draws follow."""
    logits = np.array([2.0, 1.5, -0.5, 0.25, 0.0, 1.0], np.float32)

    def greedy_after(prompt: list[int], generated: list[int], **settings: Any) -> int:
        sampler = Sampler(temperature=0, **settings)
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


@pytest.mark.parametrize("more", [{"min_p": 0.5}, {"top_k": 2}, {"top_p": 0.5}, {"temperature": 0.0}])
def test_the_smallest_repetition_penalty(more: dict[str, Any]) -> None:
    """A positive logit over it is as large as numbers can be, which is not infinite."""
    for seed in range(20):
        sampler = Sampler(repetition=1e-38, seed=seed, **more)
        sampler.accept([1, 3])
        assert sampler.sample(np.array([9, 5, 8, -1], np.float32))[0] == 1


def test_repetition_penalty_makes_negative_logits_smaller() -> None:
    draws = []
    for seed in range(4000):
        sampler = Sampler(seed=seed, repetition=2.0)
        sampler.accept([1])
        draws.append(sampler.sample(np.array([-1.0, -1.0], np.float32))[0])
    check_draws(np.array(draws), softmax(np.array([-1.0, -2.0])))


def test_bias_and_bans() -> None:
    logits = np.array([1.0, 2.0, 3.0, 4.0], np.float32)
    assert Sampler(temperature=0, bias={0: 3.5}).sample(logits)[0] == 0
    assert Sampler(temperature=0, bias={3: -100.0}).sample(logits)[0] == 2
    tokens = Sampler(seed=1, bias={1: 1.5, 3: -0.5}).sample(logits, 20000)
    check_draws(tokens, softmax(logits + np.array([0, 1.5, 0, -0.5], np.float32)))
    sampler = Sampler(temperature=0, banned=[3], bias={3: 100.0})
    assert sampler.sample(logits)[0] == 2
    sampler.ban([2, 3])
    assert sampler.sample(logits)[0] == 1
    sampler.ban([])
    assert sampler.sample(logits)[0] == 3
    banned = Sampler(seed=1, banned=[3])
    check_draws(banned.sample(logits, 20000), np.append(softmax(logits[:3]), 0))


@pytest.mark.parametrize("size", [5, 64, 1000, 49152])
def test_logprobs_are_of_the_raw_logits(size: int) -> None:
    logits = (4 * np.random.default_rng(size).standard_normal(size)).astype(np.float32)
    exact = np.log(softmax(logits))
    order = np.lexsort((np.arange(size), -logits))
    changes: dict[str, Any] = {"banned": [int(order[0])], "bias": {int(order[1]): 2.0}}
    sampler = Sampler(seed=1, temperature=0.3, top_k=3, logprobs=5, **changes)
    for sample in sampler.samples(logits, 20):
        assert sample.token != order[0]
        np.testing.assert_allclose(sample.logprob, exact[sample.token], atol=2e-6)
        assert [token for token, _ in sample.top] == order[:5].tolist()
        np.testing.assert_allclose([logprob for _, logprob in sample.top], exact[order[:5]], atol=2e-6)


def test_logprobs_without_alternatives() -> None:
    logits = np.log(np.array([0.25, 0.75]))
    sample = Sampler(temperature=0.0, logprobs=0).samples(logits)[0]
    assert (sample.token, sample.top) == (1, [])
    np.testing.assert_allclose(sample.logprob, np.log(0.75), atol=1e-6)
    assert Sampler(temperature=0.0).samples(logits)[0].logprob == 0


def test_impossible_tokens() -> None:
    """-inf is a probability of zero, in every filter."""
    logits = np.full(1000, -np.inf, np.float32)
    logits[[3, 900]] = [0.0, 0.0]
    for settings in SETTINGS:
        tokens = Sampler(seed=1, **settings).sample(logits, 200)
        assert set(tokens.tolist()) <= {3, 900}
    logits[:] = -np.inf
    logits[0] = -1e30
    assert Sampler(seed=1).sample(logits, 5).tolist() == [0] * 5
    assert [token for token, _ in Sampler(logprobs=3).samples(logits)[0].top] == [0]


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
def test_options_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(Error, match=message):
        Sampler(**settings)


def test_logits_that_are_not_numbers() -> None:
    for size in (1, 5, 64, 1000):
        for place in {0, size // 2, size - 1}:
            for bad in (np.nan, np.inf):
                logits = np.zeros(size, np.float32)
                logits[place] = bad
                with pytest.raises(Error, match="not numbers" if np.isnan(bad) else "is inf"):
                    Sampler().sample(logits)
    with pytest.raises(Error, match="largest of the model's 7 logits is -inf"):
        Sampler().sample(np.full(7, -np.inf, np.float32))
    with pytest.raises(Error, match="every one of the 2 tokens is banned"):
        Sampler(banned=[0, 1]).sample(np.zeros(2, np.float32))
    with pytest.raises(Error, match="logit_bias names token 2, but the vocabulary has 2 tokens"):
        Sampler(bias={2: 1.0}).sample(np.zeros(2, np.float32))
