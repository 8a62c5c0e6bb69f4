"""Hugging Face folders and hub ids as sources: every tensor in float32, and what is refused with which words."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halfturn.converter import hf_source
from halfturn.converter.checkpoint import open_source
from halfturn.error import Error
from tiny_sources import check_tensors, config_of, torch, write_folder, write_gguf


def save(tensors: dict[str, Any], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, path)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_folder_of_each_dtype(tmp_path: Path, dtype: str, shards: int) -> None:
    tensors = write_folder(tmp_path, dtype=getattr(torch, dtype), shards=shards)
    check_tensors(open_source(tmp_path), tensors)


def test_biases_and_tied_embeddings(tmp_path: Path) -> None:
    tensors = write_folder(tmp_path, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True})
    source = open_source(tmp_path)
    check_tensors(source, tensors)
    assert torch.equal(source.head(), source.embedding())
    assert sum(name.endswith(".bias") for name in source.layer(0)) == 7


def test_a_tied_model_may_store_its_head_and_old_files_their_rotary_table(tmp_path: Path) -> None:
    tensors = write_folder(tmp_path, {"tie_word_embeddings": True})
    extra = {
        "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    save({**tensors, **extra}, tmp_path / "model.safetensors")
    check_tensors(open_source(tmp_path), tensors)


def test_a_stored_head_that_is_not_the_tied_embedding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5 uses it, older ones don't."""
    monkeypatch.setattr(hf_source, "COMPARED_ROWS", 16)
    tensors = write_folder(tmp_path, {"tie_word_embeddings": True}, torch.bfloat16)
    head = tensors["model.embed_tokens.weight"].float()
    save({**tensors, "lm_head.weight": head}, tmp_path / "model.safetensors")
    check_tensors(open_source(tmp_path), tensors)
    save({**tensors, "lm_head.weight": head[:40].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(Error, match=r"lm_head.weight in model.safetensors is \[40, 24\], the configuration says"):
        open_source(tmp_path)
    head[49, 3] += 0.5
    save({**tensors, "lm_head.weight": head}, tmp_path / "model.safetensors")
    with pytest.raises(Error, match=r"lm_head.weight in model.safetensors is not .*embed_tokens.weight, although tie_"):
        open_source(tmp_path)


def test_a_stored_head_of_a_kind_that_no_weight_is(tmp_path: Path) -> None:
    tensors = write_folder(tmp_path, {"tie_word_embeddings": True}, torch.bfloat16)
    tensors["lm_head.weight"] = torch.zeros(tensors["model.embed_tokens.weight"].shape, dtype=torch.int8)
    save(tensors, tmp_path / "model.safetensors")
    with pytest.raises(Error, match=r"lm_head\.weight in model\.safetensors is I8; weights must be one of"):
        open_source(tmp_path)


def test_a_configuration_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows would be of the old one, and be kept as the new one's."""
    write_folder(tmp_path)
    canonical = hf_source.canonical_config

    def change(*given: Any) -> Any:
        found = canonical(*given)
        (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text() + " ")
        return found

    monkeypatch.setattr(hf_source, "canonical_config", change)
    with pytest.raises(Error, match=r"config\.json changed during the conversion"):
        open_source(tmp_path)


def test_one_file_beside_an_index(tmp_path: Path) -> None:
    """transformers reads the file, not the shards."""
    tensors = write_folder(tmp_path, shards=2)
    save(tensors, tmp_path / "model.safetensors")
    with pytest.raises(Error, match=r"has both model.safetensors and .*index.json: it mixes two models, remove one"):
        open_source(tmp_path)
    index = {"weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    check_tensors(open_source(tmp_path), tensors)


def test_what_a_caller_does_to_a_tensor_stays_with_the_caller(tmp_path: Path) -> None:
    tensors = write_folder(tmp_path)
    source = open_source(tmp_path)
    source.layer(0)["self_attn.q_proj.weight"].zero_()
    source.embedding().zero_()
    check_tensors(source, tensors)


def spoil(name: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    def apply(tensors: dict[str, Any]) -> None:
        tensors[name] = change(tensors[name]).contiguous()

    return apply


def with_value(value: float) -> Callable[[Any], Any]:
    def change(tensor: Any) -> Any:
        tensor[1, 2] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            spoil("model.layers.1.mlp.down_proj.weight", lambda t: t[:, :39]),
            r"layers.1.mlp.down_proj.weight in model.safetensors is \[24, 39\], the configuration says \[24, 40\]",
        ),
        (lambda t: t.pop("model.norm.weight"), "lacks model.norm.weight of 21"),
        (lambda t: [t.pop(n) for n in list(t) if "layers.1" in n], "lacks model.layers.1.* and 8 more tensors of 21"),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}),
            "q_norm.weight in model.safetensors has no place",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}),
            "q_proj.bias in model.safetensors has no place",
        ),
        (spoil("lm_head.weight", lambda t: t.to(torch.int8)), "lm_head.weight in model.safetensors is I8"),
        (spoil("lm_head.weight", lambda t: t.to(torch.float8_e4m3fn)), "is F8_E4M3; weights must be one of BF16"),
    ],
)
def test_damaged_headers(tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    tensors = write_folder(tmp_path)
    change(tensors)
    save(tensors, tmp_path / "model.safetensors")
    with pytest.raises(Error, match=message):
        open_source(tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_that_are_no_numbers(tmp_path: Path, value: float, dtype: str) -> None:
    tensors = write_folder(tmp_path, dtype=getattr(torch, dtype))
    spoil("model.layers.1.self_attn.v_proj.weight", with_value(value))(tensors)
    save(tensors, tmp_path / "model.safetensors")
    source = open_source(tmp_path)
    source.layer(0)
    with pytest.raises(Error, match=r"layers.1.self_attn.v_proj.weight .* has 1 of 384 values NaN or infinite"):
        source.layer(1)


def test_values_that_float32_cannot_work_with(tmp_path: Path) -> None:
    """Their squares overflow, and what is computed from them would be blamed."""
    tensors = write_folder(tmp_path)
    spoil("model.layers.1.mlp.down_proj.weight", with_value(-3e38))(tensors)
    save(tensors, tmp_path / "model.safetensors")
    with pytest.raises(Error, match=r"layers.1.mlp.down_proj.weight in model.safetensors has values up to 3e\+38"):
        open_source(tmp_path).layer(1)


def test_truncated_file(tmp_path: Path) -> None:
    write_folder(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(Error, match="not a readable safetensors file"):
        open_source(tmp_path)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(Error, match=r"config.json does not exist"):
        open_source(tmp_path)
    write_folder(tmp_path, shards=2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(Error, match=r"names model-00002-of-00002.safetensors, which is not in"):
        open_source(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    with pytest.raises(Error, match="outside the folder"):
        open_source(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model-00001-of-00002.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(Error, match=r"no safetensors file; pytorch_model.bin is there"):
        open_source(tmp_path)
    with pytest.raises(Error, match="does not exist; name a Hugging Face folder"):
        open_source(tmp_path / "nowhere")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(Error, match=r"not a GGUF file .it begins with b'hell'."):
        open_source(tmp_path / "text")


@pytest.mark.parametrize("name", ["./typo", "../typo", "~nobody-of-this-name/x", "a/b/c", ".x/y", "-/.gguf", "a--b/c"])
def test_names_of_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    import socket

    def refuse(*_: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Error, match=f"^{re.escape(name)} does not exist"):
        open_source(name)


@pytest.mark.parametrize(("text", "message"), [("[" * 100_000, "nested too deeply"), ("9" * 5000, "not valid JSON")])
def test_config_that_json_gives_up_on(tmp_path: Path, text: str, message: str) -> None:
    write_folder(tmp_path)
    (tmp_path / "config.json").write_text(f'{{"hidden_size": {text}}}')
    with pytest.raises(Error, match=f"config.json is {message}"):
        open_source(tmp_path)


@pytest.mark.parametrize(("stated", "ends"), [({}, [7, 8]), ({"eos_token_id": 5}, 5), ({"eos_token_id": None}, None)])
def test_the_end_of_text_may_stand_in_generation_config(tmp_path: Path, stated: dict[str, Any], ends: Any) -> None:
    """Alone there, it is the end: the family's default would be an ordinary token."""
    write_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("eos_token_id", None)
    (tmp_path / "config.json").write_text(json.dumps(config | stated))
    if not stated:
        assert open_source(tmp_path).config.eos_token_id == 2
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert open_source(tmp_path).config.eos_token_id == ends


def test_an_adapter_is_not_left_out_in_silence(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(Error, match=r"has adapter_config\.json: adapters are not applied; merge it"):
        open_source(tmp_path)


def test_messages_about_a_configuration_name_its_file(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": "LlamaForCausalLM"}')
    with pytest.raises(Error, match=r"/config.json: architectures is 'LlamaForCausalLM'"):
        open_source(tmp_path)


def test_weights_that_cannot_be_opened(tmp_path: Path) -> None:
    write_folder(tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").unlink()
    (tmp_path / "a" / "model.safetensors").mkdir()
    with pytest.raises(Error, match=r"model\.safetensors is not a regular file"):
        open_source(tmp_path / "a")
    write_folder(tmp_path / os.fsdecode(b"s\xff"))
    with pytest.raises(Error, match="whose name is not UTF-8; rename it"):
        open_source(tmp_path / os.fsdecode(b"s\xff"))


def test_fingerprint_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    write_folder(tmp_path / "a")
    write_folder(tmp_path / "b")
    first = open_source(tmp_path / "a").fingerprint()
    assert open_source(tmp_path / "b").fingerprint() == first
    path = tmp_path / "b" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # the lowest bit of the last weight
    path.write_bytes(data)
    assert open_source(tmp_path / "b").fingerprint() != first
    write_folder(tmp_path / "c", {"rms_norm_eps": 1e-6})
    assert open_source(tmp_path / "c").fingerprint() != first


def rewrite(file: Path) -> None:
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))


def replace(file: Path) -> None:
    status = file.stat()
    shutil.copyfile(file, file.with_suffix(".new"))
    os.utime(file.with_suffix(".new"), ns=(status.st_atime_ns, status.st_mtime_ns))
    file.with_suffix(".new").rename(file)


def cut(file: Path) -> None:
    os.truncate(file, 1000)


CHANGES = [rewrite, replace, cut, Path.unlink]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_a_source_that_changes_is_not_read_on(tmp_path: Path, change: Callable[[Path], None], kind: str) -> None:
    if kind == "folder":
        write_folder(tmp_path, shards=2)
        source = open_source(tmp_path)
        file = tmp_path / "model-00002-of-00002.safetensors"
    else:
        file = tmp_path / "model.gguf"
        write_gguf(file, config_of())
        source = open_source(file)
    source.fingerprint()
    kept = source.layer(0)
    before = {name: tensor.clone() for name, tensor in kept.items()}
    change(file)
    for use in (lambda: source.layer(0), source.embedding, source.fingerprint, source.check_unchanged):
        with pytest.raises(Error, match=f"/{file.name} changed during the conversion: .* run the same command again"):
            use()
    assert all(torch.equal(kept[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("change", CHANGES)
def test_a_source_that_changes_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    """Whatever a library makes of it."""
    write_folder(tmp_path)
    source = open_source(tmp_path)

    def fail(names: list[str]) -> None:
        change(tmp_path / "model.safetensors")
        raise RuntimeError("unexpected")

    monkeypatch.setattr(source, "_tensors", fail)
    with pytest.raises(Error, match=r"model.safetensors changed during the conversion"):
        source.layer(0)


def test_small_files_that_appear_or_change(tmp_path: Path) -> None:
    write_folder(tmp_path)
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        source = open_source(tmp_path)
        (tmp_path / name).write_text("{ }")
        with pytest.raises(Error, match=f"/{name} changed during the conversion"):
            source.fingerprint()
        write_folder(tmp_path)


def test_tokenizer_files_are_copied(tmp_path: Path) -> None:
    write_folder(tmp_path / "a")
    (tmp_path / "a" / "chat_template.jinja").write_text("hi")
    (tmp_path / "a" / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# Model\nlicense: no\n")
    (tmp_path / "out").mkdir()
    source = open_source(tmp_path / "a")
    source.copy_tokenizer(tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["chat_template.jinja", "tokenizer.json"]
    assert source.card_facts() == {"license": "apache-2.0"}
    (tmp_path / "a" / "tokenizer.json").unlink()
    with pytest.raises(Error, match=r"neither tokenizer.json nor tokenizer.model"):
        open_source(tmp_path / "a").copy_tokenizer(tmp_path / "out")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"])
@pytest.mark.parametrize("target", ["nowhere", None])
def test_links_that_lead_to_no_file(tmp_path: Path, name: str, target: str | None) -> None:
    """They would count as absent, and the checkpoint would lack what they stand for."""
    write_folder(tmp_path / "a")
    (tmp_path / "a" / name).unlink(missing_ok=True)
    (tmp_path / "a" / name).symlink_to(target or name)
    with pytest.raises(Error, match=f"/{name} is a link to {target or name}, where no file is: restore"):
        open_source(tmp_path / "a").copy_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_files_that_hold_nothing(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)  # to read it would wait for ever
    with pytest.raises(Error, match=f"{name} is not a regular file"):
        open_source(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("nowhere")
    with pytest.raises(Error, match=f"{name} is a link to nowhere, where no file is"):
        open_source(tmp_path)


def test_a_folder_of_licences_is_no_licence(tmp_path: Path) -> None:
    write_folder(tmp_path / "a")
    (tmp_path / "a" / "LICENSE").mkdir()
    open_source(tmp_path / "a").copy_tokenizer(tmp_path)
    assert not (tmp_path / "LICENSE").exists()


def test_an_index_that_is_a_link_to_nothing(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "model.safetensors.index.json").symlink_to("nowhere")
    with pytest.raises(Error, match=r"index\.json is a link to nowhere, where no file is"):
        open_source(tmp_path)


def test_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub id is downloaded without formats that aren't read; failures are sentences."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    tensors = write_folder(tmp_path)
    asked: dict[str, Any] = {}

    def download(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    source = open_source("someone/a-model")
    check_tensors(source, tensors)
    assert source.card_facts()["base_model"] == asked["repo"] == source.name == "someone/a-model"
    wanted = "|".join(p.replace(".", r"\.").replace("*", ".*") for p in asked["allow_patterns"])
    assert re.fullmatch(wanted, "model-00001-of-00002.safetensors")
    for unwanted in ("pytorch_model.bin", "consolidated.safetensors", "original/params.json", "model.gguf"):
        assert not re.fullmatch(wanted, unwanted)

    def offline(repo: str, **options: Any) -> str:
        raise LocalEntryNotFoundError("no")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(Error, match="someone/a-model is not a folder here, and the Hugging Face hub can't be reached"):
        open_source("someone/a-model")
