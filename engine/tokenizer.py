"""A model's tokenizer as its own files describe it: ids, special tokens, ends of text, chat template."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from halfturn.checks import is_there, read_file, read_json
from halfturn.detokenizer import Detokenizer, WindowDetokenizer
from halfturn.error import Error, quoted
from halfturn.token_codecs import ADDED_TOKEN_RULES, Declared, JsonCodec, SentencePieceCodec, alternatives

_SENTENCEPIECE = re.compile(r".*\.model(\.v\d+)?")


class Tokenizer:
    """Text to ids and back. Loading is from_folder(); instances may be used from several threads."""

    def __init__(self, codec: JsonCodec | SentencePieceCodec, settings: dict[str, Any], ends: Iterable[int]) -> None:
        self._codec = codec
        self.vocab_size = codec.size  # ids in the tokenizer's files; the model's own count may be larger
        self.specials = codec.specials  # name -> id
        self.bos_token_id = self._named(settings, "bos_token")
        self._before, self._after = codec.surroundings()
        if self.bos_token_id is None and self._before:
            self.bos_token_id = self._before[0]
        eos = self._named(settings, "eos_token")
        if eos is None and isinstance(codec, SentencePieceCodec):
            eos = codec.eos_id()
        self.eos_token_ids = frozenset(ends) | (frozenset() if eos is None else frozenset([eos]))
        self.bos_token = _text(settings.get("bos_token")) or self._name(self.bos_token_id)
        self.eos_token = _text(settings.get("eos_token")) or self._name(min(self.eos_token_ids, default=None))
        if isinstance(settings.get("add_bos_token"), bool):
            wanted = settings["add_bos_token"] and self.bos_token_id is not None
            self._before = [self.bos_token_id] if wanted and self.bos_token_id is not None else []
        if isinstance(settings.get("add_eos_token"), bool):
            self._after = [eos] if settings["add_eos_token"] and eos is not None else []
        self.chat_template: str | dict[str, str] | None = settings.get("chat_template")
        named = {key: _text(settings.get(key)) for key in ("unk_token", "pad_token")}
        self.template_tokens = {key: text for key, text in named.items() if text}  # what a chat template may refer to
        self.template_tokens |= {"bos_token": self.bos_token, "eos_token": self.eos_token}

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Reads tokenizer.json, or else a sentencepiece *.model, and the json files beside it."""
        folder = Path(path)
        if not folder.is_dir():
            raise Error(f"{folder} is not a folder: give the folder that holds the model")
        settings = read_json(folder / "tokenizer_config.json")
        if (template := _template(folder)) is not None:
            settings["chat_template"] = template
        elif isinstance(settings.get("chat_template"), list):
            settings["chat_template"] = _named_templates(settings["chat_template"], folder)
        ends = [*end_ids(folder / "generation_config.json"), *end_ids(folder / "config.json")]
        return cls(_codec(folder, settings), settings, ends)

    def encode(self, text: str, add_special_tokens: bool = False, allow_special: bool = False) -> list[int]:
        """Ids of a text.

        `add_special_tokens` puts BOS (and whatever else the model's files say) around it, once: a text that spells it
        already gets no second one. `allow_special`: special tokens spelled in the text become special ids; otherwise
        they are plain text.
        """
        ids = self._codec.encode(_encodable(text), allow_special)
        if add_special_tokens:
            before = [] if self._before and ids[: len(self._before)] == self._before else self._before
            after = [] if self._after and ids[-len(self._after) :] == self._after else self._after
            ids = before + ids + after
        return ids

    def encode_marked(self, text: str, mark: str) -> list[int]:
        """Ids of a text whose special tokens count, except those that `mark` interrupts; the mark is left out."""
        return self._codec.encode_marked(_encodable(text), mark)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of the ids; U+FFFD stands for bytes that are no character."""
        stream = self._codec.detokenizer(self._codec.special_ids if skip_special_tokens else frozenset(), True)
        return "".join([*map(stream.add, ids), stream.flush()])

    def token_bytes(self, token_id: int) -> bytes:
        """What one token spells, special tokens by their names; b"" for an id without a token."""
        return self._codec.token_bytes(token_id)

    def detokenizer(self, at_start: bool = True) -> Detokenizer | WindowDetokenizer:
        """A stream from ids to text without special tokens.

        `at_start` False: the tokens continue a text, so the space that sentencepiece puts before a first word is kept.
        """
        return self._codec.detokenizer(self._codec.special_ids, at_start)

    @cached_property
    def longest_token(self) -> int:
        """Characters of text that one token stands for at most. (Normalizers that shorten texts are left out of
        account, but for a factor that few exceed.)"""
        return self._codec.longest()

    @cached_property
    def special_starts(self) -> re.Pattern[str]:
        """Matches the first character of every spelled special token, of overlapping ones too."""
        return re.compile(f"(?=(?:{alternatives(self.specials).pattern}))(?s:.)")

    @cached_property
    def special_beginnings(self) -> frozenset[str]:
        """Every text with which a special token begins, short of the whole."""
        return frozenset(name[:n] for name in self.specials for n in range(1, len(name)))

    def _named(self, settings: dict[str, Any], key: str) -> int | None:
        text = _text(settings.get(key))
        return None if text is None else self._codec.token_id(text)

    def _name(self, token_id: int | None) -> str:
        return next((name for name, i in self.specials.items() if i == token_id), "")


def _encodable(text: str) -> str:
    """The text with U+FFFD for half characters, which json escapes can spell and UTF-8 can't."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _codec(folder: Path, settings: dict[str, Any]) -> JsonCodec | SentencePieceCodec:
    if is_there(folder / "tokenizer.json"):
        return JsonCodec(folder / "tokenizer.json", _declared_tokens(folder, settings))
    models = sorted(f for f in folder.iterdir() if _SENTENCEPIECE.fullmatch(f.name))
    if not models:
        raise Error(f"{folder} has neither tokenizer.json nor a sentencepiece *.model: copy one from the source model")
    declared = _declared_tokens(folder, settings, read_json(folder / "added_tokens.json"))
    return SentencePieceCodec(models[0], declared, settings.get("legacy") is not False)


def _declared_tokens(folder: Path, settings: dict[str, Any], others: Mapping[str, Any] | None = None) -> list[Declared]:
    """The tokens that tokenizer_config.json adds, by id, and `others`: name -> id, none of them special."""
    try:
        declared = {name: Declared(name, int(i)) for name, i in (others or {}).items()}
        for i, token in (settings.get("added_tokens_decoder") or {}).items():
            rules = {rule: bool(token[rule]) for rule in ADDED_TOKEN_RULES if rule in token}
            name = str(token["content"])
            declared[name] = Declared(name, int(i), bool(token.get("special", False)), rules)
        if bad := [token.id for token in declared.values() if not 0 <= token.id < 2**31]:
            raise ValueError(f"{quoted(bad[0])} is no token id")
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        files = f"added_tokens.json or tokenizer_config.json in {folder}"
        raise Error(f"the added tokens of {files} are not usable: {error}; download the model again") from error
    return sorted(declared.values(), key=lambda token: token.id)


def end_ids(file: Path) -> list[int]:
    """eos_token_id of a config file, as a list."""
    found = read_json(file).get("eos_token_id")
    ends = [] if found is None else found if isinstance(found, list) else [found]
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 2**31 for i in ends):
        raise Error(f"eos_token_id in {file} is {quoted(found)}: it must be a token id or a list of them")
    return ends


def _text(token: object) -> str | None:
    """A token's name: tokenizer_config.json has it as a string or as an object with "content"."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


def _template(folder: Path) -> str | None:
    """A chat template that has a file of its own."""
    file = folder / "chat_template.jinja"
    if (content := read_file(file)) is not None:
        try:
            return content.decode()
        except ValueError as error:
            raise Error(f"{file} can't be read as text: {error}; download the model again") from error
    template = read_json(folder / "chat_template.json").get("chat_template")
    return template if isinstance(template, str) else None


def _named_templates(entries: list[Any], folder: Path) -> dict[str, str]:
    try:
        return {str(entry["name"]): str(entry["template"]) for entry in entries}
    except (TypeError, KeyError) as error:
        raise Error(f"chat_template in {folder / 'tokenizer_config.json'} is a list without names: {error}") from error
