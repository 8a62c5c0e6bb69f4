"""Sampling on the card against the CPU's sampler: the same tokens for the same seeds, distributions, log probabilities,
refusals, and rows that do not depend on their neighbours. Without a card or nvcc these tests are skipped.

    python tests/test_sampler_cuda.py    # prints microseconds per step
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import compiled
from compiled import ROOT
from halfturn import _C
from kernels import call
from test_sampler import check_draws, filtered

SOURCES = [ROOT / f for f in ("tests/cpp/sample_cuda.cu", "csrc/cuda/sample.cu", "csrc/cuda/cuda.cpp",
                              "csrc/sampler.cpp")]  # fmt: skip


def missing() -> str:
    """Why there is nothing to test here, or nothing."""
    try:
        compiled.find_nvcc()
        compiled.card()
    except compiled.Unavailable as reason:
        return str(reason)
    return ""


pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "a card is here")


@functools.lru_cache
def load() -> ctypes.CDLL:
    """Of this machine's card."""
    return opened(compiled.for_card("sampler-cuda", SOURCES))


@functools.lru_cache
def load_emulated() -> ctypes.CDLL:
    """The same on the CPU. Raises Unavailable."""
    return opened(compiled.emulated("sampler-emulated", SOURCES))


def opened(library: Path) -> ctypes.CDLL:
    ops = ctypes.CDLL(str(library))
    ops.sampler_new.restype = ctypes.c_void_p
    ops.error_message.restype = ctypes.c_char_p
    ops.microseconds.restype = ctypes.c_double
    return ops


class CardSampler:
    """Sampler settings as test_sampler.Sampler takes them, for draw()."""

    def __init__(self, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0,
                 repetition: float = 1.0, presence: float = 0.0, frequency: float = 0.0, seed: int = 0,
                 logprobs: int = -1, bias: dict[int, float] | None = None, banned: list[int] | None = None,
                 prompt: list[int] | None = None) -> None:  # fmt: skip
        tokens, biases = np.array(list(bias or {}), np.int32), np.array(list((bias or {}).values()), np.float32)
        self.handle = ctypes.c_void_p(
            call(load().sampler_new, float(temperature), top_k, float(top_p), float(min_p), float(repetition),
                 float(presence), float(frequency), seed, logprobs, len(tokens), tokens, biases)
        )  # fmt: skip
        if not self.handle.value:
            raise RuntimeError(load().error_message().decode())
        self.ban(banned or [])
        call(load().sampler_accept, self.handle, np.array(prompt or [], np.int32), len(prompt or []))

    def ban(self, tokens: list[int]) -> None:
        call(load().sampler_ban, self.handle, np.array(tokens, np.int32), len(tokens))

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            load().sampler_free(self.handle)


def native(prompt: list[int] | None = None, repetition: float = 1.0, presence: float = 0.0, frequency: float = 0.0,
           bias: dict[int, float] | None = None, banned: list[int] | None = None, **settings: Any) -> Any:  # fmt: skip
    sampler = _C.Sampler(repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency,
                         logit_bias=bias or {}, banned=banned or [], **settings)  # fmt: skip
    sampler.accept(prompt or [])
    return sampler


Row = tuple[int, float, list[tuple[int, float]], str]  # token, its log probability, the best, or why there is no token


def draw(samplers: list[CardSampler], logits: np.ndarray, gap: int = 0) -> list[Row]:
    """One token for each sampler: logits are one row for all, or one for each; `gap` floats stand between rows."""
    rows = np.broadcast_to(np.asarray(logits, np.float32), (len(samplers), np.shape(logits)[-1]))
    count, vocab = rows.shape
    padded = np.full((count, vocab + gap), np.nan, np.float32)
    padded[:, :vocab] = rows
    tokens, logprobs = np.zeros(count, np.int32), np.zeros(count, np.float32)
    top, top_logprobs = np.zeros((count, 20), np.int32), np.zeros((count, 20), np.float32)
    sentences = ctypes.create_string_buffer(300 * count)
    handles = (ctypes.c_void_p * count)(*(s.handle.value for s in samplers))
    call(load().run, handles, padded, count, vocab + gap, vocab, tokens, logprobs, top, top_logprobs, sentences)
    if text := load().error_message().decode():
        raise RuntimeError(text)
    results: list[Row] = []
    for r in range(count):
        best = [(int(t), float(p)) for t, p in zip(top[r], top_logprobs[r]) if t >= 0]
        sentence = sentences.raw[300 * r : 300 * (r + 1)].split(b"\0")[0].decode() if tokens[r] < 0 else ""
        results.append((int(tokens[r]), float(logprobs[r]), best, sentence))
    return results


def language_like(vocab: int, seed: int) -> np.ndarray:
    """A few likely tokens above a broad floor, as models give them."""
    rng = np.random.default_rng(seed)
    logits = 2.0 * rng.standard_normal(vocab)
    likely = rng.choice(vocab, min(vocab, 40), replace=False)
    logits[likely] += rng.exponential(4.0, likely.size) + 4
    return logits.astype(np.float32)


def flat(vocab: int, seed: int) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(vocab)).astype(np.float32)


def coarse(vocab: int, seed: int) -> np.ndarray:
    """Many equal logits, zeros of both signs among them."""
    return np.round(np.random.default_rng(seed).standard_normal(vocab)).astype(np.float32)


SHAPES = {"language": language_like, "flat": flat, "coarse": coarse}
SIZES = [7, 300, 49152, 128256]
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.3},
    {"temperature": 5.0},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 50},
    {"top_k": 3000, "temperature": 3.0},
    {"top_k": 1 << 40},
    {"top_p": 0.9},
    {"top_p": 0.2},
    {"top_p": 0.999, "temperature": 2.0},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 50, "top_p": 0.9},
    {"top_k": 20, "min_p": 0.1, "temperature": 1.5},
    {"top_p": 0.95, "min_p": 0.02, "temperature": 0.7},
    {"top_p": 0.99, "min_p": 0.5, "temperature": 2.0},  # min_p keeps less than top_p wants
    {"top_k": 40, "top_p": 0.8, "min_p": 0.05, "temperature": 1.2},
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("vocab", SIZES)
def test_same_tokens_as_the_cpu(vocab: int, shape: str) -> None:
    """All settings in one step, many steps. Draws may differ on the edge between two tokens: once in about 10^6."""
    seeds = 25 if vocab < 1000 else 5
    kinds = [{**settings, "seed": seed} for settings in SETTINGS for seed in range(seeds)]
    on_card, on_cpu = [CardSampler(**kind) for kind in kinds], [native(**kind) for kind in kinds]
    wrong = []
    for step in range(3):
        logits = SHAPES[shape](vocab, step)
        for kind, row, cpu in zip(kinds, draw(on_card, logits), on_cpu):
            expected = cpu.sample(logits).token
            if row[0] != expected:
                wrong.append((kind, row, expected))
    # In a flat vocabulary each token's share is near the rounding of the CPU's sums.
    assert len(wrong) <= (2 if shape != "language" and vocab > 1000 else 0), wrong[:10]
    assert not [w for w in wrong if w[0].get("temperature") == 0 or w[0].get("top_k") == 1]


def test_greedy_ties_go_to_the_lowest_id() -> None:
    greedy = [CardSampler(temperature=0), CardSampler(top_k=1)]
    for places in ([2999, 1717, 1718], [4095, 2048], [2047, 2048], [31, 32], [255, 256], [0, 4999]):
        logits = np.zeros(5000, np.float32)
        logits[places] = 1
        assert [row[0] for row in draw(greedy, logits)] == [min(places)] * 2
    logits = np.full(600, -1, np.float32)
    logits[[5, 300]] = [-0.0, 0.0]
    assert [row[0] for row in draw(greedy, logits)] == [5, 5]
    logits[[5, 300]] = [0.0, -0.0]
    assert [row[0] for row in draw(greedy, logits)] == [5, 5]


def test_ties_at_the_edge_of_a_filter_go_to_low_ids() -> None:
    for vocab in (500, 5000):  # sorted in shared and in global memory
        logits = np.zeros(vocab, np.float32)
        logits[::3] = -0.0
        three = draw([CardSampler(top_k=3, seed=s) for s in range(60)], logits)
        assert {row[0] for row in three} == {0, 1, 2}
        four = draw([CardSampler(top_p=3.95 / vocab, seed=s) for s in range(80)], logits)
        assert {row[0] for row in four} == {0, 1, 2, 3}


CHANGES: list[dict[str, Any]] = [
    {"repetition": 1.3, "prompt": [0, 1, 2, 3, 3]},
    {"repetition": 1e-38, "prompt": [0, 1]},
    {"presence": 0.7},
    {"frequency": 0.4},
    {"frequency": -0.4, "presence": 0.1},
    {"bias": {0: 3.5, 4: -float("inf"), 6: -2.0}},
    {"bias": {2: 100.0}, "banned": [2, 5]},
    {
        "repetition": 1.7,
        "presence": 0.5,
        "frequency": 0.3,
        "bias": {1: 4.0, 5: 2.0},
        "banned": [3],
        "prompt": [1, 3, 6],
    },
]


@pytest.mark.parametrize("vocab", SIZES)
def test_penalties_biases_and_bans(vocab: int) -> None:
    """Sequences of tokens, so that generated ones are counted; edits at both ends of the vocabulary."""
    shapes: list[dict[str, Any]] = [{"temperature": 0.0}, {"top_k": 4}, {"top_p": 0.9, "temperature": 0.8}, {}]
    kinds = [{**change, **shape, "seed": 3, "logprobs": 2} for change in CHANGES for shape in shapes]
    on_card, on_cpu = [CardSampler(**kind) for kind in kinds], [native(**kind) for kind in kinds]
    logits = language_like(vocab, 1)
    logits[:7] = np.linspace(logits.max() - 1, logits.max() + 1, 7)
    logits[-2:] = logits.max()
    for step in range(12):
        for kind, row, cpu in zip(kinds, draw(on_card, logits), on_cpu):
            expected = cpu.sample(logits)
            assert row[0] == expected.token, (step, kind)
            np.testing.assert_allclose(row[1], expected.logprob, atol=1e-5)
            assert [t for t, _ in row[2]] == [t for t, _ in expected.top]
        if step == 6:
            for sampler in (*on_card, *on_cpu):
                sampler.ban([vocab - 1])


@pytest.mark.parametrize("vocab", [1, *SIZES])
def test_logprobs_are_of_the_raw_logits(vocab: int) -> None:
    for shape in SHAPES.values():
        logits = shape(vocab, vocab)
        best = int(logits.argmax())
        kinds: list[dict[str, Any]] = [
            {"temperature": t, "top_k": k, "logprobs": n, **change}
            for t, k in ((0.0, 0), (0.7, 3), (0.7, 0))
            for n in (0, 1, 5, 20)
            for change in ({}, {"bias": {best: -1.0}, "banned": [0]} if vocab > 1 else {})
        ]
        for kind, row in zip(kinds, draw([CardSampler(**kind) for kind in kinds], logits, gap=3)):
            expected = native(**kind).sample(logits)
            assert row[0] == expected.token
            np.testing.assert_allclose(row[1], expected.logprob, atol=1e-5)
            assert [t for t, _ in row[2]] == [t for t, _ in expected.top]
            assert len(row[2]) == min(vocab, kind["logprobs"])
            np.testing.assert_allclose([p for _, p in row[2]], [p for _, p in expected.top], atol=1e-5)
    assert draw([CardSampler(temperature=0)], np.zeros(5))[0][1:3] == (0.0, [])


@pytest.mark.parametrize("vocab", SIZES)
def test_broken_logits_have_the_cpus_sentences(vocab: int) -> None:
    """Only the rows that are broken fail, each with what the CPU says."""
    good = language_like(vocab, 2)
    rows: list[np.ndarray] = []
    kinds: list[dict[str, Any]] = []
    for bad in (np.nan, np.inf):
        for place in {0, vocab // 2, vocab - 1}:
            common: list[dict[str, Any]] = [{"temperature": 0.0}, {"top_p": 0.9, "logprobs": 3}]
            for kind in (*common, {"top_k": 2, "banned": [place]}):
                rows += [good.copy(), good]
                rows[-2][place] = bad
                kinds += [kind, kind]
    rows += [np.full(vocab, -np.inf, np.float32), good, good]
    kinds += [{}, {"banned": list(range(vocab))}, {"banned": list(range(1, vocab)), "top_k": 3}]
    failed = 0
    for kind, logits, row in zip(kinds, rows, draw([CardSampler(**kind) for kind in kinds], np.array(rows))):
        try:
            expected: Any = (native(**kind).sample(logits).token, "")
        except Exception as error:
            expected = (-1, str(error))
            failed += 1
        assert (row[0], row[3]) == expected
    assert failed == len({0, vocab // 2, vocab - 1}) * 6 + 2
    with pytest.raises(RuntimeError, match=f"logit_bias names token {vocab}, but the vocabulary has {vocab} tokens"):
        draw([CardSampler(bias={vocab: 1.0})], good)


def test_impossible_tokens() -> None:
    """-inf is a probability of zero, in every filter."""
    logits = np.full(5000, -np.inf, np.float32)
    logits[[3, 4900]] = 0.0
    for settings in SETTINGS:
        rows = draw([CardSampler(**settings, seed=s) for s in range(20)], logits)
        assert {row[0] for row in rows} <= {3, 4900}
    logits[:] = -np.inf
    logits[17] = -1e30
    assert draw([CardSampler(logprobs=3)], logits)[0][:3] == (17, 0.0, [(17, 0.0)])


@pytest.mark.parametrize("settings", SETTINGS[1:], ids=str)
def test_draws_follow_the_distribution(settings: dict[str, Any]) -> None:
    logits = (3 * np.random.default_rng(5).standard_normal(1000)).astype(np.float32)
    samplers = [CardSampler(**settings, seed=s) for s in range(20000)]
    tokens = np.array([row[0] for i in range(0, 20000, 4000) for row in draw(samplers[i : i + 4000], logits)])
    check_draws(tokens, filtered(logits, **{**settings, "top_k": min(1000, settings.get("top_k", 0))}))


@pytest.mark.parametrize("vocab", SIZES)
def test_a_row_is_the_same_alone_and_in_a_batch(vocab: int) -> None:
    rng = np.random.default_rng(3)
    kinds = [{**SETTINGS[i % len(SETTINGS)], "seed": i, "logprobs": i % 7 - 1, "bias": {i % 7: 1.0}} for i in range(33)]
    rows = np.array([list(SHAPES.values())[i % 3](vocab, i) for i in range(33)])
    together = draw([CardSampler(**kind) for kind in kinds], rows)
    again = draw([CardSampler(**kind) for kind in kinds], rows, gap=5)
    assert together == again
    order = rng.permutation(33)
    shuffled = draw([CardSampler(**kinds[i]) for i in order], rows[order])
    assert [together[i] for i in order] == shuffled
    for i in range(0, 33, 2):
        assert draw([CardSampler(**kinds[i])], rows[i])[0] == together[i]


def main() -> None:
    choices: list[dict[str, Any]] = [*SETTINGS, {"temperature": 0.0, "logprobs": 5}]
    choices.append({"repetition": 1.2, "prompt": list(range(4000))})
    for vocab in SIZES[2:]:
        for settings in choices:
            sampler, times = CardSampler(**settings), []
            for shape in SHAPES.values():
                for rows in (1, 32):
                    time = call(load().microseconds, sampler.handle, shape(vocab, 1), rows, vocab, 50)
                    times.append(f"{time:8.1f}")
            shown = {**settings, "prompt": len(settings.get("prompt", []))}
            print(vocab, *times, shown, "(1 and 32 rows of", *SHAPES, "in us)", flush=True)


if __name__ == "__main__":
    main()
