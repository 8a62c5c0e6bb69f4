"""A real uvicorn server on a thread of the test process, over any model."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

import fake_native
from halfturn.generator import Generator
from halfturn.server.app import Server, Settings, address, bind, create_app

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]


@dataclass
class Live:
    url: str
    generator: Generator
    server: Server
    http: httpx.Client  # one for all: each makes a TLS context, which takes longer than a request

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.http.post(path, json=body, **options)

    def error(self, path: str, body: Any, **options: Any) -> tuple[int, str | None, str]:
        """Status, param and message of a refusal, whose shape is checked."""
        response = self.post(path, body, **options)
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"]
        return response.status_code, error["param"], error["message"]

    def stats(self) -> dict[str, Any]:
        stats: dict[str, Any] = self.http.get("/health").json()
        return stats

    def wait(self, condition: Callable[[dict[str, Any]], bool], seconds: float = 10) -> dict[str, Any]:
        """The first health report that meets the condition."""
        end = time.monotonic() + seconds
        while not condition(stats := self.stats()):
            assert time.monotonic() < end, stats
            time.sleep(0.005)
        return stats


@contextmanager
def live(model: Any, max_batch: int = 32, send_buffer: int | None = None, **settings: Any) -> Iterator[Live]:
    """Serves `model` as "test" for the length of the block; `send_buffer` bytes for each connection's socket."""
    listener = bind("127.0.0.1", 0)
    if send_buffer:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    ready = threading.Event()
    with Generator(model, max_batch=max_batch) as generator:
        chosen = Settings(**({"name": "test", "grace_seconds": 0} | settings))
        server = Server(create_app(generator, chosen), chosen, ready.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        url = address(listener)
        thread.start()
        try:
            assert ready.wait(10)
            with httpx.Client(base_url=url, timeout=30) as http:
                yield Live(url, generator, server, http)
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "test", "messages": HI, **fields}


def text(**fields: Any) -> dict[str, Any]:
    return {"model": "test", "prompt": "hi", **fields}


def events(body: str) -> list[Any]:
    lines = [block.removeprefix("data: ") for block in body.split("\n\n") if block]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def endless(folder: Path, count: int) -> Any:
    """A model that draws `count` tokens in no time."""
    model = fake_native.load(folder, context=count + 100, pages=100, script=lambda tokens, drawn: 33)
    model.native._write = lambda item: ([], [])  # the hash over all that was written would be quadratic
    return model


def knock(url: str, tokens: int, stream: bool = True, **fields: Any) -> socket.socket:
    """Asks for a completion over a plain socket with a small buffer, and reads nothing."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    host, port = url.removeprefix("http://").split(":")
    client.connect((host, int(port)))
    body = json.dumps(text(max_tokens=tokens, stream=stream, **fields)).encode()
    head = f"POST {TEXT} HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    client.sendall(head.encode() + body)
    return client
