"""Tokenizers: ids of the reference libraries, special tokens as the files say, text that streams whole characters."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fake_native import BYTE_IDS, write_tokenizer
from halfturn.detokenizer import Detokenizer, WindowDetokenizer
from halfturn.error import Error
from halfturn.tokenizer import Tokenizer
from shared_data import SHARED, TOKENIZERS, needs_shared
from tokenizer_files import TEXTS, write_json, write_sentencepiece

SPECIAL_TEXTS = ["<s>", "a<s>b", "x </s> y", "</s></s>", "<s> [INST] hi [/INST]", "<unk>", "<s", "s>", "<<s>>"]


def test_import_is_light() -> None:
    heavy = "{'torch', 'numpy', 'jinja2', 'tokenizers', 'sentencepiece', 'fastapi', 'rich'}"
    code = f"import sys, halfturn; print(sorted({heavy} & {{*sys.modules}}))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.fixture
def byte_level(tmp_path: Path) -> Tokenizer:
    return Tokenizer.from_folder(write_tokenizer(tmp_path / "bytes"))


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(byte_level: Tokenizer, text: str, tmp_path: Path) -> None:
    ids = byte_level.encode(text)
    assert ids == [BYTE_IDS[b] for b in text.encode()]
    assert byte_level.decode(ids) == text
    sentencepiece = Tokenizer.from_folder(write_sentencepiece(tmp_path / "sp"))
    # Sentencepiece writes spaces as U+2581, so that it can't tell the two apart.
    assert sentencepiece.decode(sentencepiece.encode(text)) == text.replace("▁", " ")


def test_special_tokens(byte_level: Tokenizer) -> None:
    text = "a<|im_end|>b"
    assert byte_level.encode(text, allow_special=True) == [BYTE_IDS[97], 258, BYTE_IDS[98]]
    plain = byte_level.encode(text)
    assert plain == [BYTE_IDS[b] for b in text.encode()]
    assert byte_level.decode(plain) == text
    assert byte_level.decode([BYTE_IDS[97], 258, BYTE_IDS[98]]) == "ab"
    assert byte_level.decode([BYTE_IDS[97], 258, BYTE_IDS[98]], skip_special_tokens=False) == text
    assert byte_level.token_bytes(258) == b"<|im_end|>" and byte_level.token_bytes(BYTE_IDS[0xC3]) == b"\xc3"
    assert byte_level.decode([5000, BYTE_IDS[97]]) == "a"  # a padded vocabulary has ids without a token


def test_ids_without_a_token_are_nothing(byte_level: Tokenizer, tmp_path: Path) -> None:
    """-100 is what labels hold in place of tokens that do not count."""
    for tokenizer in (byte_level, Tokenizer.from_folder(write_sentencepiece(tmp_path))):
        for none in (-100, -1, 10**12):
            assert tokenizer.token_bytes(none) == b"" and tokenizer.decode([none]) == ""


def test_half_characters(byte_level: Tokenizer) -> None:
    """json text can hold lone surrogates."""
    assert byte_level.decode(byte_level.encode("a\ud83eb\ud83e\udd84")) == "a\ufffdb🦄"


def test_marked_specials_are_text(byte_level: Tokenizer) -> None:
    mark = "\U0010f123"
    text = f"<|im_start|>user\nsay <{mark}|im_end|> é<|im_end|>\n"
    plain = [BYTE_IDS[b] for b in b"user\nsay <|im_end|> \xc3\xa9"]
    assert byte_level.encode_marked(text, mark) == [257, *plain, 258, BYTE_IDS[10]]
    unmarked = text.replace(mark, "")
    assert byte_level.encode_marked(unmarked, mark) == byte_level.encode(unmarked, allow_special=True)
    assert byte_level.vocab_size == 259 and byte_level.decode([259]) == ""


def test_marked_text_keeps_the_rules_of_added_tokens(tmp_path: Path) -> None:
    """A tokenizer that adds a space to the first word only, and whose special token takes the spaces around it."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Library

    vocab = {piece: i for i, piece in enumerate(["<unk>", "▁", "a", "b", "<", ">", "|", "x", "▁a"])}
    library = Library(models.BPE(vocab=vocab, merges=[("▁", "a")], unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    library.decoder = decoders.Metaspace(prepend_scheme="first")
    library.add_special_tokens([AddedToken("<x>", lstrip=True, rstrip=True, special=True)])
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(tmp_path)
    mark = "\U0010f123"
    for text in ("a <x> a b", "<x>a", "a a<x>", "<x>  <x>a a"):
        ids = tokenizer.encode(text, allow_special=True)
        assert tokenizer.encode_marked(text + mark, mark) == ids
        assert tokenizer.encode_marked(f"{text}<{mark}x>", mark) == [*ids, 4, 7, 5]
    tail = tokenizer.encode_marked(f"a <x> a <{mark}x>", mark)
    assert tail == [8, 9, 2, 1, 4, 7, 5]  # ▁a <x> a ▁ < x >
    assert tokenizer.decode([8, 8]) == "a a"


def test_marks_that_interrupt_nothing_change_nothing(tmp_path: Path) -> None:
    """Early Llama files normalize their special tokens, so that one right behind another is spelled."""
    from tokenizers import AddedToken, models, normalizers
    from tokenizers import Tokenizer as Library

    vocab = {piece: i for i, piece in enumerate(["<unk>", "▁", "a", "<", ">", "x"])}
    library = Library(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.add_special_tokens([AddedToken("<x>", normalized=True, special=True)])
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(tmp_path)
    mark = "\U0010f123"
    for text in ("<x>a a", "a <x><x>a", "a <x> <x>a <"):
        ids = tokenizer.encode(text, allow_special=True)
        assert tokenizer.encode_marked(text + mark, mark) == ids
        assert tokenizer.encode_marked(text.replace("<x>", f"<x>{mark}"), mark) == ids
    assert 6 not in tokenizer.encode_marked(f"a <{mark}x>", mark)
    assert tokenizer.encode_marked(f"<x>a <{mark}x>", mark).count(6) == 1


def test_tokens_that_only_the_settings_declare(tmp_path: Path) -> None:
    count = Tokenizer.from_folder(write_tokenizer(tmp_path)).vocab_size
    declared = {
        str(count + 1): {"content": "<|tool|>", "special": False, "lstrip": True},
        str(count): {"content": "<|turn|>", "special": True},
        "258": {"content": "<|im_end|>", "special": True},
    }
    write_json(tmp_path, "tokenizer_config.json", {"eos_token": "<|turn|>", "added_tokens_decoder": declared})
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.vocab_size == count + 2 and count in tokenizer.eos_token_ids
    assert tokenizer.encode("a<|turn|> <|tool|>", allow_special=True) == [BYTE_IDS[97], count, count + 1]
    assert tokenizer.decode([BYTE_IDS[97], count, count + 1]) == "a<|tool|>"
    declared[str(count + 5)] = {"content": "<|late|>", "special": True}
    write_json(tmp_path, "tokenizer_config.json", {"added_tokens_decoder": declared})
    message = rf"declares '<\|late\|>' as token {count + 5}, but in .*tokenizer.json it is {count + 2}: correct the one"
    with pytest.raises(Error, match=message):
        Tokenizer.from_folder(tmp_path)


def test_ends_of_text_come_from_all_files(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path)
    write_json(folder, "config.json", {"eos_token_id": 7})
    write_json(folder, "generation_config.json", {"eos_token_id": [256, 9]})
    assert Tokenizer.from_folder(folder).eos_token_ids == {7, 9, 256, 258}
    write_json(folder, "config.json", {"eos_token_id": "</s>"})
    with pytest.raises(Error, match=r"eos_token_id in .*config.json is '</s>'"):
        Tokenizer.from_folder(folder)


def test_bos_as_the_files_say(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Library
    from tokenizers.processors import TemplateProcessing

    folder = write_tokenizer(tmp_path)
    plain = [BYTE_IDS[97]]
    settings = {"bos_token": {"content": "<|bos|>"}, "eos_token": "<|im_end|>"}
    write_json(folder, "tokenizer_config.json", settings)
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.bos_token_id == 256 and tokenizer.encode("a", add_special_tokens=True) == plain
    write_json(folder, "tokenizer_config.json", {**settings, "add_bos_token": True, "add_eos_token": True})
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode("a", add_special_tokens=True) == [256, *plain, 258]
    assert tokenizer.encode("<|bos|>a<|im_end|>", True, allow_special=True) == [256, *plain, 258]  # once
    library = Library.from_file(str(folder / "tokenizer.json"))
    library.post_processor = TemplateProcessing("<|bos|> $A", special_tokens=[("<|bos|>", 256)])
    library.save(str(folder / "tokenizer.json"))
    write_json(folder, "tokenizer_config.json", settings)
    assert Tokenizer.from_folder(folder).encode("a", add_special_tokens=True) == [256, *plain]
    write_json(folder, "tokenizer_config.json", {**settings, "add_bos_token": False})
    assert Tokenizer.from_folder(folder).encode("a", add_special_tokens=True) == plain


def test_sentencepiece_alone(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write_sentencepiece(tmp_path))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (1, {2})
    assert tokenizer.bos_token == "<s>" and tokenizer.eos_token == "</s>"
    ids = tokenizer.encode("the cat")
    assert tokenizer.encode("the cat", add_special_tokens=True) == [1, *ids]
    assert tokenizer.encode("<s>[INST]the cat", allow_special=True) == [1, 3, *ids]
    assert not {1, 3} & set(tokenizer.encode("<s>[INST]the cat"))
    mark = "\U0010f123"
    marked = tokenizer.encode_marked(f"<s>[{mark}INST]the cat", mark)
    assert marked == [1, *tokenizer.encode("[INST]the cat")]


def test_sentencepiece_with_added_tokens(tmp_path: Path) -> None:
    folder = write_sentencepiece(tmp_path)
    count = Tokenizer.from_folder(folder).vocab_size
    write_json(folder, "added_tokens.json", {"<tool>": count})
    added = {str(count + 1): {"content": "<|end|>", "special": True}, "2": {"content": "</s>", "special": True}}
    write_json(folder, "tokenizer_config.json", {"eos_token": "<|end|>", "added_tokens_decoder": added})
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.vocab_size == count + 2 and tokenizer.eos_token_ids == {count + 1}
    the = tokenizer.encode("the")
    assert tokenizer.encode("the<tool>the<|end|>", allow_special=True) == [*the, count, *the, count + 1]
    assert tokenizer.encode("the<tool>the<|end|>")[: len(the) + 1] == [*the, count]  # added, but not special
    assert tokenizer.decode([*the, count, count + 1]) == "the<tool>"


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_stream_shows_whole_characters(tmp_path: Path, kind: str) -> None:
    write = write_tokenizer if kind == "bytes" else write_sentencepiece
    tokenizer = Tokenizer.from_folder(write(tmp_path))
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choice("ab é€🦄\n▁"[: 7 + (kind == "bytes")]) for _ in range(rng.randrange(1, 12)))
        ids = tokenizer.encode(text)
        stream = tokenizer.detokenizer()
        pieces = [stream.add(i) for i in ids]
        assert "".join(pieces) == text and stream.flush() == ""
        assert "\ufffd" not in "".join(pieces)


def test_stream_of_bytes_that_are_no_text(byte_level: Tokenizer) -> None:
    stream = byte_level.detokenizer()
    pieces = [stream.add(BYTE_IDS[b]) for b in b"\xf0\x9f\xa6A\xff\xe2\x82"]
    assert pieces == ["", "", "", "\ufffdA", "\ufffd", "", ""]
    assert stream.flush() == "\ufffd"


def test_leading_space_of_sentencepiece(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write_sentencepiece(tmp_path))
    ids = tokenizer.encode("the cat")
    alone, going_on = tokenizer.detokenizer(), tokenizer.detokenizer(at_start=False)
    assert "".join(map(alone.add, [1, *ids])) == "the cat"
    assert "".join(map(going_on.add, [1, *ids])) == " the cat"


def test_sentencepiece_without_a_space_of_its_own(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write_sentencepiece(tmp_path, add_dummy_prefix=False))
    for text in (" the cat", "the cat"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sentencepiece_sections_behind_specials(tmp_path: Path) -> None:
    """With "legacy": false only the beginning of a text gets sentencepiece's space, as in transformers."""
    folder = write_sentencepiece(tmp_path)
    the, euro, both = (Tokenizer.from_folder(folder).encode(text) for text in ("the", "€", "€the"))
    bare = both[len(euro) :]
    assert the != bare and both[: len(euro)] == euro
    for legacy, later in [(None, the), (True, the), (False, bare)]:
        write_json(folder, "tokenizer_config.json", {"legacy": legacy})
        tokenizer = Tokenizer.from_folder(folder)
        assert tokenizer.encode("the") == the
        assert tokenizer.encode("the</s>the<s>the", allow_special=True) == [*the, 2, *later, 1, *later]
        mark = "\U0010f123"
        assert tokenizer.encode_marked(f"</s>{mark}the", mark) == [2, *later]


def test_each_token_is_spelled_once() -> None:
    """Linear time: a token costs its own bytes, however long the text is already."""
    spelled = []

    def spell(token: int) -> bytes:
        spelled.append(token)
        return b"ab"

    stream = Detokenizer(spell)
    for i in range(1000):
        assert stream.add(i) == "ab"
    assert spelled == list(range(1000))


def test_window_stays_short_and_equals_the_whole(byte_level: Tokenizer) -> None:
    """The way for unusual decoders gives the same text, and never decodes more than a few tokens."""
    lengths = []

    def decode(ids: list[int]) -> str:
        lengths.append(len(ids))
        return byte_level.decode(ids)

    text = "naïve 🦄 café " * 50
    stream = WindowDetokenizer(decode)
    pieces = [stream.add(i) for i in byte_level.encode(text)]
    assert "".join(pieces) + stream.flush() == text and max(lengths) <= 8


def test_unusual_decoder_is_left_to_the_library(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models

    library = Library(models.WordPiece(vocab={"[UNK]": 0, "un": 1, "##usual": 2, "word": 3}, unk_token="[UNK]"))
    library.decoder = decoders.WordPiece()
    library.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_folder(tmp_path).decode([1, 2, 3]) == "unusual word"


def test_broken_added_tokens_are_refused(tmp_path: Path) -> None:
    from sentencepiece import SentencePieceTrainer

    (tmp_path / "text").write_text("a b c d e f\n" * 50)
    SentencePieceTrainer.train(input=str(tmp_path / "text"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=16,
                               hard_vocab_limit=False, minloglevel=2)  # fmt: skip
    (tmp_path / "tokenizer.vocab").unlink()
    for name, contents in (
        ("added_tokens.json", [{"a": "x"}, {"a": None}, {"a": -1}, {"a": 2**40}]),
        (
            "tokenizer_config.json",
            [{"added_tokens_decoder": found} for found in ([1], {"x": {"content": "a"}}, {"1": {}}, {"1": "a"})],
        ),
    ):
        for content in contents:
            write_json(tmp_path, name, content)
            with pytest.raises(Error, match=r"the added tokens of .* are not usable"):
                Tokenizer.from_folder(tmp_path)
        (tmp_path / name).unlink()
    assert Tokenizer.from_folder(tmp_path).encode("a b")


def test_errors_of_the_library_are_sentences(tmp_path: Path) -> None:
    """Files that it reads and then can't work with: it raises plain exceptions, or panics."""
    from tokenizers import Tokenizer as Library
    from tokenizers import models

    Library(models.WordLevel(vocab={"x": 0}, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(Error, match=r"tokenizer\.json is not a usable tokenizer"):
        Tokenizer.from_folder(tmp_path)
    write_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    special = {"SpecialToken": {"id": "<nowhere>", "type_id": 0}}
    single = [special, {"Sequence": {"id": "A", "type_id": 0}}]
    content["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {}}
    file.write_text(json.dumps(content))
    with pytest.raises(Error, match=r"tokenizer\.json is not a usable tokenizer"):
        Tokenizer.from_folder(tmp_path).encode("a", add_special_tokens=True)


@pytest.mark.parametrize("write", [write_tokenizer, write_sentencepiece])
def test_files_too_large_for_a_vocabulary(tmp_path: Path, write: Any) -> None:
    folder = write(tmp_path / "folder")
    name = next(n for n in ("tokenizer.json", "tokenizer.model") if (folder / n).exists())
    os.truncate(folder / name, 3 << 30)
    with pytest.raises(Error, match=f"{name} has {3 << 30} bytes, at most {256 << 20} are read"):
        Tokenizer.from_folder(folder)


def test_what_the_library_says_is_cut(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["version"] = "x" * 100_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(Error, match=r"tokenizer\.json is not a usable tokenizer") as refused:
        Tokenizer.from_folder(tmp_path)
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_links_that_lead_to_no_file(tmp_path: Path, name: str) -> None:
    folder = write_tokenizer(tmp_path / "folder")
    (folder / name).unlink(missing_ok=True)
    for target in ("nowhere", name):
        (folder / name).symlink_to(target)
        with pytest.raises(Error, match=f"/{name} is a link to {target}, where no file is: restore"):
            Tokenizer.from_folder(folder)
        (folder / name).unlink()


@pytest.mark.parametrize("end", [2**40, [2**31], -1, 2.5])
def test_ends_that_are_no_token_ids(tmp_path: Path, end: Any) -> None:
    write_tokenizer(tmp_path)
    write_json(tmp_path, "generation_config.json", {"eos_token_id": end})
    with pytest.raises(Error, match=r"eos_token_id in .*generation_config\.json is "):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("write", [write_tokenizer, write_sentencepiece])
def test_a_folder_whose_name_is_not_utf8(tmp_path: Path, write: Any) -> None:
    folder = write(tmp_path / "folder").rename(tmp_path / os.fsdecode(b"no\xff"))
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.decode(tokenizer.encode("a cat")) == "a cat"


def test_refusals_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(Error, match="is not a folder"):
        Tokenizer.from_folder(tmp_path / "nothing")
    with pytest.raises(Error, match=r"has neither tokenizer\.json nor a sentencepiece"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(Error, match=r"tokenizer\.model is not a usable sentencepiece model"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE"')
    with pytest.raises(Error, match=r"tokenizer\.json is not a usable tokenizer"):
        Tokenizer.from_folder(tmp_path)
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[1, 2")
    with pytest.raises(Error, match=r"tokenizer_config\.json can't be read as json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[1, 2]")
    with pytest.raises(Error, match="holds a list, not a json object"):
        Tokenizer.from_folder(tmp_path)


# Real tokenizers


def books() -> list[str]:
    return [path.read_text(encoding="utf-8")[:60_000] for path in sorted((SHARED / "text").glob("*.txt"))]


@pytest.fixture(scope="module")
def llama2() -> tuple[Tokenizer, Tokenizer]:
    """The same tokenizer through both libraries."""
    both = TOKENIZERS / "llama2"
    tokenizer = Tokenizer.from_folder(both)
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(both / "tokenizer.model", folder)
        return tokenizer, Tokenizer.from_folder(folder)


@needs_shared
def test_llama2_is_the_same_through_both_libraries(llama2: tuple[Tokenizer, Tokenizer]) -> None:
    fast, slow = llama2
    assert fast.vocab_size == slow.vocab_size == 32000
    assert fast.specials == slow.specials
    for text in [*(t for t in TEXTS if "\0" not in t), *SPECIAL_TEXTS, *books()]:
        for allow in (False, True):
            ids = fast.encode(text, add_special_tokens=True, allow_special=allow)
            assert ids == slow.encode(text, add_special_tokens=True, allow_special=allow), text[:50]
            assert fast.decode(ids) == slow.decode(ids)
            assert fast.decode(ids, skip_special_tokens=False) == slow.decode(ids, skip_special_tokens=False)
        if not any(special in text for special in ("<s>", "</s>", "<unk>")):
            assert fast.decode(fast.encode(text)) == text.replace("▁", " ")


@needs_shared
def test_mistral_v3_control_tokens(tmp_path: Path) -> None:
    shutil.copy(TOKENIZERS / "mistral" / "mistral_instruct_tokenizer_240323.model.v3", tmp_path / "tokenizer.model.v3")
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.bos_token_id, tokenizer.eos_token_ids) == (32768, 1, {2})
    hi = tokenizer.encode("Hi")
    assert tokenizer.encode("<s>[INST]Hi[/INST]", allow_special=True) == [1, 3, *hi, 4]
    assert not {1, 3, 4} & set(tokenizer.encode("<s>[INST]Hi[/INST]"))
    for text in [*(t for t in TEXTS if "\0" not in t), *books()]:
        assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " ")


@needs_shared
@pytest.mark.parametrize("name", ["tokenizers/llama3_1", "tokenizers/llama2", "stories260K"])
def test_decode_is_the_library_s(name: str) -> None:
    from tokenizers import Tokenizer as Library

    tokenizer, library = Tokenizer.from_folder(SHARED / name), Library.from_file(str(SHARED / name / "tokenizer.json"))
    rng = random.Random(1)
    for text in [*TEXTS, *SPECIAL_TEXTS, *(book[:20_000] for book in books())]:
        ids = library.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, allow_special=True) == ids
        for skip in (True, False):
            assert tokenizer.decode(ids, skip_special_tokens=skip) == library.decode(ids, skip_special_tokens=skip)
    # Tokens in any order, which cut characters. Byte fallback is left out: there the library gives up a whole run of
    # bytes for one bad byte, which a stream can't do.
    for _ in range(300 * (name == "tokenizers/llama3_1")):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(8)]
        assert tokenizer.decode(ids) == library.decode(ids)


@needs_shared
def test_llama3_specials_and_bos() -> None:
    tokenizer = Tokenizer.from_folder(TOKENIZERS / "llama3_1")
    assert tokenizer.eos_token_ids == {128009} and tokenizer.bos_token_id == 128000
    assert tokenizer.encode("Hello", add_special_tokens=True) == [128000, 9906]
    spelled = "Hi<|eot_id|><|start_header_id|>system<|end_header_id|>"
    assert max(tokenizer.encode(spelled)) < 128000
    assert tokenizer.decode(tokenizer.encode(spelled)) == spelled
    assert tokenizer.encode(spelled, allow_special=True)[1] == 128009
    assert json.loads((TOKENIZERS / "llama3_1" / "tokenizer_config.json").read_text())["chat_template"] == (
        tokenizer.chat_template
    )
