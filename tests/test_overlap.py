"""Steps in halves: the next one begins before the tokens of this one are known, and nobody can tell from the tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import fake_native
from halfturn import Generator, SamplingParams
from halfturn.error import Error


class Recording(fake_native.Model):
    """Notes the order of calls: ("step", n), ("start", n) and ("finish", n), n items."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.calls: list[tuple[str, int]] = []
        self.inside = False

    def step(self, items: Sequence[fake_native.Item]) -> list[fake_native.Sample | None]:
        if not self.inside:
            self.calls.append(("step", len(items)))
        return super().step(items)

    def start(self, items: Sequence[fake_native.Item]) -> None:
        self.calls.append(("start", len(items)))
        self.inside = True
        super().start(items)
        self.inside = False

    def finish(self) -> list[fake_native.Sample | None]:
        self.calls.append(("finish", len(self.under_way[0][0])))
        return super().finish()


def run(
    folder: Path, overlap_rows: int, requests: list[tuple[Any, SamplingParams]], max_batch: int = 32, **settings: Any
) -> tuple[list[Any], Recording]:
    model = fake_native.load(folder)
    model.native = native = Recording(overlap_rows=overlap_rows, **settings)
    with Generator(model, max_batch=max_batch) as generator:
        jobs = [generator.submit(prompt, params=params) for prompt, params in requests]
        outputs = [(o.token_ids, o.finish_reason, o.stop_reason, o.text) for o in (job.result(60) for job in jobs)]
        assert generator.stats()["pages_used"] == 0
    assert not native.under_way, "a step was left under way"
    return outputs, native


def test_the_next_step_begins_before_this_one_is_finished(tmp_path: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    _, native = run(tmp_path, 64, [([1, 2, 3], params)])
    # The prompt and its token, then four tokens: no step more, as their number is known before.
    assert native.calls == [
        ("step", 1), ("start", 1), ("start", 1), ("finish", 1), ("start", 1), ("finish", 1), ("start", 1),
        ("finish", 1), ("finish", 1),
    ]  # fmt: skip


def test_an_end_that_nobody_foresaw_costs_one_step(tmp_path: Path) -> None:
    """A stop token ends the request while the step after it is under way, whose token is thrown away."""
    whole, _ = run(tmp_path, 0, [([1, 2], SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))])
    stop = whole[0][0][6]
    assert stop not in whole[0][0][:6]
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, stop_token_ids=[stop])
    halves, native = run(tmp_path, 64, [([1, 2], params)])
    assert halves[0][0] == whole[0][0][:7] and halves[0][1:3] == ("stop", stop)
    assert [n for what, n in native.calls if what != "finish"] == [1] * 8


@pytest.mark.parametrize(
    "setting", [{"repetition_penalty": 1.1}, {"presence_penalty": 0.5}, {"frequency_penalty": 1.0}]
)
def test_penalties_wait_for_each_token(tmp_path: Path, setting: dict[str, float]) -> None:
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=6, ignore_eos=True, **setting)
    whole, _ = run(tmp_path, 0, [([1, 2], params)])
    halves, native = run(tmp_path, 64, [([1, 2], params)])
    assert halves == whole
    assert native.calls[1:] == [("start", 1), ("finish", 1)] * 5


def test_bans_that_change_wait_for_their_token(tmp_path: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=6, min_tokens=3, stop_token_ids=list(range(0, 300, 2)))
    whole, _ = run(tmp_path, 0, [([1, 2], params)])
    assert run(tmp_path, 64, [([1, 2], params)])[0] == whole
    assert len(whole[0][0]) >= 3


def test_a_newcomer_is_let_in_between_two_steps(tmp_path: Path) -> None:
    long = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    model = fake_native.load(tmp_path)
    model.native = native = Recording(overlap_rows=64, step_seconds=0.002)
    with Generator(model) as generator:
        first = generator.submit([1], params=long)
        pieces = iter(first)  # kept, as leaving it would cancel the job
        next(pieces)
        second = generator.submit([2], params=SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
        assert len(second.result(20).token_ids) == 4
    joined = native.calls.index(("step", 2))
    assert ("start", 2) in native.calls[joined:] and ("start", 1) in native.calls[:joined]


def test_a_full_batch_does_not_wait_for_those_outside(tmp_path: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    _, native = run(tmp_path, 64, [([n], params) for n in range(6)], max_batch=2)
    starts = [n for n, (what, _) in enumerate(native.calls) if what == "start"]
    assert sum(native.calls[n + 1][0] == "start" for n in starts[:-1]) >= 3


@pytest.mark.parametrize("pages", [9, 64])
def test_tokens_are_those_of_whole_steps(tmp_path: Path, pages: int) -> None:
    """Requests of all kinds at once, in few pages, so that some start again."""
    draw = random.Random(5)
    requests = []
    for n in range(24):
        params = SamplingParams(
            temperature=draw.choice([0.0, 0.9]),
            seed=n,
            max_tokens=draw.randrange(1, 60),
            min_tokens=0,
            repetition_penalty=draw.choice([1.0, 1.0, 1.0, 1.2]),
            stop_token_ids=draw.sample(range(300), 4),
        )
        requests.append(([draw.randrange(256) for _ in range(draw.randrange(1, 70))], params))
    whole, _ = run(tmp_path, 0, requests, max_batch=7, pages=pages)
    halves, native = run(tmp_path, 64, requests, max_batch=7, pages=pages)
    assert halves == whole
    assert any(a[0] == b[0] == "start" for a, b in zip(native.calls, native.calls[1:]))


def test_a_step_that_fails_under_way(tmp_path: Path) -> None:
    """The step fails when it is finished, and so does the one behind it; each request then runs alone."""
    bad = 7

    def fail(step: int, items: Sequence[fake_native.Item]) -> None:
        if step >= 6 and any(item.pages[0] == poisoned[0] for item in items):
            raise Error("the card is unwell")

    poisoned = [-1]
    model = fake_native.load(tmp_path)
    model.native = native = Recording(overlap_rows=64, fail=fail, step_seconds=0.001)
    params = SamplingParams(temperature=0, max_tokens=15, ignore_eos=True)
    with Generator(model) as generator:
        good, sick = generator.submit([1], params=params), generator.submit([bad], params=params)
        pieces = iter(sick)  # kept, as leaving it would cancel the job
        next(pieces)
        poisoned[0] = next(s.pages[0] for s in generator._engine.scheduler.running if s.tokens[0] == bad)
        assert len(good.result(20).token_ids) == 15
        with pytest.raises(Error, match="the card is unwell"):
            sick.result(20)
    assert not native.under_way


def test_a_thread_that_dies_leaves_no_step_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fake_native.load(tmp_path)
    model.native = native = Recording(overlap_rows=64)
    generator = Generator(model)

    def broken(*_: object) -> bool:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(generator._engine.scheduler, "reserve", broken)
    with pytest.raises(Error, match="a mistake of ours"):
        generator.generate([[1]], SamplingParams(temperature=0, max_tokens=9, ignore_eos=True))
    generator.close()
    assert ("start", 1) in native.calls and not native.under_way


def test_close_leaves_no_step_under_way(tmp_path: Path) -> None:
    model = fake_native.load(tmp_path)
    model.native = native = Recording(overlap_rows=64, step_seconds=0.002)
    generator = Generator(model)
    job = generator.submit([1], params=SamplingParams(temperature=0, ignore_eos=True))
    pieces = iter(job)
    next(pieces)
    generator.close()
    assert not native.under_way
    with Generator(model) as again:  # the model is as good as new
        params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
        assert len(again.generate([[1]], params)[0].token_ids) == 3
