"""The two libraries that split text into tokens, behind one interface: tokenizer.json and sentencepiece's file."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from halfturn.checks import MAX_TOKENIZER_BYTES, read_file
from halfturn.detokenizer import Detokenizer, WindowDetokenizer
from halfturn.error import Error, quoted

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_ALONE = "\U0010fffd"  # a character that no token holds together with others: models spell it in bytes


ADDED_TOKEN_RULES = ("lstrip", "rstrip", "single_word", "normalized")


@dataclass(frozen=True)
class Declared:
    """A token that a model's files add to its tokenizer; `rules`: those of ADDED_TOKEN_RULES that they state."""

    name: str
    id: int
    special: bool = False
    rules: dict[str, bool] = field(default_factory=dict)


@contextmanager
def _of_the_library(file: Path) -> Iterator[None]:
    """Its errors are plain Exception, or its own BaseException where it panics."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        reason = quoted(str(error), 300)
        raise Error(f"{file} is not a usable tokenizer: {reason}; download or convert the model again") from error


def alternatives(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the texts, the longest first; nothing if there are none."""
    ordered = sorted((t for t in texts if t), key=lambda t: (-len(t), t))
    return re.compile("|".join(map(re.escape, ordered)) if ordered else r"(?!)")


class JsonCodec:
    """A tokenizer.json through library tokenizers, and the tokens that tokenizer_config.json declares beside it."""

    def __init__(self, file: Path, declared: Iterable[Declared] = ()) -> None:
        from tokenizers import AddedToken, Tokenizer

        content = read_file(file, MAX_TOKENIZER_BYTES) or b""
        with _of_the_library(file):
            self._tokenizer = Tokenizer.from_buffer(content)  # from_file() takes names in UTF-8 only
        self._file = file
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        known = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        for token in declared:
            if token.name not in known:
                self._tokenizer.add_tokens([AddedToken(token.name, special=token.special, **token.rules)])
            if (found := self._tokenizer.token_to_id(token.name)) != token.id:
                raise Error(
                    f"tokenizer_config.json declares {quoted(token.name)} as token {token.id}, but in {file} it is "
                    f"{found}: correct the one that is wrong"
                )
        # The library keeps "specials are text" as a state of the tokenizer, so two threads must take turns.
        self._lock = threading.Lock()
        self.size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        added = self._tokenizer.get_added_tokens_decoder()
        self.specials: dict[str, int] = {t.content: i for i, t in added.items() if t.special}
        self.special_ids = frozenset(self.specials.values())
        self._added = added
        self._aliases: dict[str, str] = {}
        self._alias_ids: dict[int, int] = {}
        self._bytes: dict[int, bytes] = {}

    def encode(self, text: str, allow_special: bool) -> list[int]:
        """Ids of the text; spelled special tokens become special ids where allowed, else plain text."""
        with self._lock:
            self._tokenizer.encode_special_tokens = not allow_special
            with _of_the_library(self._file):
                # encode() would hold Python's lock, and so every other thread, for seconds where a text is long.
                return self._tokenizer.encode_batch([text], add_special_tokens=False)[0].ids

    def encode_marked(self, text: str, mark: str) -> list[int]:
        """Ids of the text without `mark`: specials that the mark interrupts are plain text, others special ids.

        The library has one switch for a whole text. So the others are renamed to aliases: added tokens that are not
        special, with the same rules for the space around them, and names that nobody can guess.
        """
        plain = text.replace(mark, "")
        # Where the mark interrupts none, the library's own way will do.
        if self._find_specials(text, mark) == self._find_specials(plain, mark):
            return self.encode(plain, True)
        renamed = self._special_pattern.sub(lambda found: self._alias(found.group()), text).replace(mark, "")
        return [self._alias_ids.get(i, i) for i in self.encode(renamed, False)]

    def _find_specials(self, text: str, mark: str) -> list[tuple[int, str]]:
        """Where specials are spelled in the text, counted without the marks, and which."""
        specials, marks, seen = [], 0, 0
        for found in self._special_pattern.finditer(text):
            marks += text.count(mark, seen, found.start())
            seen = found.start()
            specials.append((seen - marks * len(mark), found.group()))
        return specials

    def _alias(self, special: str) -> str:
        with self._lock:
            if special not in self._aliases:
                import secrets

                from tokenizers import AddedToken

                token, name = self._added[self.specials[special]], f"\U0010fffd{secrets.token_hex(12)}\U0010fffd"
                rules = {"lstrip": token.lstrip, "rstrip": token.rstrip, "single_word": token.single_word}
                self._tokenizer.add_tokens([AddedToken(name, normalized=False, special=False, **rules)])
                alias_id = self._tokenizer.token_to_id(name)
                assert alias_id is not None
                self._alias_ids[alias_id] = self.specials[special]
                self._aliases[special] = name
            return self._aliases[special]

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        return alternatives(self.specials)

    def surroundings(self) -> tuple[list[int], list[int]]:
        """What the file's post-processor puts before and after a text."""
        plain = self.encode("a", True)
        with _of_the_library(self._file):
            whole = self._tokenizer.encode("a", add_special_tokens=True).ids
        for start in range(len(whole) - len(plain) + 1):
            if whole[start : start + len(plain)] == plain:
                return whole[:start], whole[start + len(plain) :]
        return [], []

    def longest(self) -> int:
        """Characters of the longest name, times 4 where texts are normalized: then they may get shorter."""
        return max(map(len, self._tokenizer.get_vocab())) * (1 if self._tokenizer.normalizer is None else 4)

    def token_id(self, text: str) -> int | None:
        """The id of a token by its exact name."""
        return self._tokenizer.token_to_id(text)

    def detokenizer(self, skip: frozenset[int], at_start: bool) -> Detokenizer | WindowDetokenizer:
        """A new stream that leaves out the tokens in `skip`."""
        if self._speller is None:
            return WindowDetokenizer(lambda ids: self._decode([i for i in ids if i not in skip]))
        return Detokenizer(_skipping(self._token_bytes, skip), self._leading if at_start else 0)

    def token_bytes(self, token_id: int) -> bytes:
        """What one token spells by itself."""
        if self._speller is None:
            return self._decode([token_id]).encode()
        return self._token_bytes(token_id)

    def _decode(self, ids: list[int]) -> str:
        with _of_the_library(self._file):
            return self._tokenizer.decode(ids, skip_special_tokens=False)

    def _token_bytes(self, token_id: int) -> bytes:
        found = self._bytes.get(token_id)
        if found is None:
            name = self._tokenizer.id_to_token(token_id) if 0 <= token_id < self.size else None
            assert self._speller is not None
            found = self._bytes[token_id] = b"" if name is None else self._speller(name)
        return found

    @cached_property
    def _decoders(self) -> list[dict[str, Any]]:
        decoder = self._tokenizer.decoder
        state = {} if decoder is None else json.loads(decoder.__getstate__())
        return state["decoders"] if state.get("type") == "Sequence" else [state]

    @cached_property
    def _speller(self) -> Callable[[str], bytes] | None:
        """How a token's name spells bytes, for the two kinds of Llama tokenizers; None for any other kind."""
        kinds = [d.get("type") for d in self._decoders]
        if kinds == ["ByteLevel"]:
            return _spell_byte_level
        replaces = [d for d in self._decoders if d.get("type") == "Replace"]
        usual = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
        spaced = all(d["pattern"] == {"String": "▁"} and d["content"] == " " for d in replaces)
        underscore = all(d.get("replacement", "▁") == "▁" for d in self._decoders)
        strips = [d for d in self._decoders if d.get("type") == "Strip"]
        only_start = all(d["content"] == " " and d["stop"] == 0 for d in strips)
        if set(kinds) <= usual and (replaces or "Metaspace" in kinds) and spaced and underscore and only_start:
            return _spell_with_fallback if "ByteFallback" in kinds else _spell_spaces
        return None

    @cached_property
    def _leading(self) -> int:
        """Spaces that the decoder takes off the beginning of a text."""
        for decoder in self._decoders:
            if decoder.get("type") == "Strip":
                return int(decoder["start"])
            if decoder.get("type") == "Metaspace" and decoder.get("prepend_scheme", "always") != "never":
                return 1
        return 0


class SentencePieceCodec:
    """A sentencepiece model file, and the tokens that the folder's other files add to it.

    A space goes ahead of a text, and where `legacy`, as such models began, of what follows a special token too.
    """

    def __init__(self, file: Path, added: Sequence[Declared], legacy: bool = True) -> None:
        from sentencepiece import SentencePieceProcessor

        content = read_file(file, MAX_TOKENIZER_BYTES) or b""
        try:
            self._model = SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            reason = quoted(str(error), 300)
            raise Error(f"{file} is not a usable sentencepiece model: {reason}; download the model again") from error
        model, count = self._model, self._model.vocab_size()
        self.specials = {model.id_to_piece(i): i for i in range(count) if model.is_control(i) or model.is_unknown(i)}
        self.specials |= {token.name: token.id for token in added if token.special}
        self._plain_added = {token.name: token.id for token in added if not token.special}
        self.special_ids = frozenset(self.specials.values())
        self._names = {token.id: token.name for token in added}
        self.size = max([count, *(i + 1 for i in self._names)])
        self._count = count
        self._bytes: dict[int, bytes] = {}
        first = model.encode("a")[:1]
        self._spaces = bool(first) and model.id_to_piece(first[0]).startswith("▁")  # ahead of a text
        alone = model.encode(_ALONE)
        self._skipped = 0 if legacy or not self._spaces or model.unk_id() in alone else len(alone)

    def encode(self, text: str, allow_special: bool) -> list[int]:
        """Ids of the text; spelled special tokens become special ids where allowed, else plain text."""
        return self._encode_sections(text, self._all_pattern if allow_special else self._plain_pattern, "")

    def encode_marked(self, text: str, mark: str) -> list[int]:
        """Ids of the text without `mark`: specials that the mark interrupts are plain text, others special ids."""
        return self._encode_sections(text, self._all_pattern, mark)

    def _encode_sections(self, text: str, pattern: re.Pattern[str], mark: str) -> list[int]:
        ids: list[int] = []
        start = 0
        for found in pattern.finditer(text):
            ids += self._encode_section(text[start : found.start()], mark, start > 0)
            ids.append(self._known[found.group()])
            start = found.end()
        return ids + self._encode_section(text[start:], mark, start > 0)

    def _encode_section(self, text: str, mark: str, follows: bool) -> list[int]:
        text = text.replace(mark, "") if mark else text
        if text and follows and self._skipped:  # behind something else, it gets no space
            return self._model.encode(_ALONE + text)[self._skipped :]
        return self._model.encode(text) if text else []

    @cached_property
    def _known(self) -> dict[str, int]:
        return self.specials | self._plain_added

    @cached_property
    def _all_pattern(self) -> re.Pattern[str]:
        return alternatives(self._known)

    @cached_property
    def _plain_pattern(self) -> re.Pattern[str]:
        return alternatives(self._plain_added)

    def surroundings(self) -> tuple[list[int], list[int]]:
        """BOS before a text, nothing after it: the convention of models that ship such a file."""
        return [self._model.bos_id()] if self._model.bos_id() >= 0 else [], []

    def longest(self) -> int:
        """Characters of the longest name, times 4, as its normalizer may shorten texts."""
        names = [self._model.id_to_piece(i) for i in range(self._count)]
        return 4 * max(map(len, [*names, *self._names.values()]))

    def eos_id(self) -> int | None:
        """The model file's own end of text."""
        return self._model.eos_id() if self._model.eos_id() >= 0 else None

    def token_id(self, text: str) -> int | None:
        """The id of a token by its exact name."""
        if text in self._known:
            return self._known[text]
        found = self._model.piece_to_id(text)
        return None if found == self._model.unk_id() else found

    def detokenizer(self, skip: frozenset[int], at_start: bool) -> Detokenizer:
        """A new stream that leaves out the tokens in `skip`."""
        return Detokenizer(_skipping(self._token_bytes, skip), 1 if at_start and self._spaces else 0)

    def token_bytes(self, token_id: int) -> bytes:
        """What one token spells by itself."""
        return self._token_bytes(token_id)

    def _token_bytes(self, token_id: int) -> bytes:
        found = self._bytes.get(token_id)
        if found is None:
            if token_id in self._names:
                found = self._names[token_id].encode()
            elif 0 <= token_id < self._count:
                found = _spell_with_fallback(self._model.id_to_piece(token_id))
            else:
                found = b""
            self._bytes[token_id] = found
        return found


def _skipping(spell: Callable[[int], bytes], skip: frozenset[int]) -> Callable[[int], bytes]:
    return (lambda token_id: b"" if token_id in skip else spell(token_id)) if skip else spell


def _spell_spaces(name: str) -> bytes:
    return name.replace("▁", " ").encode()


def _spell_with_fallback(name: str) -> bytes:
    byte = _BYTE.fullmatch(name)
    return bytes([int(byte.group(1), 16)]) if byte else _spell_spaces(name)


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(others)}


_BYTE_LEVEL = _byte_level_alphabet()


def _spell_byte_level(name: str) -> bytes:
    try:
        return bytes([_BYTE_LEVEL[c] for c in name])
    except KeyError:  # an added token with a character outside the alphabet stands for itself
        return name.encode()
