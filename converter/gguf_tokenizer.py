"""GGUF tokenizer metadata -> tokenizer.json, tokenizer_config.json, special_tokens_map.json, generation_config.json.

Two kinds: "gpt2" (byte-level BPE with a named pre-tokenizer) and "llama" (sentencepiece BPE whose merges are implied by
the scores). The result is what library tokenizers reads; the ids are the same as llama.cpp's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from halfturn.error import Error, quoted

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _llama3(digits: str) -> str:
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    )


TOKENS = "tokenizer.ggml.tokens"
# Special tokens of a sentencepiece tokenizer whose file names none, as llama.cpp takes them.
SENTENCEPIECE_IDS = {"unknown": 0, "bos": 1, "eos": 2}


class PreTokenizer(NamedTuple):
    """Regular expressions that split the text one after the other; whether whole words skip the merges; default BOS."""

    splits: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_PLAIN = PreTokenizer((_GPT2,))
_DIGITS = PreTokenizer((r"\p{N}", _GPT2))
_LLAMA3 = PreTokenizer((_llama3(r"\p{N}{1,3}"),), ignore_merges=True, add_bos=True)
_TEKKEN = PreTokenizer(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    ignore_merges=True,
    add_bos=True,
)
# llama.cpp's guess for files that name no pre-tokenizer; their true one is not known.
_GUESS = PreTokenizer((r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"))

# tokenizer.ggml.pre -> how text is split; the names are llama.cpp's.
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "default": _GUESS,
    "gpt-2": _PLAIN,
    "mpt": _PLAIN,
    "olmo": _PLAIN,
    "jais": _PLAIN,
    "trillion": _PLAIN,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "command-r": _DIGITS,
    "codeshell": _DIGITS,
    "exaone": _DIGITS,
    "minerva-7b": _DIGITS,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "pixtral": _LLAMA3,
    "smaug-bpe": PreTokenizer(_LLAMA3.splits),
    "dbrx": PreTokenizer(_LLAMA3.splits),
    "qwen2": PreTokenizer((_llama3(r"\p{N}"),)),
    "stablelm2": PreTokenizer((_llama3(r"\p{N}"),)),
    "tekken": _TEKKEN,
}

# Ends of turn that chat templates write although the file's eos is another token (early Llama 3 files).
ENDS_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|eom_id|>")


def special_ids(metadata: Mapping[str, Any]) -> tuple[int | None, list[int], int | None]:
    """(bos, every token that ends a reply with eos first, pad), as ids."""
    tokens: list[str] = metadata.get(TOKENS) or []
    types: list[int] = metadata.get("tokenizer.ggml.token_type") or []
    if not isinstance(tokens, list) or not isinstance(types, list):
        raise Error("tokenizer.ggml.tokens or tokenizer.ggml.token_type is no list; download the file again")

    ends = [i for i in (_special_id(metadata, name) for name in ("eos", "eot", "eom")) if i is not None]
    template = str(metadata.get("tokenizer.chat_template", ""))
    for text in ENDS_OF_TURN:
        if text in template and text in tokens:
            index = tokens.index(text)
            if index < len(types) and types[index] == CONTROL:
                ends.append(index)
    return _special_id(metadata, "bos"), list(dict.fromkeys(ends)), _special_id(metadata, "padding")


def _special_id(metadata: Mapping[str, Any], name: str) -> int | None:
    """The token that the file, or else llama.cpp, gives this part; None where there is none."""
    defaults = SENTENCEPIECE_IDS if metadata.get("tokenizer.ggml.model") == "llama" else {}
    value, tokens = metadata.get(f"tokenizer.ggml.{name}_token_id", defaults.get(name)), metadata.get(TOKENS)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise Error(f"tokenizer.ggml.{name}_token_id is {quoted(value)}; it must be a token id")
    if value is not None and tokens and not 0 <= value < len(tokens):
        raise Error(f"tokenizer.ggml.{name}_token_id is {value}, the vocabulary has {len(tokens)} tokens")
    return value


def tokenizer_files(metadata: Mapping[str, Any], context: int, path: Path) -> dict[str, dict[str, Any]]:
    """File name -> JSON content. Raises Error, naming the file, for a tokenizer that is absent or of another kind."""
    kind = metadata.get("tokenizer.ggml.model")
    tokens: list[str] = metadata.get("tokenizer.ggml.tokens") or []
    if kind not in ("gpt2", "llama") or not tokens:
        raise Error(
            f"{path.name} has a tokenizer of kind {kind!r} with {len(tokens)} tokens; known are 'gpt2' and 'llama'"
        )
    types: list[int] = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise Error(f"{path.name} has {len(types)} token types for {len(tokens)} tokens; the file is damaged")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        twice = next(t for i, t in enumerate(tokens) if vocabulary[t] != i)
        raise Error(f"{path.name} has the token {twice!r} twice; its tokenizer can't be carried over")
    bos, eos, pad = special_ids(metadata)
    unknown = _special_id(metadata, "unknown")
    if kind == "gpt2":
        name = metadata.get("tokenizer.ggml.pre", "default")
        if name not in PRE_TOKENIZERS:
            raise Error(
                f"{path.name} uses the pre-tokenizer {name!r}, known are {', '.join(PRE_TOKENIZERS)}; convert from the "
                "Hugging Face folder"
            )
        parts = _byte_level(metadata, vocabulary, PRE_TOKENIZERS[name], path)
        default_bos = PRE_TOKENIZERS[name].add_bos
    else:
        parts = _sentencepiece(metadata, tokens, types, unknown, path)
        default_bos = True
    add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", default_bos)) and bos is not None
    add_eos = bool(metadata.get("tokenizer.ggml.add_eos_token", False)) and bool(eos)
    added = [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": types[i] != USER_DEFINED,
        }
        for i, token in enumerate(tokens)
        if types[i] in (CONTROL, USER_DEFINED, UNKNOWN)
    ]
    before = [(tokens[bos], bos)] if add_bos and bos is not None else []
    after = [(tokens[eos[0]], eos[0])] if add_eos else []
    named = {"bos_token": bos, "eos_token": eos[0] if eos else None, "pad_token": pad, "unk_token": unknown}
    special = {key: tokens[i] for key, i in named.items() if i is not None}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": add_bos,
        "add_eos_token": add_eos,
        "added_tokens_decoder": {str(a["id"]): {k: a[k] for k in a if k != "id"} for a in added},
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        **special,
    }
    if metadata.get("tokenizer.chat_template"):
        config["chat_template"] = metadata["tokenizer.chat_template"]
    generation = {"bos_token_id": bos, "eos_token_id": eos[0] if len(eos) == 1 else eos, "pad_token_id": pad}
    return {
        "tokenizer.json": {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "post_processor": _template(before, after),
            **parts,
        },
        "tokenizer_config.json": config,
        "special_tokens_map.json": special,
        "generation_config.json": {k: v for k, v in generation.items() if v not in (None, [])},
    }


def merges_from_scores(pieces: Mapping[str, float]) -> list[tuple[str, str]]:
    """The merge list under which BPE joins what sentencepiece would: pairs ordered by the score of what they make.

    pieces: normal tokens and their scores. Every way to split a piece into two pieces is a merge of that piece's rank;
    among these the shorter left part comes first, so that the order is a function of the pieces alone. Of pieces with
    the same score (Llama 2's runs of spaces) the longer comes first: sentencepiece then takes the leftmost pair, and
    so lengthens a run from its beginning.
    """
    found: list[tuple[float, int, str, int]] = []
    for piece, score in pieces.items():
        for cut in range(1, len(piece)):
            if piece[:cut] in pieces and piece[cut:] in pieces:
                found.append((-score, -len(piece), piece, cut))
    found.sort()
    return [(piece[:cut], piece[cut:]) for _, _, piece, cut in found]


def _byte_level(
    metadata: Mapping[str, Any], vocabulary: dict[str, int], pre: PreTokenizer, path: Path
) -> dict[str, Any]:
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges") or []]
    if not merges or any(len(m) != 2 for m in merges):
        raise Error(f"{path.name} has no usable tokenizer.ggml.merges; its tokenizer can't be carried over")
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in pre.splits
    ]
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, level]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre.ignore_merges,
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int], unknown: int | None, path: Path
) -> dict[str, Any]:
    scores: list[float] = metadata.get("tokenizer.ggml.scores") or []
    if len(scores) != len(tokens):
        raise Error(f"{path.name} has {len(scores)} token scores for {len(tokens)} tokens; the file is damaged")
    pieces = {t: s for t, s, kind in zip(tokens, scores, types) if kind == NORMAL}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    normalizers: list[dict[str, Any]] = [replace]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        normalizers.insert(0, {"type": "Prepend", "prepend": "▁"})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None if unknown is None else tokens[unknown],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": any(kind == BYTE for kind in types),
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges_from_scores(pieces),
        },
    }


def _template(before: list[tuple[str, int]], after: list[tuple[str, int]]) -> dict[str, Any] | None:
    """Post-processor that puts BOS before and EOS after the text, or None where neither is wanted."""
    if not before and not after:
        return None

    def sequence(name: str, kind: int) -> list[dict[str, Any]]:
        return [
            *({"SpecialToken": {"id": token, "type_id": kind}} for token, _ in before),
            {"Sequence": {"id": name, "type_id": kind}},
            *({"SpecialToken": {"id": token, "type_id": kind}} for token, _ in after),
        ]

    return {
        "type": "TemplateProcessing",
        "single": sequence("A", 0),
        "pair": sequence("A", 0) + sequence("B", 1),
        "special_tokens": {t: {"id": t, "ids": [i], "tokens": [t]} for t, i in before + after},
    }
