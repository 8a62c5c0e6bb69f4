"""Token ids to text, one at a time: a character is shown when its last byte has come, never before."""

from __future__ import annotations

import codecs
from collections.abc import Callable

_utf8 = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """Text of one stream of tokens, in time linear in its length.

    `spell(id)` gives a token's bytes (none for a special token). `strip` is how many leading spaces the tokenizer adds
    to a text, which are therefore left out at its beginning.
    """

    def __init__(self, spell: Callable[[int], bytes], strip: int = 0) -> None:
        self._spell = spell
        self._strip = strip
        self._decode = _utf8("replace").decode

    def add(self, token_id: int) -> str:
        """The text that became certain with this token; often all of it, sometimes nothing."""
        text = self._decode(self._spell(token_id))
        return self._stripped(text) if self._strip and text else text

    def flush(self) -> str:
        """What is left at the end: U+FFFD where a character is incomplete."""
        return self._decode(b"", True)

    def _stripped(self, text: str) -> str:
        while self._strip and text.startswith(" "):
            text, self._strip = text[1:], self._strip - 1
        if text:
            self._strip = 0
        return text


class WindowDetokenizer:
    """The same for a tokenizer whose decoder is none of the usual ones: decodes a window of recent tokens twice.

    The window starts at a place whose text is already out, so the text of later tokens sees a few tokens of context;
    it moves on with each piece of text, and so stays short.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._shown = 0  # tokens at the window's beginning whose text is out

    def add(self, token_id: int) -> str:
        """The text that became certain with this token."""
        self._window.append(token_id)
        before, after = self._decode(self._window[: self._shown]), self._decode(self._window)
        if after.endswith("�") or len(after) <= len(before):
            return ""
        self._window = self._window[self._shown :]
        self._shown = len(self._window)
        return after[len(before) :]

    def flush(self) -> str:
        """What is left at the end: U+FFFD where a character is incomplete."""
        before, after = self._decode(self._window[: self._shown]), self._decode(self._window)
        self._window, self._shown = [], 0
        return after[len(before) :]
