"""Model.load, and the Generator on the compiled engine: the same tokens alone, in a batch, from the cache."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

np = pytest.importorskip("numpy")

from checkpoints import write_checkpoint  # noqa: E402
from halfturn import Generator, Model, SamplingParams  # noqa: E402
from halfturn.error import ContextError, Error  # noqa: E402
from tokenizer_files import write_sentencepiece  # noqa: E402

PROMPTS: list[list[int]] = [[5, 6, 7], [9] * 70, list(range(4, 200)), [11]]
GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", tokenizer=True, rotation="hadamard")


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return Model.load(folder, threads=1)


@pytest.fixture
def generator(model: Model) -> Iterator[Generator]:
    with Generator(model) as made:
        yield made


@pytest.fixture(scope="module")
def alone(model: Model) -> list[list[int]]:
    """Each prompt's greedy tokens, from logits of a step with this prompt only, without any cache."""
    found = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        pages = list(range(model.native.pages))
        for _ in range(40):
            row = model.native.logits([model.backend.Item(tokens, 0, pages)])[-1]
            row[list(model.tokenizer.eos_token_ids)] = -np.inf
            tokens.append(int(row.argmax()))
        found.append(tokens[len(prompt) :])
    return found


def draw(generator: Generator) -> list[list[int]]:
    return [output.token_ids for output in generator.generate(PROMPTS, GREEDY)]


def test_greedy_tokens_are_those_of_the_logits(generator: Generator, alone: list[list[int]]) -> None:
    assert [generator.generate([prompt], GREEDY)[0].token_ids for prompt in PROMPTS] == alone


def test_tokens_do_not_depend_on_the_batch(model: Model, alone: list[list[int]]) -> None:
    with Generator(model) as generator:
        assert draw(generator) == alone
        assert draw(generator) == alone  # from the prefix cache
    for settings in ({"max_batch": 2}, {"step_tokens": 7}, {"max_batch": 3, "step_tokens": 33}):
        with Generator(model, **settings) as other:
            assert draw(other) == alone


@pytest.mark.parametrize(("mode", "kv_bits"), [("f16", (16, 16)), ("a8", (4, 4)), ("a8", (8, 4))])
def test_other_modes_neither(folder: Path, mode: Any, kv_bits: tuple[int, int]) -> None:
    with Generator(Model.load(folder, threads=1, mode=mode, kv_bits=kv_bits)) as generator:
        single = [generator.generate([prompt], GREEDY)[0].token_ids for prompt in PROMPTS]
    with Generator(generator.model, step_tokens=50) as other:
        assert draw(other) == single


def test_preempted_requests_draw_the_same(folder: Path, alone: list[list[int]]) -> None:
    small = Model.load(folder, threads=1, context=256, kv_tokens=256)
    with Generator(small) as generator:
        assert draw(generator) == alone
        assert generator.stats()["pages"] == 8
        drawn = SamplingParams(max_tokens=100, seed=3, ignore_eos=True, repetition_penalty=1.1)
        single = [generator.generate([prompt], drawn)[0].token_ids for prompt in PROMPTS[:2]]
        before = generator.stats()["preemptions"]
        assert [o.token_ids for o in generator.generate([*PROMPTS[:2], PROMPTS[0]], drawn)] == [*single, single[0]]
        assert generator.stats()["preemptions"] > before


def test_logprobs_are_those_of_the_logits(generator: Generator, model: Model) -> None:
    params = SamplingParams(max_tokens=3, seed=1, temperature=0.7, logprobs=4, ignore_eos=True)
    output = generator.generate([PROMPTS[0]], params)[0]
    rows = model.native.logits([model.backend.Item(PROMPTS[0] + output.token_ids[:2], 0, [0])])[2:].astype(np.float64)
    expected = rows - np.log(np.exp(rows).sum(-1, keepdims=True))
    assert output.logprobs is not None
    for row, found in zip(expected, output.logprobs):
        assert found.logprob == pytest.approx(row[found.token_id], abs=1e-4)
        assert [value for _, value in found.top] == pytest.approx(sorted(row, reverse=True)[:4], abs=1e-4)


def test_ends_and_bans(generator: Generator, alone: list[list[int]]) -> None:
    third = alone[0][2]
    ended = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, stop_token_ids=[third])
    output = generator.generate([PROMPTS[0]], ended)[0]
    assert output.token_ids == alone[0][: alone[0].index(third) + 1] and output.stop_reason == third
    later = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, stop_token_ids=[third], min_tokens=6)
    output = generator.generate([PROMPTS[0]], later)[0]
    assert third not in output.token_ids[:6] and len(output.token_ids) >= 7
    biased = SamplingParams(temperature=0, max_tokens=3, logit_bias={8: 100})
    assert generator.generate([PROMPTS[0]], biased)[0].token_ids == [8, 8, 8]


def test_a_ban_of_everything_is_an_error(generator: Generator, model: Model) -> None:
    everything = list(range(model.native.vocab_size))
    with pytest.raises(Error, match="stop_token_ids holds every token"):
        generator.submit([5], params=SamplingParams(max_tokens=4, min_tokens=4, stop_token_ids=everything))
    no_end = SamplingParams(max_tokens=4, logit_bias=dict.fromkeys(everything, -100.0))
    assert len(generator.generate([[5]], no_end)[0].token_ids) > 0
    assert len(generator.generate([[5]], GREEDY)[0].token_ids) == 40


def test_a_model_has_one_generator_at_a_time(model: Model) -> None:
    """Two would write into the same pages."""
    with Generator(model) as generator:
        with pytest.raises(Error, match="this model has a generator already"):
            Generator(model)
        assert len(generator.generate([[5]], GREEDY)[0].token_ids) == 40
    with Generator(model):
        pass


@pytest.mark.parametrize("penalty", [1e-38, 1e-30])
@pytest.mark.parametrize("more", [{"min_p": 0.5}, {"top_k": 5}, {"top_p": 0.9}, {"temperature": 0.0}, {}])
def test_tiny_repetition_penalties(generator: Generator, penalty: float, more: dict[str, Any]) -> None:
    """They make logits as large as numbers can be; a token that was seen is drawn, if one has a positive logit."""
    params = SamplingParams(max_tokens=8, repetition_penalty=penalty, ignore_eos=True, **more)
    assert len(generator.generate([PROMPTS[0]], params)[0].token_ids) == 8


def test_chat_and_text(generator: Generator) -> None:
    params = SamplingParams(temperature=0, max_tokens=5)
    job = generator.submit(messages=[{"role": "user", "content": "Hi"}], params=params)
    assert "".join(piece.text for piece in job) == job.result().text
    assert generator.generate(["Hello"], params)[0].prompt_tokens > 0


def test_info_and_defaults(folder: Path, model: Model) -> None:
    info = model.info()
    assert (info["context"], info["threads"], info["mode"], info["vocab_size"]) == (512, 1, "a8", 300)
    assert info["kv_tokens"] == 8 * 512 and info["memory"]["kv_cache"] > 0 and info["hidden_size"] == 64
    assert Model.load(folder, context=100).context == 100


def test_the_cache_fits_what_is_available(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As a control group limits it, not as the machine has it."""
    monkeypatch.setattr("halfturn.machine.CGROUP", tmp_path)
    for name, text in (("max", "2000000"), ("current", "2000000"), ("stat", "active_file 0\ninactive_file 1000000\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    kv_tokens = Model.load(folder, threads=1, device="cpu").info()["kv_tokens"]
    assert 512 <= kv_tokens < 8 * 512


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"device": "cuda"}, "no CUDA backend"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"context": 513}, "context is 513: this model takes 1 to 512 tokens"),
        ({"context": 0}, "context is 0"),
        ({"kv_bits": (8, 5)}, r"kv_bits is \(8, 5\)"),
        ({"threads": 0}, "threads is 0"),
        ({"mode": "fast"}, "mode is 'fast'"),
        ({"kv_tokens": 100}, "kv_tokens is 100, less than the context of 512"),
    ],
)
def test_bad_settings(folder: Path, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Error, match=sentence):
        Model.load(folder, **settings)


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(Error, match="is not a folder"):
        Model.load(tmp_path / "nothing")
    with pytest.raises(Error, match=r"has no config\.json"):
        Model.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(Error, match="is not quantized: convert the source model first"):
        Model.load(tmp_path)
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(Error, match="is quantized by 'gptq'"):
        Model.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(Error, match="can't be read as json"):
        Model.load(tmp_path)


def test_missing_tokenizer_is_said_when_it_is_needed(tmp_path: Path) -> None:
    model = Model.load(write_checkpoint(tmp_path / "tiny", seed=3), threads=1)
    with pytest.raises(Error, match=r"has neither tokenizer\.json nor"):
        _ = model.tokenizer


def test_too_long_for_the_context(generator: Generator) -> None:
    with pytest.raises(ContextError, match="the prompt has 512 tokens, the context holds 512"):
        generator.submit([1] * 512)
    output = generator.generate([[7] * 500], SamplingParams(temperature=0, ignore_eos=True))[0]
    assert (len(output.token_ids), output.finish_reason) == (12, "length")


def test_a_continued_message_keeps_the_space_behind_it(tmp_path: Path) -> None:
    folder = write_sentencepiece(write_checkpoint(tmp_path, vocab=400))
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    model = Model.load(folder, threads=1)
    (the,) = model.tokenizer.encode("the")
    params = SamplingParams(temperature=0, max_tokens=2, logit_bias={the: 100})
    messages = [{"role": "assistant", "content": "so"}]
    with Generator(model) as generator:
        assert generator.submit(messages=messages, params=params).result().text == "the the"
        continued = generator.submit(messages=messages, params=params, continue_final_message=True)
        assert continued.result().text == " the the"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"max_position_embeddings": 10**400}, "max_position_embeddings in config.json is a number of 1329 bits"),
        ({"num_hidden_layers": float("nan")}, "num_hidden_layers"),
        ({"num_hidden_layers": "a"}, "num_hidden_layers"),
        ({"num_hidden_layers": [0]}, "num_hidden_layers"),
        ({"num_key_value_heads": 10**400}, "num_key_value_heads"),
        ({"num_key_value_heads": 5_000_000_000}, "num_key_value_heads"),
        ({"head_dim": 10**400}, "head_dim"),
        ({"rope_scaling": {"rope_type": "linear", "factor": float("nan")}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": float("inf")}}, "factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2, "original_max_position_embeddings": "abc"}}, "orig"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2, "original_max_position_embeddings": [1]}}, "orig"),
    ],
)
def test_broken_configs_are_refused(folder: Path, tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    config = json.loads((folder / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(Error) as refused:
        Model.load(tmp_path, threads=1)
    assert "config.json" in str(refused.value) and sentence in str(refused.value)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_pipes_and_endless_files_are_not_read(folder: Path, tmp_path: Path, name: str) -> None:
    for file in folder.iterdir():
        if file.name != name:
            (tmp_path / file.name).symlink_to(file)
    os.mkfifo(tmp_path / name)
    with pytest.raises(Error, match=f"{name}"):
        _ = Model.load(tmp_path, threads=1).tokenizer
    (tmp_path / name).unlink()
    with open(tmp_path / name, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(Error, match=f"{name} has 1099511627776 bytes"):
        _ = Model.load(tmp_path, threads=1).tokenizer


@pytest.mark.parametrize(
    "settings",
    [{"context": "4096"}, {"context": 100.0}, {"context": True}, {"context": 10**5000}, {"kv_bits": 8},
     {"kv_bits": None}, {"kv_bits": (8.0, 8)}, {"threads": "2"}, {"threads": 2.5}, {"threads": 2**40},
     {"kv_tokens": "a"}, {"kv_tokens": 5000.5}, {"kv_tokens": 2**70}],
)  # fmt: skip
def test_settings_of_the_wrong_kind(folder: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(Error, match=f"^{next(iter(settings))} is "):
        Model.load(folder, **settings)


def test_config_is_kept(folder: Path, model: Model) -> None:
    assert model.config == json.loads((folder / "config.json").read_text())
