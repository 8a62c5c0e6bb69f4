"""What commands share when they talk to a terminal: results on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from halfturn.job import Output

# A model may write escape sequences; on a terminal they could move the cursor or change its settings. Tab, newline and
# carriage return stay.
_CONTROLS = dict.fromkeys([*range(0, 9), 11, 12, *range(14, 32), 127, *range(128, 160)])


def visible(text: str) -> str:
    """Text without control characters, for a terminal."""
    return text.translate(_CONTROLS)


def write(text: str, out: TextIO | None = None) -> None:
    """Writes streamed text to `out` (stdout) at once; on a terminal without control characters."""
    out = sys.stdout if out is None else out
    if text:
        out.write(visible(text) if out.isatty() else text)
        out.flush()


def obeys(stream: TextIO, colours: bool = False) -> bool:
    """Whether escape sequences may be written: to a terminal that knows them; those of `colours` without NO_COLOR."""
    return stream.isatty() and os.environ.get("TERM") != "dumb" and not (colours and os.environ.get("NO_COLOR"))


def fill_streams() -> None:
    """Gives a standard stream that the caller has closed a file that holds nothing and takes everything.

    To be called before another file is opened: it would get the stream's number, and with it what a library prints.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - as long as the process


def note(text: str) -> None:
    """One line for the person, on stderr."""
    print(text, file=sys.stderr, flush=True)


def print_json(value: dict[str, Any]) -> None:
    """The one JSON object of a command's `--json`, on stdout."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # the stream would write ? for what its encoding lacks, so that goes as escapes
        text = json.dumps(value)
    print(text, flush=True)


def megabytes(count: float) -> str:
    """Bytes as people read them (powers of 1000, as disks and cards are sold)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit in ("B", "kB") else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


@contextlib.contextmanager
def status(text: str) -> Iterator[None]:
    """Shows `text` on stderr while the block runs, if a person is watching, and removes it afterwards."""
    watched = obeys(sys.stderr)
    if watched:
        sys.stderr.write(text + " ...")
        sys.stderr.flush()
    try:
        yield
    finally:
        if watched:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


class Counter:
    """A progress line on stderr: rewritten in place on a terminal, a line every few seconds elsewhere."""

    def __init__(self, label: str, every_seconds: float = 10.0) -> None:
        self.label, self.every = label, every_seconds
        self.started = self.shown = time.perf_counter()
        self.live = obeys(sys.stderr)

    def __call__(self, done: int, total: int, extra: str = "") -> None:
        now = time.perf_counter()
        if not self.live and now - self.shown < self.every:
            return
        self.shown = now
        left = (now - self.started) / done * (total - done) if done else 0.0
        line = f"{self.label} {done}/{total}{'  ' + extra if extra else ''}  {left:.0f} s left"
        sys.stderr.write(f"\r\x1b[K{line}" if self.live else line + "\n")
        sys.stderr.flush()

    def close(self) -> None:
        if self.live:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def speed(output: Output) -> str:
    """Such as `42 tokens, 310 tokens/s, first after 0.05 s`."""
    count, timings = len(output.token_ids), output.timings
    parts = [f"{count} token{'' if count == 1 else 's'}"]
    if timings.decode_tokens_per_second:
        parts.append(f"{timings.decode_tokens_per_second:.0f} tokens/s")
    if timings.time_to_first_token_s is not None:
        parts.append(f"first after {timings.time_to_first_token_s:.2f} s")
    return ", ".join(parts)
