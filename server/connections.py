"""The server's connections: how many there may be, and an end to those that stand still."""

from __future__ import annotations

import asyncio
import math
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

BACKLOG = 16  # connections that asyncio accepts in one turn of its loop, before it looks at any of them


@dataclass(frozen=True)
class Patience:
    """Seconds that a client may take."""

    head: float = 10.0  # for a request up to its body
    body: float = 60.0  # for the whole body
    reader: float = 60.0  # without reading anything of what is there for it
    idle: float = math.inf  # between two requests, beside uvicorn's own limit


class Connection(H11Protocol):
    """uvicorn's, which by itself waits without end for a request that never becomes whole and for a client that never
    reads. Of more connections than `most`, the one that has waited longest for a request is closed."""

    most = 1000
    still = 0.0  # seconds for which nothing has changed
    _seen: tuple[Any, ...] = ()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.made = self.loop.time()
        if len(self.connections) > self.most:
            waiting = [c for c in self.connections if isinstance(c, Connection) and c.expects_request]
            max(waiting, key=lambda c: (c.still, -c.made)).transport.abort()

    @property
    def expects_request(self) -> bool:
        return self.conn.their_state in (h11.IDLE, h11.SEND_BODY) and not self.transport.is_closing()

    def tend(self, seconds: float, patience: Patience) -> None:
        """Called every `seconds`, which are counted here rather than read from a clock: a loop that was busy itself
        has left its clients no time."""
        state, unsent = self.conn.their_state, self.transport.get_write_buffer_size()
        idle = self.timeout_keep_alive_task is not None  # between two requests: uvicorn's own timer runs
        seen = (self.cycle, state, unsent, idle)
        self.still = self.still + seconds if seen == self._seen else 0.0
        self._seen = seen
        if unsent:
            limit = patience.reader
        elif idle:
            limit = patience.idle
        else:
            limit = {h11.IDLE: patience.head, h11.SEND_BODY: patience.body}.get(state, math.inf)
        if self.still >= limit:
            self.transport.abort()


def most_connections() -> int:
    """How many connections the process has descriptors for, after it has asked for all that it may have."""
    try:
        import resource
    except ImportError:
        return 400  # Windows: select() takes 512 sockets
    with suppress(OSError, ValueError):
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if allowed == resource.RLIM_INFINITY or allowed > 10_000:
        allowed = 10_000
    # Some are accepted before others are closed, and files and the loop itself need a few.
    return max(8, allowed - 4 * BACKLOG - 32)
