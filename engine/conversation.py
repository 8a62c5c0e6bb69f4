"""A chat's messages: what was said, what still fits the context, and its file."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from halfturn.error import Error

Message = dict[str, str]
ROLES = ("system", "user", "assistant")


class Conversation:
    """Messages in order. Old turns that no longer fit are left out of the prompt (`left_out`), never forgotten."""

    def __init__(self, system: str | None = None) -> None:
        self.system = system
        self.turns: list[Message] = []  # user, assistant, user, ...
        self.left_out = 0  # the first so many of `turns` are not sent to the model

    @property
    def messages(self) -> list[Message]:
        """Everything said, the system message first."""
        return [*self._system(), *self.turns]

    @property
    def prompt(self) -> list[Message]:
        """What the model is sent."""
        return [*self._system(), *self.turns[self.left_out :]]

    def _system(self) -> list[Message]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def say(self, role: str, content: str) -> None:
        self.turns.append({"role": role, "content": content})

    def undo(self) -> str:
        """Removes the last message of the user and the reply to it; returns the message."""
        for at, message in reversed(list(enumerate(self.turns))):
            if message["role"] == "user":
                del self.turns[at:]
                self.left_out = 0  # what did not fit beside it may fit again
                return message["content"]
        raise Error("there is nothing to take back: the conversation has no message of yours")

    def clear(self) -> None:
        self.turns.clear()
        self.left_out = 0

    def fit(self, encode: Callable[[Sequence[Message]], Sequence[int]], context: int, room: int) -> int:
        """Leaves out the oldest turns until the prompt and `room` tokens of reply fit; returns how many it left out.

        Once it has to, it makes a quarter of the context free: each turn left out changes the prompt's beginning, so
        that the whole prompt is read anew, and this way the turns after it find their prefix in the cache again.
        """
        length = len(encode(self.prompt))
        if length + room <= context:
            return 0
        dropped = 0
        while len(self.turns) - self.left_out > 1 and length + max(room, context // 4) > context:
            self.left_out += 1
            while self.left_out < len(self.turns) - 1 and self.turns[self.left_out]["role"] != "user":
                self.left_out += 1
            dropped += 1
            length = len(encode(self.prompt))
        if length >= context:
            raise Error(
                f"this message alone takes {length} tokens and the context holds {context}: shorten it, "
                "or start with a larger --context"
            )
        return dropped

    def save(self, path: str | Path) -> None:
        """Writes the messages as JSON. A file that is there is replaced in one step, or stays as it is."""
        value = {"messages": self.messages}
        try:
            content = json.dumps(value, ensure_ascii=False, indent=1).encode()
        except UnicodeEncodeError:  # half a surrogate pair, which a file gave as an escape: it goes back as one
            content = json.dumps(value, indent=1).encode()
        try:
            _replace(Path(path).resolve(), content + b"\n")
        except (OSError, RuntimeError, ValueError) as error:
            raise Error(f"{path} can't be written: {reason(error)}") from None

    def load(self, path: str | Path) -> None:
        """Replaces the conversation by a file of save(), or by a JSON list of messages."""
        try:
            value: Any = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise Error(f"{path} can't be read: {reason(error)}") from None
        except RecursionError:
            raise Error(f"{path} is not a saved conversation: its brackets are nested too deep") from None
        except ValueError as error:
            raise Error(f"{path} is not a saved conversation: {error}") from None
        messages = value.get("messages") if isinstance(value, dict) else value
        if not isinstance(messages, list):
            raise Error(f'{path} is not a saved conversation: it has no list "messages"')
        for number, message in enumerate(messages, 1):
            role = message.get("role") if isinstance(message, dict) else None
            if role not in ROLES or not isinstance(message.get("content"), str):
                raise Error(f'message {number} of {path} needs a "role" ({", ".join(ROLES)}) and a text "content"')
            if role == "system" and number > 1:
                raise Error(f"message {number} of {path} is a system message: only the first one may be")
        first_is_system = bool(messages) and messages[0]["role"] == "system"
        self.system = messages[0]["content"] if first_is_system else None
        self.turns = [{"role": m["role"], "content": m["content"]} for m in messages[first_is_system:]]
        self.left_out = 0


# A file that is mounted, or in a folder where nothing may be made, may still be written itself.
_UNREPLACEABLE = (errno.EACCES, errno.EPERM, errno.EBUSY, errno.EROFS)


def reason(error: Exception) -> str:
    """Why a path can't be used, without the path."""
    return (isinstance(error, OSError) and error.strerror) or str(error).rstrip(".")


def _replace(path: Path, content: bytes) -> None:
    """Writes a file beside `path` and renames it: a full disk leaves what was there."""
    old = path.exists()
    if old and not path.is_file():
        raise ValueError("it is not a plain file")
    new = path.parent / f".halfturn-{secrets.token_hex(8)}"
    try:
        with open(new, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if old:
            shutil.copymode(path, new)
        os.replace(new, path)
    except BaseException as error:
        with suppress(OSError):
            new.unlink()
        if not (old and isinstance(error, OSError) and error.errno in _UNREPLACEABLE):
            raise
        path.write_bytes(content)
