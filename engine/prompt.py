"""Where a command takes its prompt from, and that it is text."""

from __future__ import annotations

import sys

import click

from halfturn.error import Error


def prompt_text(prompt: str | None, prompt_file: str | None) -> str:
    """The prompt from exactly one of --prompt, --prompt-file and a piped stdin."""
    if prompt is not None and prompt_file is not None:
        raise click.UsageError("give --prompt or --prompt-file, not both")
    if prompt is not None:
        return clean("--prompt", prompt)
    if prompt_file is None and sys.stdin.isatty():
        raise click.UsageError("no prompt: give --prompt TEXT or --prompt-file FILE, or pipe text in")
    try:
        if prompt_file is None or prompt_file == "-":
            return sys.stdin.buffer.read().decode("utf-8")
        with open(prompt_file, "rb") as file:
            return file.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise Error(f"{prompt_file or 'stdin'} is not UTF-8 text: byte {error.start} can't be decoded") from None


def clean(option: str, text: str) -> str:
    """Text of the command line, which Python lets hold bytes that are no characters."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Error(f"{option} is not UTF-8 text: character {error.start} can't be decoded") from None
    return text
