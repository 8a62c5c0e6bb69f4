"""The server's life beside its answers: a full queue, clients that leave or stall, failures, signals, addresses."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import fake_native
from halfturn import Model
from halfturn.error import Error
from halfturn.server import app
from halfturn.server.app import bind
from live_server import TEXT, Live, endless, events, knock, live, text


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Live]:
    """Two requests at a time and two that may wait; 10 ms a token, and no end before the context of 4000 tokens."""
    model = fake_native.load(tmp_path, context=4000, pages=300, step_seconds=0.01, script=lambda tokens, drawn: 65)
    with live(model, max_batch=2, max_waiting=2) as found:
        yield found


def test_a_full_queue_is_refused_and_frees_up(slow: Live) -> None:
    with httpx.Client(timeout=30) as client:
        streams = [client.stream("POST", slow.url + TEXT, json=text(stream=True, n=2, max_tokens=3000)) for _ in "ab"]
        opened = [stream.__enter__() for stream in streams]
        assert [r.status_code for r in opened] == [200, 200]
        slow.wait(lambda s: (s["running"], s["waiting"]) == (2, 2))
        refused = slow.post(TEXT, text())
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "queue_full"
        assert "4 choices run, wait or are being sent" in refused.json()["error"]["message"]
        assert refused.headers["retry-after"] == "1"
        never = slow.post(TEXT, text(n=5))  # however long it waited
        assert never.status_code == 400 and never.json()["error"]["param"] == "n"
        for stream in streams:
            stream.__exit__(None, None, None)
    slow.wait(lambda s: (s["running"], s["waiting"], s["pages_used"]) == (0, 0, 0))
    assert slow.post(TEXT, text()).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_request(slow: Live, stream: bool) -> None:
    with knock(slow.url, 3000, stream):
        slow.wait(lambda s: s["running"] == 1)
        slow.wait(lambda s: s["steps"] > 5)
    left = slow.stats()["steps"]
    freed = slow.wait(lambda s: s["running"] == 0)
    assert freed["steps"] - left <= 10  # of 3000; a step takes 10 ms, so this only says that it did not run on
    time.sleep(0.05)
    assert slow.stats()["steps"] == freed["steps"]


def test_a_reader_that_stalls_holds_up_nobody(tmp_path: Path) -> None:
    """Its sockets fill up, the engine goes on; when it reads again the text is complete, in fewer and longer chunks."""
    count = 3000
    with live(endless(tmp_path, count), send_buffer=4096) as server, knock(server.url, count) as client:
        server.wait(lambda s: s["steps"] >= count and s["running"] == 0, 60)
        assert server.post(TEXT, text(max_tokens=3)).status_code == 200
        answer = b""
        while not answer.endswith(b"[DONE]\n\n"):
            answer += client.recv(1 << 16)
    found = events(answer.split(b"\r\n\r\n", 1)[1].decode())
    joined = "".join(event["choices"][0]["text"] for event in found)
    assert joined == joined[0] * count
    assert len(found) < count


def test_a_reader_that_stalls_does_not_keep_the_server_from_ending(tmp_path: Path) -> None:
    with live(endless(tmp_path, 3000), send_buffer=4096) as server:
        client = knock(server.url, 3000)
        server.wait(lambda s: s["steps"] >= 3000, 60)
    client.close()  # only now: live() has seen the server end


def test_an_engine_failure_is_a_sentence(tmp_path: Path) -> None:
    def fail(step: int, items: Any) -> None:
        if len(items[0].pages) * 32 > 64:
            raise RuntimeError("the cache is on fire")

    with live(fake_native.load(tmp_path, fail=fail, script=lambda tokens, drawn: 65)) as server:
        status, _, message = server.error(TEXT, text(max_tokens=100))
        assert status == 500 and "the cache is on fire" in message and "Traceback" not in message
        with server.http.stream("POST", TEXT, json=text(max_tokens=100, stream=True)) as response:
            assert response.status_code == 200  # it was well when it began
            blocks = [line.removeprefix("data: ") for line in response.iter_lines() if line]
        assert "[DONE]" not in blocks
        assert "the cache is on fire" in json.loads(blocks[-1])["error"]["message"]
        before = "".join(json.loads(block)["choices"][0]["text"] for block in blocks[:-1])
        assert len(before) == 63  # what was drawn before the third page
        assert server.post(TEXT, text(max_tokens=5)).status_code == 200


def test_a_bug_shows_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fake_native.load(tmp_path, reply="ok")
    with live(model) as server:

        def broken(*_: Any, **__: Any) -> Any:
            raise KeyError("secret")

        monkeypatch.setattr(server.generator, "submit", broken)
        status, _, message = server.error(TEXT, text())
        assert status == 500 and "secret" not in message and "log" in message
        assert server.error(TEXT, text())[0] == 500  # again: uvicorn closed the connection, and the client was told


def test_a_closed_engine_is_not_healthy(tmp_path: Path) -> None:
    with live(fake_native.load(tmp_path, reply="ok")) as server:
        assert server.stats()["status"] == "ok"
        server.generator.close()
        response = server.http.get("/health")
        assert (response.status_code, response.json()["status"]) == (503, "failed")
        assert server.error(TEXT, text())[0] == 503


PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import fake_native
from halfturn.model import Model
from halfturn.server.app import Settings, serve
Model.load = classmethod(lambda cls, path: fake_native.load(Path(path), context=4000, pages=300, step_seconds=0.01,
                                                            script=lambda tokens, drawn: 65))
settings = Settings(grace_seconds=float(sys.argv[3]), access_log=bool(sys.argv[4]))
serve(sys.argv[2], port=0, settings=settings)
"""


def ask(url: str, tokens: int, stream: bool = False) -> tuple[threading.Thread, list[httpx.Response]]:
    """Asks for a completion in another thread, and returns once it runs."""
    answers: list[httpx.Response] = []
    body = {"prompt": "hi", "max_tokens": tokens, "stream": stream}
    thread = threading.Thread(target=lambda: answers.append(httpx.post(url + TEXT, json=body, timeout=30)))
    thread.start()
    while httpx.get(url + "/health").json()["running"] == 0:
        time.sleep(0.01)
    return thread, answers


def start(folder: Path, grace: float, access_log: bool = False) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-c", PROGRAM, str(Path(__file__).parent), str(folder), str(grace)]
    command.append("yes" if access_log else "")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith(f"Halfturn serves {folder.name} at http://127.0.0.1:"), line
    return process, line.split(" at ")[1].split("/v1")[0]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM")
@pytest.mark.parametrize(("number", "grace", "tokens"), [(signal.SIGTERM, 20, 50), (signal.SIGINT, 0.1, 3000)])
def test_a_signal_ends_the_server(tmp_path: Path, number: int, grace: float, tokens: int) -> None:
    """Running requests are finished if they end within the grace period, or else told; the exit code is 0."""
    folder = tmp_path / "some-model"
    process, url = start(folder, grace)
    thread, answers = ask(url, tokens)
    process.send_signal(number)
    _, complaints = process.communicate(timeout=30)
    thread.join()
    assert process.returncode == 0, complaints
    assert "Traceback" not in complaints
    if grace > 1:
        assert answers[0].json()["usage"]["completion_tokens"] == tokens
    else:
        assert answers[0].status_code == 503 and answers[0].json()["error"]["code"] == "shutting_down"


@pytest.mark.parametrize("busy", [False, True])
def test_half_a_request_does_not_hold_up_the_end(tmp_path: Path, busy: bool) -> None:
    """Nor beside one that is finished meanwhile."""
    process, url = start(tmp_path / "some-model", 1000)
    with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as client:
        client.sendall(f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n".encode())
        client.sendall(b"Content-Length: 1000\r\n\r\n{")
        assert httpx.get(url + "/health").status_code == 200
        running = [ask(url, 50)] if busy else []
        process.send_signal(signal.SIGINT)
        _, complaints = process.communicate(timeout=30)
    assert process.returncode == 0 and "Traceback" not in complaints
    for thread, answers in running:
        thread.join()
        assert answers[0].json()["usage"]["completion_tokens"] == 50


def test_the_access_log_is_on_stderr(tmp_path: Path) -> None:
    process, url = start(tmp_path / "some-model", 1, access_log=True)
    httpx.get(url + "/health")
    process.send_signal(signal.SIGINT)
    out, log = process.communicate(timeout=30)
    assert out == "" and "GET /health" in log


def test_a_second_signal_ends_running_requests(tmp_path: Path) -> None:
    """Clients are told, whether they stream or wait."""
    process, url = start(tmp_path / "some-model", 1000)
    threads, answers = zip(*(ask(url, 3000, stream) for stream in (True, False)))
    while httpx.get(url + "/health").json()["running"] < 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    assert process.stderr.readline().startswith("finishing 2 answers for up to 1000 s")
    process.send_signal(signal.SIGINT)
    _, complaints = process.communicate(timeout=30)
    for thread in threads:
        thread.join()
    assert (process.returncode, complaints) == (0, "")
    assert [found[0].status_code for found in answers] == [200, 503]
    last = answers[0][0].text.removesuffix("\n\n").split("data: ")[-1]
    assert json.loads(last)["error"]["code"] == "shutting_down"


@pytest.mark.parametrize(
    ("path", "name"), [("link", "link"), ("link/", "link"), ("folder", "folder"), ("folder/.", "folder"), (".", "here")]
)
def test_a_model_is_named_as_the_path_names_it(
    path: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    (here / "folder").mkdir(parents=True)
    (here / "link").symlink_to("folder")
    monkeypatch.chdir(here)
    monkeypatch.setattr(Model, "load", lambda *_, **__: fake_native.load(tmp_path / "model"))
    named: list[str] = []
    monkeypatch.setattr(app, "run", lambda generator, settings, *_: named.append(settings.name))
    app.serve(path, port=0)
    assert named == [name]


def test_a_name_that_no_answer_could_carry(tmp_path: Path) -> None:
    for path, name in ((tmp_path / "bad\udcff", ""), (tmp_path, "\udcff")):
        with pytest.raises(Error, match="the model's name is not UTF-8 text"):
            app.serve(path, port=0, settings=app.Settings(name=name))


def test_addresses_that_cannot_be_had() -> None:
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Error, match=f"port {port} of 127.0.0.1 is in use: .* choose another --port"):
            bind("127.0.0.1", port)
    with pytest.raises(Error, match="is not an address"):
        bind("no such host", 80)
    with pytest.raises(Error, match=r"can't listen on port 80 of 192\.0\.2\.1"):
        bind("192.0.2.1", 80)
