"""How commands are found and how they fail: loaded on first use; one sentence on stderr, never a traceback.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C, 141 the reader of stdout went away. With `--json`
a failure is also one JSON object on stdout: {"error": sentence}.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any, TextIO

import click

from halfturn.console import fill_streams, note, print_json
from halfturn.error import Error

# What `pip install 'halfturn[convert]'` brings: a missing one of these means the extra was not installed.
CONVERT_MODULES = ("torch", "gguf", "scipy", "matplotlib", "safetensors", "huggingface_hub")


class LazyGroup(click.Group):
    """A group, some of whose commands are imported only when called.

    `lazy` maps a command's name to ("module:attribute", one line for the list of commands).
    """

    def __init__(self, *args: Any, lazy: dict[str, tuple[str, str]] | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.lazy = lazy or {}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*self.commands, *self.lazy})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.lazy:
            return super().get_command(ctx, cmd_name)
        module, attribute = self.lazy[cmd_name][0].split(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list in `--help`, without importing anything."""
        width = formatter.width - 6 - max(len(name) for name in self.list_commands(ctx))
        rows = [
            (name, self.lazy[name][1] if name in self.lazy else self.commands[name].get_short_help_str(width))
            for name in self.list_commands(ctx)
        ]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


class MainGroup(LazyGroup):
    """The root: turns whatever went wrong into a sentence and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Two ends that click's main() would handle in its own way, if they got there."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise click.Abort from None
        except BrokenPipeError:
            raise click.exceptions.Exit(reader_left()) from None

    def main(self, args: Any = None, **extra: Any) -> Any:  # type: ignore[override]
        """click's main(): standalone (as the program) it exits; a caller may turn that off and gets exceptions."""
        arguments = list(sys.argv[1:] if args is None else args)
        if not extra.pop("standalone_mode", True):
            return super().main(args=arguments, standalone_mode=False, **extra)
        fill_streams()
        for stream in (sys.stdout, sys.stderr):  # a terminal of few characters shows ? instead of ending the command
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
        call = super().main
        extra.setdefault("prog_name", "halfturn")

        def run() -> Any:
            result = call(args=arguments, standalone_mode=False, **extra)
            sys.stdout.flush()
            return result

        sys.exit(exit_code(run, as_json="--json" in arguments, debug="--debug" in arguments))


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def exit_code(run: Callable[[], Any], as_json: bool, debug: bool) -> int:
    """Runs a command; reports a failure on stderr (and in JSON); returns the process's exit code."""
    try:
        result = run()
        return result if isinstance(result, int) else 0
    except (click.Abort, KeyboardInterrupt):
        report("interrupted", as_json, lambda: note("\nstopped" if sys.stderr.isatty() else "stopped"))
        return 130
    except BrokenPipeError:
        return reader_left()
    except click.ClickException as error:
        report(error.format_message(), as_json, error.show)
        return error.exit_code
    except Exception as error:
        flush_or_abandon(sys.stdout)
        sentence = explain(error)
        if isinstance(error, OSError) and error.filename is None and error.errno in _FULL:  # a stream has no name
            sentence = f"the output can't be written: {error.strerror}"
        shown = traceback.format_exc() if debug else ""
        report(sentence, as_json, lambda: note(f"{shown}error: {sentence}"))
        return 1


def reader_left() -> int:
    """Nobody reads stdout any more: says nothing."""
    abandon(sys.stdout)
    return 141


def abandon(stream: TextIO) -> None:
    """Leads a stream nowhere, which keeps the interpreter's last flush from complaining."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def flush_or_abandon(stream: TextIO) -> None:
    """Abandons a stream to which what was printed can't be written, as on a full disk."""
    try:
        stream.flush()
    except OSError:
        abandon(stream)


def report(sentence: str, as_json: bool, show: Callable[[], None]) -> None:
    """A failure on stderr, by `show`, and in JSON. A stream that can't be written is no second failure."""
    with suppress(OSError):
        show()
    flush_or_abandon(sys.stderr)
    if as_json:
        with suppress(OSError):
            print_json({"error": sentence})
        flush_or_abandon(sys.stdout)


def explain(error: Exception) -> str:
    """One sentence for the user."""
    if isinstance(error, Error):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in CONVERT_MODULES:
        return f"this command needs {error.name}, which is not installed: pip install 'halfturn[convert]'"
    if isinstance(error, MemoryError):
        return "out of memory: use a smaller --context, --kv-bits 8 or 4, or a smaller model"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return (
        f"unexpected {type(error).__name__}: {error} (this is a fault in Halfturn: `halfturn --debug ...` shows where; "
        "please report it)"
    )
