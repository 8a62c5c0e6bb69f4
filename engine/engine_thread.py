"""The thread that runs native steps: requests come in through an inbox, pieces leave through each request's channel."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

from halfturn.answer import Answer
from halfturn.error import Error
from halfturn.job import FORKED
from halfturn.pages import PagePool
from halfturn.scheduler import Scheduler, Sequence

CLOSED = "the generator is closed; make a new one with Generator(model)"


class EngineThread:
    """Owns the native model's steps. submit(), cancel() and close() may be called from any thread.

    Where the device works by itself (native.overlap_rows), the next step begins before the tokens of this one are
    known, and what they mean for text and requests is worked out meanwhile. A request that has ended by then has taken
    part in one step too many, whose token is thrown away: it was drawn from the request's own pages.
    The inbox is a SimpleQueue because its put() is safe in a destructor, and jobs are cancelled when they are dropped.
    Text is made here too: it takes about 2 us a token, less than waking another thread.
    """

    def __init__(
        self, native: Any, backend: Any, max_batch: int, step_tokens: int, at_end: Callable[[], None] = lambda: None
    ) -> None:
        self._native, self._backend, self._at_end = native, backend, at_end
        self._process = os.getpid()
        self.pool = PagePool(native.pages, native.page_size)
        self.scheduler = Scheduler(self.pool, max_batch, step_tokens, native.decodes_apart)
        self._inbox: SimpleQueue[Sequence | None] = SimpleQueue()
        self._closing = False
        self._dead: Error | None = None
        self._under_way: list[Sequence] | None = None  # whose next tokens a step that was started draws
        self.steps = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run_to_end, name="halfturn-engine", daemon=True)
        self._thread.start()

    @property
    def dead(self) -> Error | None:
        """Why the thread has ended, or None while it runs."""
        return self._dead if self._process == os.getpid() else Error(FORKED)

    def submit(self, sequence: Sequence) -> None:
        """Queues a sequence whose owner is an Answer."""
        if self.dead is not None:
            raise self.dead
        self._inbox.put(sequence)
        if self._dead is not None:  # it ended meanwhile, and may have emptied its inbox before our put
            self._empty_inbox()

    def cancel(self, sequence: Sequence) -> None:
        """Makes a sequence leave before the next step."""
        sequence.cancelled = True
        self._inbox.put(None)  # wakes the thread if it sleeps

    def close(self) -> None:
        """Cancels everything and ends the thread."""
        self._closing = True
        self._inbox.put(None)
        if threading.current_thread() is not self._thread and self._process == os.getpid():
            self._ended.wait()  # a join() that Ctrl-C has interrupted makes later ones return at once
            self._thread.join()

    def _run_to_end(self) -> None:
        try:
            self._run()
        finally:
            self._ended.set()

    def _run(self) -> None:
        reason = Error(CLOSED)
        try:
            while not self._closing:
                self._receive()
                if self._under_way is not None or not self._step():
                    self._finish_step()
        except BaseException as error:  # whatever it was: nobody may wait for ever
            reason = Error(f"the engine thread has ended: {type(error).__name__}: {error}; make a new Generator")
            reason.__cause__ = error
        self._drop_steps()
        self._dead = reason
        self._at_end()  # no step follows
        for sequence in list(self.scheduler):
            with contextlib.suppress(BaseException):  # one that can't end must not keep the others
                self._abandon(sequence)
                self.scheduler.finish(sequence)
        self._empty_inbox()

    def _abandon(self, sequence: Sequence) -> None:
        """Ends a request whose thread has ended."""
        sequence.owner.finish("cancelled" if self._closing else "error", error=None if self._closing else self._dead)

    def _empty_inbox(self) -> None:
        while True:
            try:
                sequence = self._inbox.get_nowait()
            except Empty:
                return
            if sequence is not None:
                self._abandon(sequence)

    def _receive(self) -> None:
        """Takes in what has arrived; sleeps if there is nothing to do."""
        scheduler, inbox = self.scheduler, self._inbox
        asleep = not scheduler.running and not scheduler.waiting and self._under_way is None
        woken = False
        while asleep or not inbox.empty():
            sequence = inbox.get()
            asleep = False
            if sequence is None:
                woken = True
            else:
                scheduler.add(sequence)
                woken = woken or sequence.cancelled
        if woken:
            for sequence in scheduler.drop_cancelled():
                sequence.owner.finish("cancelled")

    def _step(self) -> bool:
        """Runs the next step, if there is one. False: it was only started, and _finish_step() is to follow."""
        batch = self.scheduler.schedule()
        if not batch:
            return True
        self.steps += 1
        items = [self._item(sequence, count) for sequence, count in batch]
        try:
            if len(batch) <= self._native.overlap_rows and all(decodes(sequence) for sequence, _ in batch):
                self._native.start(items)
                self._under_way = [sequence for sequence, _ in batch]
                return False
            samples = self._native.step(items)
        except Exception as error:
            self._step_alone(batch, items, error)
            return True
        for (sequence, count), sample in zip(batch, samples, strict=True):
            self._take(sequence, count, sample)
        return True

    def _finish_step(self) -> None:
        """Starts the step after the one under way where that can be done, and takes in what the latter draws."""
        sequences = self._under_way
        assert sequences is not None
        following = self._start_ahead(sequences)
        try:
            samples = self._native.finish()
        except Exception as error:
            self._drop_steps()
            alive = [(s, 1) for s in sequences if not s.owner.finished]
            self._step_alone(alive, [self._item(sequence, 1) for sequence, _ in alive], error)
            return
        self._under_way = following
        for sequence, sample in zip(sequences, samples, strict=True):
            if not sequence.owner.finished:
                self._take(sequence, 1, sample)

    def _start_ahead(self, sequences: list[Sequence]) -> list[Sequence] | None:
        """Begins the step after that of `sequences`, or None: it depends on their tokens, or someone may join them."""
        scheduler = self.scheduler
        if not self._inbox.empty() or scheduler.may_admit:
            return None
        following = [s for s in sequences if s.owner.goes_on(len(s.owner.token_ids) + 1)]
        if not following or not all(foreseen(s) for s in following) or not scheduler.reserve(following, 1):
            return None
        items = [self._backend.Item([], s.computed + 1, s.pages, s.sampler, False) for s in following]
        try:
            self._native.start(items)
        except Exception:  # it comes again when the same step is tried without haste, and is reported there
            return None
        self.steps += 1
        return following

    def _drop_steps(self) -> None:
        """Waits for what is under way, two steps at most, and whose tokens nobody wants any more."""
        if self._under_way is not None:
            self._under_way = None
            for _ in range(2):
                with contextlib.suppress(Exception):  # also where there is none
                    self._native.finish()

    def _item(self, sequence: Sequence, count: int) -> Any:
        start = sequence.computed
        end = start + count
        if sequence.owner.started is None:
            sequence.owner.started = time.perf_counter()
            sequence.owner.cached = sequence.cached
        sampler = sequence.sampler if end == len(sequence.tokens) else None
        return self._backend.Item(sequence.tokens[start:end], start, sequence.pages, sampler, sequence.in_prompt)

    def _step_alone(self, batch: list[tuple[Sequence, int]], items: list[Any], error: Exception) -> None:
        """A step failed: each request runs by itself, so that only those fail that can't run."""
        for (sequence, count), item in zip(batch, items):
            try:
                if len(batch) == 1:
                    raise error
                sample = self._native.step([item])[0]
            except Exception as failure:
                self._fail(sequence, failure)
            else:
                self._take(sequence, count, sample)

    def _take(self, sequence: Sequence, count: int, sample: Any) -> None:
        """What a step gave one sequence: nothing, a token, or a sentence saying why there is none."""
        if isinstance(sample, str):
            self._fail(sequence, Error(sample))
        else:
            self._took(sequence, count, sample)

    def _took(self, sequence: Sequence, count: int, sample: Any) -> None:
        """Records one sequence's part of a step, and passes its token on."""
        self.scheduler.advance(sequence, count)
        if sample is None:
            return
        sequence.tokens.append(sample.token)
        answer: Answer = sequence.owner
        try:
            ended = answer.accept(sample)
            drawn = len(answer.token_ids)
            if not ended and drawn == answer.min_tokens:
                sequence.sampler.ban(answer.banned_later)
        except Exception as error:
            self._fail(sequence, error)
            return
        if ended:
            self.scheduler.finish(sequence)

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        failure = error if isinstance(error, Error) else Error(f"the request failed: {type(error).__name__}: {error}")
        self.scheduler.finish(sequence)
        sequence.owner.finish("error", error=failure)


def decodes(sequence: Sequence) -> bool:
    """Whether its prompt is done and one token of its own is next."""
    return not sequence.in_prompt and len(sequence.tokens) - sequence.computed == 1


def foreseen(sequence: Sequence) -> bool:
    """Whether its token after next can be drawn in ignorance of the next one, but for that token itself."""
    return not sequence.sampler.remembers and len(sequence.owner.token_ids) >= sequence.owner.min_tokens
