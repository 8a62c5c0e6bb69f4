"""Clients that send half a request, read slowly or not at all, or are too many; and the loop's turns between them."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest

import fake_native
from halfturn.server import app
from halfturn.server.connections import Connection, Patience, most_connections
from halfturn.server.stream import SLICE, dumps, pieces, sliced
from live_server import CHAT, TEXT, Live, chat, endless, knock, live, text
from waiting import until


def connect(server: Live, data: str = "") -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    client = socket.create_connection((host, int(port)), timeout=10)
    client.sendall(data.encode())
    return client


def closed(client: socket.socket) -> bool:
    """Waits for it, up to 10 s."""
    try:
        return client.recv(1) == b""
    except ConnectionError:
        return True


def head(length: int) -> str:
    return f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_is_being_read_is_sent_to_its_end(tmp_path: Path, stream: bool) -> None:
    """The server is asked to stop when nothing runs any more, and the reader takes three seconds."""
    with live(endless(tmp_path, 1000), send_buffer=4096, grace_seconds=20) as server:
        with knock(server.url, 1000, stream, n=8, logprobs=5) as client:
            answer = client.recv(4096)
            server.wait(lambda s: s["steps"] >= 1000 and s["running"] == 0)
            server.server.should_exit = True
            start = time.monotonic()
            while data := client.recv(1 << 18):
                answer += data
                time.sleep(max(0.0, min(0.02, start + 3 - time.monotonic())))
        assert len(answer) > 400_000
    body = answer.split(b"\r\n\r\n", 1)[1]
    if stream:
        assert body.endswith(b"data: [DONE]\n\n")
    else:
        assert len(json.loads(body)["choices"]) == 8


def test_requests_that_never_become_whole_are_closed(tmp_path: Path) -> None:
    """What runs is not, nor what waits for its next request."""
    model = fake_native.load(tmp_path, context=4000, pages=300, step_seconds=0.01, script=lambda tokens, drawn: 65)
    with live(model, patience=Patience(head=0.5, body=1.0, reader=60)) as server:
        assert server.stats()["status"] == "ok"  # on a connection that stays open
        kept = set(server.server.server_state.connections)
        assert len(kept) == 1
        start = time.monotonic()
        halves = [connect(server), connect(server, "GET /hea"), connect(server, head(100) + "{")]
        assert server.post(TEXT, text(max_tokens=300)).json()["usage"]["completion_tokens"] == 300
        assert time.monotonic() - start > 2.5
        assert all(map(closed, halves))
        assert server.server.server_state.connections == kept
        server.server.patience = app.Server.LEAVING  # one that came as the server was asked to stop
        until(lambda: not server.server.server_state.connections)


@pytest.mark.parametrize("stream", [False, True])
def test_what_nobody_reads_counts_until_its_reader_is_given_up(tmp_path: Path, stream: bool) -> None:
    model = endless(tmp_path, 1000)
    patience = Patience(reader=2.0)
    with (
        live(model, max_batch=2, max_waiting=2, send_buffer=4096, patience=patience) as server,
        knock(server.url, 1000, stream, n=4, logprobs=5),
    ):
        server.wait(lambda s: s["steps"] >= 2000 and s["running"] == 0)
        refused = server.post(TEXT, text(max_tokens=3))
        assert refused.status_code == 503
        assert "4 choices run, wait or are being sent" in refused.json()["error"]["message"]
        until(lambda: server.post(TEXT, text(max_tokens=3)).status_code == 200)


def test_the_system_takes_little_of_an_answer_that_nobody_reads() -> None:
    """So that a slow reader is seen to read."""
    with app.bind("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        server = listener.accept()[0]
        with server:
            server.setblocking(False)
            taken = 0
            with pytest.raises(BlockingIOError):
                while taken < 1 << 23:
                    taken += server.send(b"x" * 4096)
        assert 1 << 14 < taken < 1 << 19


def test_of_too_many_connections_those_without_a_request_are_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "most_connections", lambda: 8)
    monkeypatch.setattr(Connection, "most", Connection.most)  # the server sets it
    with live(fake_native.load(tmp_path, reply="ok")) as server:
        idle = [connect(server, "POST " * (i % 2)) for i in range(40)]
        assert server.stats()["status"] == "ok"
        until(lambda: len(server.server.server_state.connections) <= 8)
        for client in idle:
            client.close()


def test_every_descriptor_that_may_be_had_is_asked_for() -> None:
    resource: Any = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
        assert 8 <= most_connections() < 10_000
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_bodies_under_way_are_bounded_together(tmp_path: Path) -> None:
    """A small request is served beside them."""
    size = 200_000
    whole = json.dumps(text(prompt="a" * (size - 100))).ljust(size)
    with live(fake_native.load(tmp_path, reply="ok"), max_body_bytes=size) as server:
        run = server.server.app.state.service
        halves = [connect(server, head(size) + whole[:-1]) for _ in range(4)]
        until(lambda: run.body_bytes == 4 * (size - 1))
        refused = server.http.post(TEXT, content=whole, headers={"Content-Type": "application/json"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "queue_full")
        assert "busy with large requests" in refused.json()["error"]["message"]
        assert server.post(TEXT, text()).status_code == 200
        for client in halves:
            client.close()
        until(lambda: run.body_bytes == 0)
        assert "the prompt has" in server.error(TEXT, text(prompt="a" * (size - 100)))[2]


def test_more_messages_than_the_context_has_tokens(tmp_path: Path) -> None:
    with live(fake_native.load(tmp_path, reply="ok", context=100)) as server:
        status, param, message = server.error(CHAT, chat(messages=[{"role": "user", "content": ""}] * 101))
        assert (status, param) == (400, "messages")
        assert message == "there are 101 messages, more than the 100 tokens of the context"


def test_the_loop_turns_while_an_answer_is_made() -> None:
    value = {"a": iter([{"b": map(str, range(3)), "c": "ü"}, {}]), "d": [1.5, None], "e": iter(())}
    assert json.loads("".join(pieces(value))) == {
        "a": [{"b": ["0", "1", "2"], "c": "ü"}, {}],
        "d": [1.5, None],
        "e": [],
    }

    async def turns() -> tuple[int, bytes]:
        count = 0

        async def other() -> None:
            nonlocal count
            while True:
                count += 1
                await asyncio.sleep(0)

        task = asyncio.create_task(other())
        made = b"".join([part async for part in sliced(["a" * SLICE] * 20 + [dumps("end")])])
        task.cancel()
        return count, made

    count, made = asyncio.run(turns())
    assert count >= 20 and made == b"a" * (20 * SLICE) + b'"end"'
