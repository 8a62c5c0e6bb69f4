#!/usr/bin/env python3
"""What the server costs beside the engine: CPU time a token, and how much it slows the engine's steps.

The engine is a clock: a step takes `--step-ms`, whatever the batch, and no CPU time. So the server process pays for the
generator (scheduling, text) and for HTTP; the same load without streaming shows the first alone. With `--model` it is
that model on this machine's card or CPU, and the time includes reading the prompts.

    .venv/bin/python scripts/bench_server.py --streams 64 --tokens 200 --step-ms 20
    .venv/bin/python scripts/bench_server.py --streams 32 --model models/smollm2-4.0bpw
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import fake_native
from halfturn.bench import room
from halfturn.generator import Generator
from halfturn.model import Model
from halfturn.server.app import Settings, bind, run


class Clock(fake_native.Model):
    """Every token is the letter A."""

    sample = fake_native.Sample(32)

    def step(self, items: Sequence[fake_native.Item]) -> list[Any]:
        time.sleep(self.step_seconds)
        return [self.sample if item.sampler else None for item in items]


def serve(folder: str, pipe: Any, step_seconds: float, streams: int, path: str | None, context: int) -> None:
    if path:
        model = Model.load(path, context=context, kv_tokens=room(streams, context))
    else:
        model = fake_native.load(Path(folder))
        model.native = Clock(context=4096, pages=4096 // 32 * streams, step_seconds=step_seconds)
    with Generator(model, max_batch=streams) as generator:
        run(generator, Settings("clock"), bind("127.0.0.1", 0), lambda url, name: pipe.send(url))


async def one(host: str, port: int, tokens: int, stream: bool) -> tuple[int, float]:
    """Events read, and seconds until the first part of the answer; plain sockets, because a client library would cost
    more than the server."""
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection(host, port)
    body = json.dumps({"prompt": "hi", "max_tokens": tokens, "ignore_eos": True, "stream": stream}).encode()
    head = "POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    events, first = 0, 0.0
    while part := await reader.read(1 << 16):
        events += part.count(b'"text":"') - part.count(b'"text":""')
        first = first or (time.perf_counter() - start if events else 0.0)
    writer.close()
    return events, first


async def load(host: str, port: int, streams: int, tokens: int, stream: bool) -> tuple[float, int, float]:
    """Seconds, events, and the median of the seconds until the first one."""
    start = time.perf_counter()
    found = await asyncio.gather(*(one(host, port, tokens, stream) for _ in range(streams)))
    seconds = time.perf_counter() - start
    return seconds, sum(events for events, _ in found), statistics.median(first for _, first in found)


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--model", help="a converted model in place of the clock")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (folder, theirs, options.step_ms / 1000, options.streams, options.model, options.tokens + 32)
        process = context.Process(target=serve, args=arguments)
        process.start()
        theirs.close()  # so that a process that fails at its start ends our wait
        assert process.pid is not None
        host, port = ours.recv().removeprefix("http://").split(":")
        try:
            for kind in ("streamed", "whole") * options.repeat:
                before = cpu_seconds(process.pid)
                work = load(host, int(port), options.streams, options.tokens, kind == "streamed")
                seconds, events, first = asyncio.run(work)
                cpu = cpu_seconds(process.pid) - before
                count = options.streams * options.tokens
                print(
                    f"{kind:9} {options.streams} x {options.tokens} tokens: {count / seconds:7.0f} tokens/s, "
                    f"{1e6 * cpu / count:5.0f} us CPU a token, "
                    f"{1e3 * seconds / options.tokens:6.2f} ms a step"
                    f"{'' if options.model else f' (the engine: {options.step_ms:g})'}, "
                    f"first after {1e3 * first:.0f} ms, {count / max(1, events):.2f} tokens an event"
                )
        finally:
            process.terminate()
            process.join()


if __name__ == "__main__":
    main()
