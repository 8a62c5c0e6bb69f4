"""A request as its owner sees it: pieces of text as they come, and the whole output at the end."""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Literal

from halfturn.error import Error

FORKED = "this was begun by the process that this one was forked from: load the model in this process"

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural log probabilities of one drawn token under the raw logits, and of the likeliest tokens, best first."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Piece:
    """New text and the tokens behind it. The text is never half a character and never part of a stop string.

    `text` may be empty in the last piece; `finish_reason` is set in the last piece only.
    """

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds since submit(), and the speed of decoding."""

    queue_s: float  # until the first native step with this request began
    time_to_first_token_s: float | None  # None: no token was drawn
    total_s: float
    decode_tokens_per_second: float | None  # tokens after the first over their time; None for fewer than 2 tokens
    cached_prompt_tokens: int  # prompt tokens found in the prefix cache


@dataclass(frozen=True, slots=True)
class Output:
    """A finished request. `token_ids` are all tokens drawn, those of the stop or end of text included."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    logprobs: list[TokenLogprob] | None
    stop_reason: str | int | None  # the stop string, or the id of the stop or end-of-text token, that ended it
    timings: Timings


class Channel:
    """Carries pieces and the end from the engine thread to the job's owner."""

    def __init__(self, prompt_tokens: int, on_piece: Callable[[Piece], None] | None = None) -> None:
        self.prompt_tokens = prompt_tokens
        self.on_piece = on_piece
        self.iterable = on_piece is None
        self.pieces: SimpleQueue[Piece] = SimpleQueue()
        self.done = threading.Event()
        self.closing = threading.RLock()  # held from there until the last piece is delivered
        self.output: Output | None = None
        self.error: Error | None = None
        self.listener: Callable[[], None] | None = None

    def send(self, piece: Piece) -> None:
        """Engine side: one more piece."""
        on_piece, listener = self.on_piece, self.listener
        if on_piece is not None:
            try:
                on_piece(piece)
            except BaseException as error:  # sys.exit() too: other requests share this thread
                self.on_piece = None  # it gets no more
                raise Error(f"on_piece failed: {type(error).__name__}: {error}") from error
            return
        self.pieces.put(piece)
        if listener is not None:
            listener()

    def close(self, last: Piece, output: Output, error: Error | None) -> None:
        """Engine side: the last piece and the whole output. What its reader raises is no concern of other requests."""
        with self.closing:
            self.output, self.error = output, error
            self.done.set()
            try:
                self.send(last)
            except Error as failure:
                self.error = self.error or failure


class Job:
    """A submitted request: iterate its pieces (also with `async for`), or wait for `result()`.

    A job that is dropped, or whose iteration is left early, is cancelled: it leaves the batch within one step.
    Pieces are delivered once: iterate a job in one place only. `result()` may be called in any thread, at any time.
    """

    def __init__(self, channel: Channel, cancel: Callable[[], None]) -> None:
        self._channel = channel
        self._cancel = cancel
        self._exhausted = False
        self._process = os.getpid()

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens of the prompt, chat template and BOS included."""
        return self._channel.prompt_tokens

    @property
    def done(self) -> bool:
        """True once the request has finished, for whatever reason."""
        return self._channel.done.is_set()

    def cancel(self) -> None:
        """Stops the request within one step; what was generated so far stays available."""
        if not self._channel.done.is_set():
            self._cancel()

    def result(self, timeout: float | None = None) -> Output:
        """Waits for the end. Raises Error where the engine failed, TimeoutError after `timeout` seconds."""
        self._check_process()
        try:
            finished = self._channel.done.wait(timeout)
        except BaseException:  # Ctrl-C while waiting
            self.cancel()
            raise
        if not finished:
            raise TimeoutError(f"the request has not finished after {timeout} s; cancel() it or wait longer")
        with self._channel.closing:
            error = self._channel.error
        if error is not None:
            raise error
        assert self._channel.output is not None
        return self._channel.output

    def __iter__(self) -> Iterator[Piece]:
        """Pieces until one has a finish_reason. After an engine failure Error follows the piece that says "error"."""
        self._check_iterable()
        try:
            while not self._exhausted:
                yield self._received(self._channel.pieces.get())
            if self._channel.error is not None:
                raise self._channel.error
        finally:
            self.cancel()

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """The same for asyncio: waiting does not block the event loop."""
        import asyncio  # 15 ms that only servers need

        self._check_iterable()
        loop, ready = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            try:
                loop.call_soon_threadsafe(ready.set)
            except RuntimeError:  # the loop is closed: nobody waits
                self.cancel()

        self._channel.listener = wake
        try:
            while not self._exhausted:
                ready.clear()
                try:
                    piece = self._channel.pieces.get_nowait()
                except Empty:
                    await ready.wait()
                    continue
                yield self._received(piece)
            if self._channel.error is not None:
                raise self._channel.error
        finally:
            self._channel.listener = None
            self.cancel()

    def _check_process(self) -> None:
        if self._process != os.getpid():
            raise Error(FORKED)

    def _check_iterable(self) -> None:
        self._check_process()
        if not self._channel.iterable:
            raise Error("this job's pieces go to on_piece: wait for result(), or submit it without on_piece")

    def _received(self, piece: Piece) -> Piece:
        self._exhausted = piece.finish_reason is not None
        return piece

    def __del__(self) -> None:
        self.cancel()
