"""Which tokens go into the next native step: continuous batching with chunked prefill over shared pages."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

from halfturn.pages import PagePool, page_digest


class Sequence:
    """The tokens of one request and where their keys and values are."""

    __slots__ = ("cached", "cancelled", "computed", "digests", "owner", "pages", "prompt_length", "sampler", "tokens")

    def __init__(self, tokens: list[int], sampler: Any, owner: Any = None) -> None:
        self.tokens = tokens  # the prompt, then what was drawn
        self.prompt_length = len(tokens)
        self.computed = 0  # tokens whose keys and values are in the cache
        self.cached = 0  # of those, tokens that came from the prefix cache when it was first admitted
        self.pages: list[int] = []
        self.digests: list[bytes] = []  # of its full pages, as far as they were needed
        self.sampler = sampler
        self.owner = owner
        self.cancelled = False

    @property
    def in_prompt(self) -> bool:
        """Whether its next token is one of the prompt."""
        return self.computed < self.prompt_length

    @property
    def next_part(self) -> int:
        """How many tokens can go into one step: those of the prompt, or those behind it."""
        return (self.prompt_length if self.in_prompt else len(self.tokens)) - self.computed


class Scheduler:
    """Requests wait in the order of their arrival, run together, and share `step_tokens` new tokens a step.

    Every running sequence that decodes gets its token first; what is left goes to prompts, oldest first. When the pages
    run out the youngest sequence gives up its own and starts again later, from its prompt and all that it has drawn:
    the same tokens follow, because a token depends on nothing but the tokens before it and its sampler's state.
    """

    def __init__(self, pool: PagePool, max_batch: int, step_tokens: int = 512, decodes_apart: bool = False) -> None:
        self.decodes_apart = decodes_apart  # drawn tokens leave other keys and values than the same ones in a prompt
        self.pool, self.max_batch, self.step_tokens = pool, max_batch, max(step_tokens, max_batch)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self.preemptions = 0
        self._stuck = False  # the oldest that waits didn't fit, and no page has become free since

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence. The caller has checked that its tokens fit the pool when it runs alone."""
        self.waiting.append(sequence)

    def drop_cancelled(self) -> list[Sequence]:
        """Takes out what was cancelled, and gives its pages back."""
        dropped = [s for s in self if s.cancelled]
        for sequence in dropped:
            self.finish(sequence)
        return dropped

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self.waiting

    def schedule(self) -> list[tuple[Sequence, int]]:
        """The next step: sequences, and how many of their tokens after `computed` to run. Empty: nothing to do."""
        self._grow_pages()
        # A sequence that decodes has one token to run; whoever has more is at its prompt, or starts again.
        counts = {id(s): 1 for s in self.running if len(s.tokens) - s.computed == 1}
        budget = self.step_tokens - len(counts)
        for sequence in self.running:
            if id(sequence) not in counts and budget > 0:
                budget -= counts.setdefault(id(sequence), min(sequence.next_part, budget))
        while self.waiting and budget > 0 and len(self.running) < self.max_batch and self._admit(self.waiting[0]):
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            budget -= counts.setdefault(id(sequence), min(sequence.next_part, budget))
        self._stuck = bool(self.waiting) and budget > 0
        return [(s, counts[id(s)]) for s in self.running if id(s) in counts]

    @property
    def may_admit(self) -> bool:
        """Whether the next schedule() may let someone in."""
        return bool(self.waiting) and len(self.running) < self.max_batch and not self._stuck

    def reserve(self, sequences: list[Sequence], tokens: int) -> bool:
        """Pages for `tokens` more tokens than each of these running sequences has; False: there are too few."""
        for sequence in sequences:
            missing = self.pool.needed(len(sequence.tokens) + tokens) - len(sequence.pages)
            if missing > 0:
                grown = self.pool.allocate(missing)
                if grown is None:
                    return False
                sequence.pages += grown
        return True

    def advance(self, sequence: Sequence, count: int) -> None:
        """Records that a step has written `count` more tokens, and offers the pages that became full."""
        size, before = self.pool.page_size, sequence.computed
        sequence.computed += count
        if sequence.computed // size > before // size:
            self._extend_digests(sequence, sequence.computed // size)
            for i in range(before // size, sequence.computed // size):
                self.pool.publish(sequence.pages[i], sequence.digests[i])

    def finish(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, and gives its pages back."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self._release(sequence)

    def _grow_pages(self) -> None:
        """One more page for each running sequence that has filled its own; the youngest makes room."""
        for sequence in list(self.running):
            while sequence.pages and len(sequence.pages) * self.pool.page_size < len(sequence.tokens):
                grown = self.pool.allocate(1)
                if grown is not None:
                    sequence.pages += grown
                else:
                    self._preempt(self.running[-1])

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.waiting.appendleft(sequence)
        self._release(sequence)
        self.preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.pages)
        self._stuck = False
        sequence.pages = []
        sequence.computed = 0

    def _admit(self, sequence: Sequence) -> bool:
        """Pages for all of its tokens, the prefix from the cache; False leaves it as it was."""
        size = self.pool.page_size
        # The last token always runs, as its logits are wanted; so a prefix ends at least one token before the end.
        shareable = (len(sequence.tokens) - 1) // size
        self._extend_digests(sequence, shareable)
        shared = self.pool.acquire(sequence.digests[:shareable])
        count = self.pool.needed(len(sequence.tokens)) - len(shared)
        # Each running sequence may want a page soon: without this reserve a newcomer would be preempted at once.
        reserve = len(self.running)
        fresh = self.pool.allocate(count) if self.pool.available >= count + reserve else None
        if fresh is None:
            self.pool.release(shared)
            return False
        sequence.pages = shared + fresh
        sequence.computed = len(shared) * size
        if len(sequence.tokens) == sequence.prompt_length:
            sequence.cached = sequence.computed
        return True

    def _extend_digests(self, sequence: Sequence, count: int) -> None:
        size, digests = self.pool.page_size, sequence.digests
        for i in range(len(digests), count):
            end = (i + 1) * size
            drawn = min(size, max(0, end - sequence.prompt_length)) if self.decodes_apart else 0
            digests.append(page_digest(digests[-1] if digests else b"", sequence.tokens[i * size : end], drawn))
