"""From the engine's thread to a client: pieces cross into the event loop, and leave it as server-sent events.

Nothing here ever blocks the engine: it appends to a list and, once a step, wakes the loop. A client that reads slowly
finds the tokens it has not read yet merged into fewer, longer chunks; a client that leaves has its jobs cancelled.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from halfturn.server.errors import ApiError, internal_error

if TYPE_CHECKING:
    from halfturn.generator import Job, Piece

logger = logging.getLogger("halfturn.server")
DONE = "data: [DONE]\n\n"
SLICE = 1 << 15  # characters of an answer that are made at a time


class Feed:
    """The pieces of one HTTP request's jobs, in the event loop. Choice i is jobs[i]."""

    def __init__(self, choices: int, whole: bool, close: Callable[[Feed], None]) -> None:
        self.choices = choices
        self.whole = whole  # wake only for the last piece of each job: nobody reads the others
        self.jobs: list[Job] = []
        self.unfinished = choices
        self.ended = False  # every job has ended, and every piece was taken
        self.gone = False  # the client left
        self._close = close
        self._pieces: list[tuple[int, Piece]] = []
        self._news = asyncio.Event()

    def add(self, index: int, piece: Piece) -> None:
        self._pieces.append((index, piece))
        self.unfinished -= piece.finish_reason is not None
        self._news.set()

    async def take(self) -> list[tuple[int, Piece]]:
        """Everything that arrived since the last call, at least one piece; [] once the client has left."""
        await self._news.wait()
        self._news.clear()
        taken, self._pieces = self._pieces, []
        self.ended = self.unfinished == 0
        return [] if self.gone else taken

    async def finished(self) -> bool:
        """Waits until every job has ended; False if the client left before."""
        while not (self.ended or self.gone):
            await self.take()
        return not self.gone

    def cancel(self) -> None:
        """Its jobs end with the step that runs now."""
        for job in self.jobs:
            job.cancel()

    def leave(self) -> None:
        """The client is gone."""
        self.gone = True
        self.close()
        self._news.set()

    def close(self) -> None:
        """The answer is sent, or nobody reads on: no job is left running."""
        self.cancel()
        self._close(self)


class Bridge:
    """Carries pieces from the engine's thread to the feeds. One wake-up of the loop serves all requests of a step."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._feeds: set[Feed] = set()
        self._pieces: deque[tuple[Feed, int, Piece]] = deque()
        self._waking = False
        self.closing = False  # the server is shutting down

    def open(self, choices: int, whole: bool) -> Feed:
        feed = Feed(choices, whole, self._feeds.discard)
        self._feeds.add(feed)
        return feed

    @property
    def unsent(self) -> int:
        """Choices of requests that run, wait, or whose client has not read the answer yet: all that take memory."""
        return sum(feed.choices for feed in self._feeds)

    def cancel_all(self) -> None:
        for feed in self._feeds:
            feed.cancel()

    def listener(self, feed: Feed, index: int) -> Callable[[Piece], None]:
        """What the generator calls, in its own thread, with each piece of a job."""

        def post(piece: Piece) -> None:
            if feed.whole and piece.finish_reason is None:
                return
            self._pieces.append((feed, index, piece))
            if not self._waking:
                self._waking = True
                try:
                    self._loop.call_soon_threadsafe(self._deliver)
                except RuntimeError:  # the loop has been closed: the server is down and nobody reads any more
                    self._pieces.clear()

        return post

    def _deliver(self) -> None:
        # Lowered before the pieces are taken: one that is posted meanwhile is taken here, or wakes the loop again.
        self._waking = False
        while self._pieces:
            feed, index, piece = self._pieces.popleft()
            feed.add(index, piece)


@asynccontextmanager
async def watched(feed: Feed, receive: Receive) -> AsyncIterator[None]:
    """While the block runs, a client that disconnects ends the feed. However the block ends, no job is left running."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        feed.leave()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        feed.close()


dumps = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def pieces(value: Any) -> Iterator[str]:
    """JSON of a value, with iterators as arrays: an entry at a time, each made when it is asked for."""
    if isinstance(value, Iterator):
        yield "["
        for index, entry in enumerate(value):
            if index:
                yield ","
            yield from pieces(entry)
        yield "]"
    elif _has_iterators(value):
        for index, (name, entry) in enumerate(value.items()):
            yield f"{',' if index else '{'}{dumps(name)}:"
            yield from pieces(entry)
        yield "}"
    else:
        yield dumps(value)


def _has_iterators(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_iterators, value.values()))
    return isinstance(value, Iterator)


async def sliced(texts: Iterable[str]) -> AsyncIterator[bytes]:
    """The texts in slices that take a few milliseconds to make; after each, the loop turns to other clients."""
    gathered: list[str] = []
    size = 0
    for text in texts:
        gathered.append(text)
        size += len(text)
        if size >= SLICE:
            yield "".join(gathered).encode()
            gathered, size = [], 0
            await asyncio.sleep(0)
    if gathered:
        yield "".join(gathered).encode()


def event(data: dict[str, Any]) -> str:
    """One server-sent event. JSON has no raw line break, so one data line is enough."""
    return f"data: {dumps(data)}\n\n"


class WholeAnswer(Response):
    """An answer in one piece, once every job has ended: `make` gives it as `pieces` takes it."""

    media_type = "application/json"

    def __init__(self, feed: Feed, make: Callable[[], dict[str, Any]]) -> None:
        self.feed, self.make = feed, make
        self.status_code = 200
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with watched(self.feed, receive):
            if not await self.feed.finished():
                return
            parts: deque[bytes] = deque()
            async for part in sliced(pieces(self.make())):
                parts.append(part)
                if self.feed.gone:
                    return
            self.feed.jobs.clear()  # log probabilities take much more memory than their text
            self.init_headers({"content-length": str(sum(map(len, parts)))})
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            # In parts: uvicorn takes the next one when the client has read most of those before.
            while parts and not self.feed.gone:
                await send({"type": "http.response.body", "body": parts.popleft(), "more_body": bool(parts)})


class EventStream(Response):
    """The body of a streamed answer: `chunks` turns what the feed delivered into events, until every job has ended."""

    media_type = "text/event-stream"

    def __init__(self, feed: Feed, chunks: Callable[[list[tuple[int, Piece]]], Iterable[dict[str, Any]]]) -> None:
        self.feed, self.chunks = feed, chunks
        self.status_code = 200
        self.background = None
        self.ended = False
        # A proxy must pass events on at once.
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with watched(self.feed, receive):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            while not self.ended:
                async for part in sliced(self._events(await self.feed.take())):
                    if self.feed.gone:
                        return
                    await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _events(self, taken: list[tuple[int, Piece]]) -> Iterator[str]:
        """The last one of all is DONE or an error: the status line is out, so that has no other place."""
        self.ended = self.feed.ended or self.feed.gone
        try:
            yield from map(event, self.chunks(taken))
            if self.ended:
                yield DONE
        except ApiError as error:
            self.ended = True
            yield event(error.body())
        except Exception:
            logger.exception("a streamed answer failed")
            self.ended = True
            yield event(internal_error().body())
