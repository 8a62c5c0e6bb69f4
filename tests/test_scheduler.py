"""Pages and scheduling: no page is ever used twice, and a sequence's tokens don't depend on what else runs."""

from __future__ import annotations

import random

import pytest

import fake_native
from halfturn.error import Error
from halfturn.pages import PagePool, page_digest
from halfturn.scheduler import Scheduler, Sequence

PAGE = 4


def digests(tokens: list[int]) -> list[bytes]:
    found: list[bytes] = []
    for i in range(len(tokens) // PAGE):
        found.append(page_digest(found[-1] if found else b"", tokens[i * PAGE : (i + 1) * PAGE]))
    return found


def test_pages_are_handed_out_once() -> None:
    pool = PagePool(5, PAGE)
    first, second = pool.allocate(2), pool.allocate(3)
    assert first is not None and second is not None and sorted(first + second) == [0, 1, 2, 3, 4]
    assert pool.allocate(1) is None and pool.available == 0 and pool.used == 5
    pool.release(first)
    assert sorted(pool.allocate(2) or []) == sorted(first)
    assert pool.needed(0) == 0 and pool.needed(1) == 1 and pool.needed(PAGE) == 1 and pool.needed(PAGE + 1) == 2


def test_digest_depends_on_all_tokens_before() -> None:
    a, b = digests([1, 2, 3, 4, 5, 6, 7, 8]), digests([9, 2, 3, 4, 5, 6, 7, 8])
    assert a[0] != b[0] and a[1] != b[1] and len(a[0]) == 16
    assert digests([1, 2, 3, 4, 5, 6, 7, 8, 9]) == a


def test_equal_prefixes_share_pages() -> None:
    pool = PagePool(4, PAGE)
    names = digests(list(range(8)))
    pages = pool.allocate(2) or []
    for page, name in zip(pages, names):
        pool.publish(page, name)
    assert pool.acquire(names) == pages  # while the first user still holds them
    pool.release(pages)
    assert pool.available == 2  # the second user holds them
    pool.release(pages)
    assert pool.available == 4 and pool.acquire([names[0], b"other", names[1]]) == pages[:1]


def test_cached_pages_leave_in_order_of_last_use() -> None:
    pool = PagePool(3, PAGE)
    names = digests(list(range(12)))
    pages = pool.allocate(3) or []
    for page, name in zip(pages, names):
        pool.publish(page, name)
    pool.release(pages)  # the prefix's end is the oldest now
    assert pool.allocate(1) == [pages[2]]
    assert pool.acquire(names) == pages[:2]
    pool.release(pages[:2])
    assert pool.allocate(1) == [pages[1]] and pool.acquire(names) == pages[:1]


def test_same_content_twice_keeps_one_shared_page() -> None:
    pool = PagePool(3, PAGE)
    name = digests([1, 2, 3, 4])[0]
    one, two = pool.allocate(2) or []
    pool.publish(one, name)
    pool.publish(two, name)
    pool.release([two])
    assert pool.acquire([name]) == [one]
    pool.release([one, one])
    with pytest.raises(Error, match=r"page \d is released, but nobody uses it"):
        pool.release([two])


class Engine:
    """The scheduler over the fake native engine, one step at a time, with the pool's invariants checked at each."""

    def __init__(self, pages: int = 64, max_batch: int = 8, step_tokens: int = 16, apart: bool = False) -> None:
        self.native = fake_native.Model(pages=pages, page_size=PAGE, context=pages * PAGE, decodes_apart=apart)
        self.pool = PagePool(pages, PAGE)
        self.scheduler = Scheduler(self.pool, max_batch, step_tokens, apart)
        self.limits: dict[Sequence, int] = {}

    def add(self, prompt: list[int], count: int) -> Sequence:
        sequence = Sequence(list(prompt), fake_native.Sampler(temperature=0))
        self.limits[sequence] = len(prompt) + count
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> list[tuple[Sequence, int]]:
        batch = self.scheduler.schedule()
        self.check(batch)
        items = []
        for sequence, count in batch:
            end = sequence.computed + count
            sampler = sequence.sampler if end == len(sequence.tokens) else None
            start = sequence.computed
            items.append(
                fake_native.Item(sequence.tokens[start:end], start, sequence.pages, sampler, sequence.in_prompt)
            )
        for (sequence, count), sample in zip(batch, self.native.step(items) if items else []):
            self.scheduler.advance(sequence, count)
            if sample is not None:
                sequence.tokens.append(sample.token)
                if len(sequence.tokens) == self.limits[sequence]:
                    self.scheduler.finish(sequence)
        return batch

    def check(self, batch: list[tuple[Sequence, int]]) -> None:
        users = [0] * self.pool.count
        for sequence in self.scheduler.running:
            assert len(sequence.pages) == self.pool.needed(len(sequence.tokens))
            for page in sequence.pages:
                users[page] += 1
        assert users == self.pool._users
        assert sum(1 for n in users if n) + self.pool.available == self.pool.count
        assert sum(count for _, count in batch) <= self.scheduler.step_tokens
        assert len(self.scheduler.running) <= self.scheduler.max_batch
        assert all(not s.pages and not s.computed for s in self.scheduler.waiting)

    def run(self) -> None:
        while self.scheduler.waiting or self.scheduler.running:
            assert self.step(), "nothing runs although something waits"

    def drawn(self, sequence: Sequence) -> list[int]:
        return sequence.tokens[sequence.prompt_length :]


def test_long_prompt_is_read_in_chunks_beside_decoding() -> None:
    engine = Engine(step_tokens=8)
    short = engine.add([1, 2], 12)
    engine.step()
    long = engine.add(list(range(30)), 3)
    batch = engine.step()
    assert [(s is short, n) for s, n in batch] == [(True, 1), (False, 7)]
    engine.run()
    assert engine.drawn(short) == fake_native.expected([1, 2], 12)
    assert engine.drawn(long) == fake_native.expected(list(range(30)), 3)
    # 30 tokens at 7 a step beside one that decodes: five steps for the prompt, none without a token for the short one.
    assert engine.native.batches[1:6] == [[1, 7], [1, 7], [1, 7], [1, 7], [1, 2]]


def test_admission_is_in_order_and_bounded() -> None:
    engine = Engine(max_batch=2)
    sequences = [engine.add([i, i], 2 + i) for i in range(4)]
    seen: list[list[int]] = []
    while engine.scheduler.waiting or engine.scheduler.running:
        seen.append([sequences.index(s) for s, _ in engine.step()])
    assert seen[:3] == [[0, 1], [0, 1], [1, 2]]
    assert [s for step in seen for s in step].index(3) > 0 and all(len(step) <= 2 for step in seen)
    for i, sequence in enumerate(sequences):
        assert engine.drawn(sequence) == fake_native.expected([i, i], 2 + i)


def test_a_large_request_is_not_overtaken() -> None:
    """The first in the queue waits for pages, and those behind it wait too."""
    engine = Engine(pages=8)
    engine.add([1] * 16, 8)
    engine.step()
    large = engine.add([2] * 24, 4)
    small = engine.add([3], 1)
    while large in engine.scheduler.waiting:
        assert small in engine.scheduler.waiting
        engine.step()
    engine.run()
    assert engine.drawn(large) == fake_native.expected([2] * 24, 4)


@pytest.mark.parametrize("apart", [False, True])
def test_preempted_sequence_draws_the_same_tokens(apart: bool) -> None:
    engine = Engine(pages=8, apart=apart)
    sequences = [engine.add([i] * 6, 20) for i in range(3)]
    engine.run()
    assert engine.scheduler.preemptions > 0
    for i, sequence in enumerate(sequences):
        assert engine.drawn(sequence) == fake_native.expected([i] * 6, 20, apart=apart)
    assert engine.pool.available == 8


def test_the_youngest_is_preempted() -> None:
    engine = Engine(pages=8)
    old, young = engine.add([1] * 12, 12), engine.add([2] * 12, 12)
    while not engine.scheduler.preemptions:
        engine.step()
    assert engine.scheduler.running == [old] and list(engine.scheduler.waiting) == [young]
    engine.run()


def test_the_preempted_comes_before_the_waiting() -> None:
    engine = Engine(pages=8, max_batch=2)
    engine.add([1] * 12, 12)
    young, waiting = engine.add([2] * 12, 12), engine.add([3] * 12, 12)
    while not engine.scheduler.preemptions:
        engine.step()
    assert list(engine.scheduler.waiting) == [young, waiting]


def test_prefix_cache_saves_steps_and_changes_nothing() -> None:
    engine = Engine(step_tokens=64)
    prompt = list(range(22))
    first = engine.add(prompt, 5)
    engine.run()
    second, third = engine.add(prompt, 5), engine.add([*prompt[:9], 99], 5)
    batch = engine.step()
    assert [count for _, count in batch] == [22 - 20, 10 - 8]
    assert (second.cached, third.cached, first.cached) == (20, 8, 0)
    engine.run()
    assert engine.drawn(second) == engine.drawn(first) == fake_native.expected(prompt, 5)
    assert engine.drawn(third) == fake_native.expected([*prompt[:9], 99], 5)


def test_prompt_of_whole_cached_pages_still_runs_its_last_token() -> None:
    engine = Engine()
    prompt = list(range(8))
    engine.add(prompt, 1)
    engine.run()
    again = engine.add(prompt, 3)
    engine.run()
    assert again.cached == 4 and engine.drawn(again) == fake_native.expected(prompt, 3)


def test_answer_is_cached_for_the_next_turn() -> None:
    engine = Engine()
    first = engine.add([1, 2, 3], 10)
    engine.run()
    turn = engine.add([*first.tokens, 7], 2)
    engine.run()
    assert turn.cached == 12 and engine.drawn(turn) == fake_native.expected([*first.tokens, 7], 2)


def test_answer_is_read_again_where_decoding_leaves_other_values() -> None:
    engine = Engine(apart=True)
    first = engine.add([1, 2, 3, 4, 5], 10)
    engine.run()
    turn = engine.add([*first.tokens, 7], 2)
    engine.run()
    assert turn.cached == 4 and engine.drawn(turn) == fake_native.expected([*first.tokens, 7], 2, apart=True)


def test_cancelled_sequences_leave() -> None:
    engine = Engine(max_batch=1)
    running, waiting = engine.add([1] * 9, 50), engine.add([2], 3)
    engine.step()
    running.cancelled = True
    assert engine.scheduler.drop_cancelled() == [running]
    assert engine.pool.used == 0
    engine.run()
    assert engine.drawn(waiting) == fake_native.expected([2], 3)


@pytest.mark.parametrize("seed", range(30))
def test_any_mixture_draws_what_each_would_alone(seed: int) -> None:
    rng = random.Random(seed)
    pages = rng.randrange(6, 30)
    apart = seed % 2 == 1
    engine = Engine(pages=pages, max_batch=rng.randrange(1, 6), step_tokens=rng.choice([1, 3, 16, 64]), apart=apart)
    stem = [rng.randrange(300) for _ in range(PAGE * pages // 2)]
    sequences: list[tuple[Sequence, list[int], int]] = []
    for _ in range(12):
        prompt = stem[: rng.randrange(len(stem))] + [rng.randrange(300) for _ in range(rng.randrange(1, 6))]
        count = rng.randrange(1, PAGE * pages - len(prompt) + 1)
        sequences.append((engine.add(prompt, count), prompt, count))
        for _ in range(rng.randrange(6)):
            engine.step()
        if rng.random() < 0.2:
            sequences[-1][0].cancelled = True
            engine.scheduler.drop_cancelled()
    engine.run()
    for sequence, prompt, count in sequences:
        if not sequence.cancelled:
            assert engine.drawn(sequence) == fake_native.expected(prompt, count, apart=apart)
    assert engine.pool.used == 0
