#!/usr/bin/env python3
"""Whether answers depend on who else is there: each request alone, then all of them from many clients at once.

Requests are greedy or seeded, streamed or not, some with stop strings, penalties, log probabilities or two choices;
about a third of the clients leave at any moment. Every answer is compared with the one that its request got alone. With
a KV cache that is small for so many clients, requests lose their pages and start again:

    .venv/bin/python scripts/soak_server.py models/smollm2-4.0bpw --seconds 60 --context 2048 --kv-tokens 8192

Other options go to `halfturn serve`. Exit code 1 if an answer differed, failed or never came. Mode f16 adds in another
order for more rows, so its answers may differ.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

PATIENCE = 120.0  # seconds after which an answer counts as one that never comes
WORDS = ("alpha", "river", "stone", "light", "house", "seven", "turn", "42", "ζ", "日本", "🙂", "def", "return")
SHARED = "The same beginning of several prompts, whose pages requests may share. " * 8

Answer = list[dict[str, Any]]  # by choice: text, finish_reason, logprobs


def make_requests(count: int) -> list[dict[str, Any]]:
    draw = random.Random(7)
    requests = []
    for seed in range(count):
        words = " ".join(draw.choice(WORDS) for _ in range(draw.choice([1, 3, 10, 40, 200, 600])))
        request: dict[str, Any] = {
            "prompt": (SHARED if draw.random() < 0.3 else "") + words,
            "max_tokens": draw.choice([1, 5, 30, 120, 250]),
            "temperature": 0,
        }
        if draw.random() < 0.55:
            request |= {"temperature": draw.choice([0.5, 1, 1.5]), "seed": seed}
        for chance, setting in (
            (0.3, {"top_p": 0.9}),
            (0.2, {"presence_penalty": 0.7}),
            (0.2, {"repetition_penalty": 1.2}),
            (0.2, {"logit_bias": {"100": 2}}),
            (0.2, {"logprobs": 2}),
            (0.2, {"stop": ["house", "\n\n"]}),
            (0.15, {"n": 2}),
        ):
            if draw.random() < chance:
                request |= setting
        requests.append(request)
    return requests


def whole(events: list[dict[str, Any]]) -> Answer:
    """The choices of an answer, put together from its events."""
    choices: dict[int, dict[str, Any]] = {}
    for event in events:
        for part in event["choices"]:
            choice = choices.setdefault(part["index"], {"text": "", "finish_reason": None, "logprobs": None})
            choice["text"] += part["text"]
            choice["finish_reason"] = part["finish_reason"] or choice["finish_reason"]
            if part.get("logprobs"):
                sums = choice["logprobs"] or {}
                choice["logprobs"] = {key: sums.get(key, []) + (new or []) for key, new in part["logprobs"].items()}
    return [choices[index] for index in sorted(choices)]


class Failed(Exception):
    """What the server said instead of an answer."""


async def ask(port: int, request: dict[str, Any], stream: bool, leave_after: float | None = None) -> Answer | None:
    """The answer; None where the client left before it. Plain sockets, so that leaving is no more than a close."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    body = json.dumps({**request, "stream": stream}).encode()
    asked = f"POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    try:
        writer.write(asked.encode() + body)
        reply = await asyncio.wait_for(reader.read(), leave_after or PATIENCE)
    except asyncio.TimeoutError:  # Python 3.10 has two
        if leave_after is None:
            raise Failed(f"no answer in {PATIENCE:g} s") from None
        return None
    finally:
        writer.close()
    head, _, content = reply.partition(b"\r\n\r\n")
    if head.split()[1:2] != [b"200"]:
        raise Failed(f"{head.decode()[:30]!r}: {content.decode()[:300]}")
    lines = [line[6:] for line in content.decode().split("\n") if line.startswith("data: {")]
    events = [json.loads(line) for line in (lines if stream else [content])]
    for event in events:
        if "error" in event:
            raise Failed(str(event["error"])[:300])
    return whole(events)


async def soak(port: int, requests: list[dict[str, Any]], clients: int, seconds: float) -> Counter[str]:
    """Counts of what the answers were like; prints the first faults."""
    counts: Counter[str] = Counter()

    def fault(kind: str, number: int, said: str) -> None:
        counts[kind] += 1
        if counts[kind] <= 5:
            settings = {key: value for key, value in requests[number].items() if key != "prompt"}
            print(f"{kind}: request {number} {settings}: {said}", flush=True)

    async def compare(number: int, stream: bool, leave_after: float | None = None) -> None:
        try:
            answer = await ask(port, requests[number], stream, leave_after)
        except (Failed, OSError) as error:
            fault("failed", number, str(error))
            return
        if answer is None:
            counts["left"] += 1
        elif answer != alone[number]:
            fault("wrong", number, f"{str(answer)[:200]} instead of {str(alone[number])[:200]}")
        else:
            counts["equal"] += 1

    async def client(seed: int) -> None:
        draw, end = random.Random(seed), time.monotonic() + seconds
        while time.monotonic() < end:
            leaves = draw.expovariate(4) if draw.random() < 0.3 else None
            await compare(draw.randrange(len(requests)), draw.random() < 0.6, leaves)
            if draw.random() < 0.1:
                await asyncio.sleep(draw.random())

    alone = [await ask(port, request, stream=False) for request in requests]
    for number in range(len(requests)):
        await compare(number, stream=True)
    await asyncio.gather(*(client(seed) for seed in range(clients)))
    for number in range(len(requests)):
        await compare(number, stream=False)
    return counts


def health(port: int) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as reply:
        found: dict[str, Any] = json.load(reply)
    return found


def port_of(server: subprocess.Popen[bytes]) -> int:
    """Waits for the line of JSON that `serve --json` prints once it answers."""
    assert server.stdout is not None
    said = json.loads(server.stdout.readline() or "{}")
    if "url" not in said:  # why not stands on stderr
        raise SystemExit("the server ended before it was ready")
    port = urlsplit(said["url"]).port
    assert port is not None
    return port


def memory(server: subprocess.Popen[bytes]) -> str:
    """Resident memory and open files of the server."""
    status = Path(f"/proc/{server.pid}/status").read_text()
    resident = next(line.split(":")[1].strip() for line in status.split("\n") if line.startswith("VmRSS"))
    return f"{resident}, {len(list(Path(f'/proc/{server.pid}/fd').iterdir()))} files"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--seconds", type=float, default=60.0, help="of many clients at once")
    parser.add_argument("--clients", type=int, default=48)
    parser.add_argument("--requests", type=int, default=40, help="different ones")
    options, serve_options = parser.parse_known_args()
    command = [sys.executable, "-m", "halfturn", "serve", options.model, "--port", "0", "--json", *serve_options]
    server = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        port = port_of(server)
        before = memory(server)
        counts = asyncio.run(soak(port, make_requests(options.requests), options.clients, options.seconds))
        after, state = memory(server), health(port)
    except Failed as failure:
        raise SystemExit(f"a request that was alone failed: {failure}") from failure
    finally:
        server.terminate()
        code = server.wait(60)
    print(", ".join(f"{kind} {counts[kind]}" for kind in ("equal", "left", "wrong", "failed")))
    print(f"server: {before} before, {after} after, {state['preemptions']} preemptions; it ended with {code}")
    still = state["running"] + state["waiting"]
    if still:
        print(f"{still} requests still run or wait, though no client does")
    sys.exit(1 if code or still or counts["wrong"] or counts["failed"] or not counts["equal"] else 0)


if __name__ == "__main__":
    main()
