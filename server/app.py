"""The server as a program: the application, its socket, its signals, its one line when it is ready."""

from __future__ import annotations

import asyncio
import copy
import hmac
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

import halfturn
from halfturn.error import Error
from halfturn.server.connections import BACKLOG, Connection, Patience, most_connections
from halfturn.server.errors import ApiError, from_http, internal_error
from halfturn.server.routes import Service, router
from halfturn.server.stream import Bridge

if TYPE_CHECKING:
    from halfturn.generator import Generator


@dataclass(frozen=True)
class Settings:
    """How the server behaves towards its clients."""

    name: str = ""  # of the model, in the API; serve() takes its folder's where there is none
    api_key: str | None = None  # clients must send it as a bearer token
    cors_origins: tuple[str, ...] = ()  # web pages that may use the server; "*" is all of them
    max_waiting: int = 256  # choices that may wait beyond those that run
    max_body_bytes: int = 16 << 20
    grace_seconds: float = 10.0  # for running requests when the server is asked to stop
    access_log: bool = False
    patience: Patience = field(default_factory=Patience)


def create_app(generator: Generator, settings: Settings) -> FastAPI:
    """The ASGI application. It does not close the generator."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.service = Service(
            generator=generator,
            name=settings.name,
            bridge=Bridge(asyncio.get_running_loop()),
            fingerprint=f"halfturn-{halfturn.__version__}",
            created=int(time.time()),
            max_waiting=settings.max_waiting,
            max_body_bytes=settings.max_body_bytes,
        )
        yield

    # The pages at /docs would load scripts from a public network.
    app = FastAPI(title="Halfturn", version=halfturn.__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.include_router(router)
    if settings.api_key is not None:
        app.add_middleware(KeyCheck, key=settings.api_key)
    if settings.cors_origins:
        # Added last, so it comes first: a browser's preflight request carries no key.
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.cors_origins), allow_methods=["*"], allow_headers=["*"]
        )

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return error.response({"Retry-After": "1"} if error.status == 503 else None)

    @app.exception_handler(HTTPException)
    async def not_found(request: Request, error: HTTPException) -> Response:
        return from_http(error, request).response(dict(error.headers or {}))

    @app.exception_handler(ClientDisconnect)
    async def left(*_: Any) -> Response:
        return Response(status_code=499)  # while it sent its body; nobody reads this

    @app.exception_handler(Exception)
    async def failed(*_: Any) -> Response:
        # Starlette passes the exception on to uvicorn, which logs it and then closes the connection.
        return internal_error().response({"Connection": "close"})

    return app


class KeyCheck:
    """Refuses every request without the key. Only /health stays open: it tells counts only."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app = app
        self.expected = key.strip().encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/health":
            scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self.expected):
                message = "the API key is missing or wrong; send it as `Authorization: Bearer KEY`"
                refusal = ApiError(message, code="invalid_api_key", status=401)
                await refusal.response({"WWW-Authenticate": "Bearer"})(scope, receive, send)
                return
        await self.app(scope, receive, send)


def _log_config() -> dict[str, Any]:
    """uvicorn's, with the access log on stderr too: stdout is for what was asked for."""
    config = copy.deepcopy(uvicorn.config.LOGGING_CONFIG)
    config["handlers"]["access"]["stream"] = "ext://sys.stderr"
    return config


class Server(uvicorn.Server):
    """uvicorn, with a line when it is ready, an end to connections that stand still, and one to requests that outlast
    the grace period."""

    TICK = 0.25  # seconds between two looks at all connections
    LEAVING = Patience(head=1, body=1, reader=3, idle=1)  # when the server is asked to stop

    def __init__(self, app: FastAPI, settings: Settings, ready: Callable[[], None]) -> None:
        config = uvicorn.Config(
            app,
            log_level="info" if settings.access_log else "warning",
            access_log=settings.access_log,
            log_config=_log_config(),
            http=Connection,
            backlog=BACKLOG,
            timeout_keep_alive=60,
            server_header=False,
            ws="none",
        )
        super().__init__(config)
        self.app, self.settings, self.ready = app, settings, ready
        self.patience = settings.patience
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        Connection.most = most_connections()
        await super().startup(sockets=sockets)
        for listener in sockets or ():
            listener.listen(128)  # asyncio's backlog is that of the kernel too, where a burst of clients would be lost
        self._loop = asyncio.get_running_loop()
        self._tending = asyncio.create_task(self._tend())
        self.ready()

    async def _tend(self) -> None:
        while True:
            for connection in self._connections():
                connection.tend(self.TICK, self.patience)
            await asyncio.sleep(self.TICK)

    def _connections(self) -> list[Connection]:
        return [c for c in self.server_state.connections if isinstance(c, Connection)]

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal lets running requests finish, a second one cancels them."""
        if self.should_exit and self._loop is not None:
            self._loop.call_soon_threadsafe(self._end)
        else:
            super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        bridge: Bridge = self.app.state.service.bridge
        bridge.closing = True
        grace = self.settings.grace_seconds
        if bridge.unsent:
            answers = f"{bridge.unsent} answer{'s' * (bridge.unsent > 1)}"
            note = f"finishing {answers} for up to {grace:g} s; another Ctrl-C ends at once"
            print(note, file=sys.stderr, flush=True)
        asyncio.get_running_loop().call_later(grace, self._end)
        self.patience = self.LEAVING
        for connection in self._connections():
            connection.still = 0.0
        await super().shutdown(sockets=sockets)
        self._tending.cancel()

    def _end(self) -> None:
        """Cancels what runs: clients are told. Those that don't read are cut off a little later."""
        self.app.state.service.bridge.cancel_all()
        asyncio.get_running_loop().call_later(1.0, self._cut)

    def _cut(self) -> None:
        for connection in self._connections():
            connection.transport.abort()


def announce(url: str, name: str) -> None:
    print(f"Halfturn serves {name} at {url}/v1 (Ctrl-C stops it)", flush=True)


def serve(
    model_path: str | Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    settings: Settings | None = None,
    *,
    max_batch: int = 32,
    on_ready: Callable[[str, str], None] = announce,
    **options: Any,
) -> None:
    """Loads a model and serves it until SIGINT or SIGTERM.

    `on_ready(url, name)` is called once requests are answered; by default a line is printed. `options` go to
    Model.load. Raises Error if the address can't be had or the model can't be loaded.
    """
    from halfturn.generator import Generator
    from halfturn.model import Model

    settings = settings or Settings()
    name = settings.name or Path(os.path.abspath(model_path)).name  # resolve() would give the name that a link hides
    if name != name.encode(errors="replace").decode():
        raise Error("the model's name is not UTF-8 text, so no answer could carry it: give another one with --name")
    with bind(host, port) as listener:  # before the model is loaded: a port in use is told at once
        model = Model.load(model_path, **options)
        model.tokenizer.encode("")  # read now: a folder without one fails before it is announced
        with Generator(model, max_batch=max_batch) as generator:
            run(generator, replace(settings, name=name), listener, on_ready)


def run(
    generator: Generator,
    settings: Settings,
    listener: socket.socket,
    on_ready: Callable[[str, str], None] = announce,
) -> None:
    """Serves on a bound socket until SIGINT or SIGTERM."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    server = Server(create_app(generator, settings), settings, lambda: on_ready(address(listener), settings.name))
    try:
        with _quiet_signals(server):
            server.run(sockets=[listener])
    except OSError as error:
        raise Error(f"can't listen at {address(listener)}: {error.strerror or error}") from error


@contextmanager
def _quiet_signals(server: uvicorn.Server) -> Iterator[None]:
    """uvicorn raises the signal that stopped it once more when it is done, which would end the process by that signal;
    with these handlers around it, a server that was asked to stop returns instead. They also catch an early signal."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.signal(s, server.handle_exit) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def bind(host: str, port: int) -> socket.socket:
    """A bound TCP socket; port 0 takes a free one. Raises Error with a sentence if it can't be had."""
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, OverflowError) as error:
        raise Error(f"the host {host!r} with port {port} is not an address: {error}") from error
    listener = socket.socket(family, kind, protocol)
    try:
        # A server that has just ended leaves connections behind, which must not keep the next one from starting.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Every connection's. The kernel would hold megabytes of an answer and take more only when a third of it is
        # read, so that a slow reader would look like one that does not read.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        listener.bind(target)
        listener.listen()  # two programs may bind a port that none listens on; who comes now waits for the model
        return listener
    except OSError as error:
        listener.close()
        if error.errno in (98, 48, 10048):  # EADDRINUSE of Linux, macOS, Windows
            raise Error(f"port {port} of {host} is in use: stop the other program, or choose another --port") from error
        raise Error(f"can't listen on port {port} of {host}: {error.strerror}") from error


def address(listener: socket.socket) -> str:
    """http://HOST:PORT of a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
