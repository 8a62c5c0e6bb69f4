"""Tokenizers of GGUF files: the ids of the tokenizers that the models were published with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from halfturn.converter.checkpoint import open_source
from halfturn.converter.gguf_tokenizer import PRE_TOKENIZERS, merges_from_scores, special_ids, tokenizer_files
from halfturn.error import Error
from shared_data import SHARED, needs_shared
from tiny_sources import SMOLLM2, config_of, needs_model, write_gguf
from tokenizer_files import TEXTS

SPECIAL = "<s> not special </s> <|im_start|>"


def build(metadata: Mapping[str, Any], folder: Path) -> Any:
    from tokenizers import Tokenizer

    for name, content in tokenizer_files(metadata, 128, Path("a.gguf")).items():
        (folder / name).write_text(json.dumps(content))
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def metadata_of(reference: Mapping[str, Any], kind: str, **more: Any) -> dict[str, Any]:
    """What a GGUF file would say of a byte-level tokenizer.json."""
    added = {token["id"]: token for token in reference["added_tokens"]}
    tokens = {i: token for token, i in reference["model"]["vocab"].items()}
    tokens.update({i: token["content"] for i, token in added.items()})
    merges = [m if isinstance(m, str) else " ".join(m) for m in reference["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": kind,
        "tokenizer.ggml.tokens": [tokens[i] for i in range(len(tokens))],
        "tokenizer.ggml.token_type": [3 if i in added else 1 for i in range(len(tokens))],
        "tokenizer.ggml.merges": merges,
        **{f"tokenizer.ggml.{k}": v for k, v in more.items()},
    }


def shared_texts() -> list[str]:
    return [p.read_text(encoding="utf-8") for p in sorted((SHARED / "text").glob("*.txt"))]


@needs_shared
@needs_model
def test_smollm2_ids_equal_the_reference_tokenizer(tmp_path: Path) -> None:
    """Digits one by one, then GPT-2's words: the ids of the pre-tokenizer that the model was published with."""
    from tokenizers import Tokenizer

    source = open_source(SMOLLM2)
    source.copy_tokenizer(tmp_path)
    ours = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    published = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    published["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, level]}
    reference = Tokenizer.from_str(json.dumps(published))
    for text in [*TEXTS, SPECIAL, *(text[:60_000] for text in shared_texts())]:
        assert ours.encode(text).ids == reference.encode(text).ids
        assert ours.decode(ours.encode(text).ids, skip_special_tokens=False) == text
    assert ours.encode("<|im_start|>user").ids == [1, 4093]
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["eos_token"] == "<|im_end|>" and "<|im_start|>" in config["chat_template"]
    assert config["add_bos_token"] is False
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == 2
    assert source.config.tie_word_embeddings and source.config.rms_norm_eps == 1e-5


@needs_shared
def test_llama3_ids_equal_the_published_tokenizer(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    file = SHARED / "tokenizers" / "llama3_1" / "tokenizer.json"
    reference = Tokenizer.from_file(str(file))
    published = json.loads(file.read_text("utf-8"))
    ours = build(metadata_of(published, "llama-bpe", bos_token_id=128000, eos_token_id=128009), tmp_path)
    for text in [*TEXTS, SPECIAL, "<|start_header_id|>user<|end_header_id|>", *(t[:60_000] for t in shared_texts())]:
        assert ours.encode(text).ids == reference.encode(text).ids
        assert ours.decode(ours.encode(text).ids) == reference.decode(reference.encode(text).ids)


@needs_shared
def test_llama2_ids_equal_the_published_tokenizer(tmp_path: Path) -> None:
    """Sentencepiece: merges built from scores give the ids of tokenizer.json and of the .model file."""
    import sentencepiece
    from tokenizers import Tokenizer

    folder = SHARED / "tokenizers" / "llama2"
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    pieces = range(model.vocab_size())
    types = [2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1 for i in pieces]

    def tokenizer(writer: Any) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list([model.id_to_piece(i) for i in pieces])
        writer.add_token_scores([model.get_score(i) for i in pieces])
        writer.add_token_types(types)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        writer.add_chat_template("{{ messages }}")

    write_gguf(tmp_path / "a.gguf", config_of({"vocab_size": 32000, "hidden_size": 8}), settings=tokenizer)
    source = open_source(tmp_path / "a.gguf")
    assert (source.config.bos_token_id, source.config.eos_token_id, source.config.vocab_size) == (1, 2, 32000)
    source.copy_tokenizer(tmp_path)
    ours = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    reference = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in [*TEXTS, SPECIAL, *(text[:60_000] for text in shared_texts())]:
        ids = ours.encode(text).ids
        assert ids == reference.encode(text).ids
        assert ours.decode(ids) == reference.decode(ids)
        if text and "<s>" not in text:
            assert ids == [1, *model.encode(text)]


def test_merges_from_scores_known_answer() -> None:
    """ "abc" is made either way, the better piece first; single characters are made by nothing."""
    pieces = {"a": -10.0, "b": -11.0, "c": -12.0, "ab": -2.0, "bc": -1.0, "abc": -3.0}
    assert merges_from_scores(pieces) == [("b", "c"), ("a", "b"), ("a", "bc"), ("ab", "c")]


def test_a_sentencepiece_file_that_names_no_special_tokens_has_the_usual_ones(tmp_path: Path) -> None:
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "a", "b", "ab"],
        "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1],
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -2.0, -3.0, -1.0],
        "tokenizer.ggml.add_space_prefix": False,
    }
    assert special_ids(metadata) == (1, [2], None)
    assert build(metadata, tmp_path).encode("ab?").ids == [1, 5, 0]
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": 2}
    assert special_ids({**metadata, "tokenizer.ggml.eos_token_id": 3}) == (1, [3], None)


def test_runs_of_equal_scores_are_joined_from_the_left() -> None:
    """Sentencepiece takes the leftmost pair of those with the best score; all runs of spaces of Llama 2 share one."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    pieces = {"\u2581" * n: -1e9 for n in range(1, 17)}
    vocabulary = {piece: n for n, piece in enumerate(pieces)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges_from_scores(pieces)))
    for length in range(1, 100):
        whole, rest = divmod(length, 16)
        assert list(map(len, tokenizer.encode("\u2581" * length).tokens)) == [16] * whole + [rest] * bool(rest)


def small_metadata(**more: Any) -> dict[str, Any]:
    tokens = ["<|endoftext|>", "<|eot_id|>", "a", "b", "ab"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 1, 1, 1],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
        **more,
    }


def test_bos_eos_and_ends_of_turn(tmp_path: Path) -> None:
    """A template that ends turns with another control token than eos adds that token to the ends of a reply."""
    metadata = small_metadata(**{"tokenizer.chat_template": "{{ x }}<|eot_id|>"})
    assert special_ids(metadata) == (0, [0, 1], None)
    files = tokenizer_files(metadata, 128, Path("a.gguf"))
    assert files["generation_config.json"] == {"bos_token_id": 0, "eos_token_id": [0, 1]}
    assert files["tokenizer.json"]["post_processor"] is None
    both = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    assert build(small_metadata(**both), tmp_path).encode("abb").ids == [0, 4, 3, 0]
    assert build(small_metadata(), tmp_path).encode("abb").ids == [4, 3]
    assert special_ids(small_metadata()) == (0, [0], None)


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("gpt-2", ["I", "'ll", "ĠbeAbC", "Ġ1234", "Ġ", "Ġ!!", "Ċ"]),
        ("smollm", ["I", "'ll", "ĠbeAbC", "Ġ", "1", "2", "3", "4", "Ġ", "Ġ!!", "Ċ"]),
        ("llama-bpe", ["I", "'ll", "ĠbeAbC", "Ġ", "123", "4", "Ġ", "Ġ!!Ċ"]),
        ("qwen2", ["I", "'ll", "ĠbeAbC", "Ġ", "1", "2", "3", "4", "Ġ", "Ġ!!Ċ"]),
        ("tekken", ["I", "'ll", "Ġbe", "Ab", "C", "Ġ", "1", "2", "3", "4", "Ġ", "Ġ!!Ċ"]),
    ],
)
def test_pre_tokenizers_known_answer(tmp_path: Path, name: str, pieces: list[str]) -> None:
    tokenizer = build(small_metadata(**{"tokenizer.ggml.pre": name}), tmp_path)
    split = tokenizer.pre_tokenizer.pre_tokenize_str("I'll beAbC 1234  !!\n")
    assert [piece for piece, _ in split] == pieces


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
def test_every_pre_tokenizer_loads_and_loses_nothing(tmp_path: Path, name: str) -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = ["<|end|>", *sorted(ByteLevel.alphabet())]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] + [1] * 256,
        "tokenizer.ggml.merges": ["Ġ t"],
    }
    metadata["tokenizer.ggml.tokens"] = [*tokens, "Ġt"]
    metadata["tokenizer.ggml.token_type"] = [3] + [1] * 257
    tokenizer = build(metadata, tmp_path)
    for text in [*TEXTS, SPECIAL]:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": "bert"}, "tokenizer of kind 'bert'"),
        ({"tokenizer.ggml.pre": "nobody"}, "uses the pre-tokenizer 'nobody', known are default, gpt-2"),
        ({"tokenizer.ggml.merges": []}, "no usable tokenizer.ggml.merges"),
        ({"tokenizer.ggml.tokens": ["a", "b", "a", "c", "d"]}, "has the token 'a' twice"),
        ({"tokenizer.ggml.token_type": [3]}, "1 token types for 5 tokens"),
        ({"tokenizer.ggml.bos_token_id": 5}, "bos_token_id is 5, the vocabulary has 5 tokens"),
        ({"tokenizer.ggml.model": "llama"}, "0 token scores for 5 tokens"),
    ],
)
def test_refused_tokenizers(change: dict[str, Any], message: str) -> None:
    with pytest.raises(Error, match=message):
        tokenizer_files(small_metadata(**change), 128, Path("a.gguf"))
