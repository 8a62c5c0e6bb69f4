"""Conversions from beginning to end on tiny models: what is written, what is refused, what survives a kill -9."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from checkpoints import read_tensors, write_safetensors
from halfturn import _C
from halfturn.console import megabytes
from halfturn.converter.checkpoint import open_source
from halfturn.error import Error
from malformed import edit_config
from random_models import AWKWARD, write_model
from shared_data import STORIES, needs_stories
from tiny_sources import one_thread, torch  # noqa: F401 - a fixture for every test here

from halfturn.converter import convert as module  # isort: skip
from halfturn.converter.convert import ConvertOptions, convert  # isort: skip
from halfturn.converter.recipe import Recipe  # isort: skip
from halfturn.converter.stages import Stages  # isort: skip
from halfturn.converter.text import read_texts, sample_text  # isort: skip
from halfturn.converter.work import WorkFolder  # isort: skip
from halfturn.converter.out_folder import OutFolder  # isort: skip

RESULT_FIELDS = {
    "output",
    "decoder_bpw",
    "file_bpw",
    "bytes",
    "mean_kl",
    "perplexity_ratio",
    "top1_agreement",
    "seconds",
    "peak_rss_bytes",
}


def run(source: Path, out: Path, recipe: Mapping[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    stages: list[str] = []
    recipe = {"calibration_tokens": 1024, **(recipe or {})}
    options = ConvertOptions(recipe=Recipe(**recipe), **{"threads": 1, **settings})
    result = convert(str(source), out, options, lambda stage, done, total: stages.append(stage))
    return {**result, "stages": set(stages)}


def digest(folder: Path) -> dict[str, str]:
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())}


def config_of_output(out: Path) -> dict[str, Any]:
    return json.loads((out / "config.json").read_text())


# --- whole conversions ------------------------------------------------------------------------------------------------


def test_everything_is_written_and_loads(tmp_path: Path) -> None:
    """A model whose dimensions are no multiples of 16, with biases."""
    source = write_model(tmp_path / "source", {**AWKWARD, "hidden_size": 72, "head_dim": 20, "intermediate_size": 88})
    result = run(source, tmp_path / "out", bpw=6.5)
    assert result.keys() >= RESULT_FIELDS
    assert result["decoder_bpw"] <= 6.5 and 0 < result["mean_kl"] < 0.1 and result["top1_agreement"] > 0.8
    files = {f.name for f in (tmp_path / "out").iterdir()}
    assert files == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "README.md",
        "allocation.json",
        "allocation.png",
    }
    measured = config_of_output(tmp_path / "out")["quantization_config"]["measured"]
    assert measured["mean_kl"] == result["mean_kl"]
    assert sum(f.stat().st_size for f in (tmp_path / "out").iterdir()) == result["bytes"]


def test_uniform_rtn_needs_no_calibration(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", AWKWARD)
    recipe = {"rounding": "rtn", "rotation": "none"}
    result = run(source, tmp_path / "out", recipe, bpw=4.6, uniform=True)
    assert not result["stages"] & {"calibration text", "sensitivities", "predicted costs"}
    assert set(result["widths"].values()) <= {4, 5}
    assert result["predicted_kl"] is None
    table = json.loads((tmp_path / "out" / "allocation.json").read_text())
    assert table["predicted_kl"] is None and table["method"] == "uniform"


@pytest.mark.parametrize("rounding", ["gptq", "rtn"])
@pytest.mark.parametrize("rotation", ["hadamard", "none"])
def test_eight_bits_are_nearly_the_source(tmp_path: Path, rounding: str, rotation: str) -> None:
    source = write_model(tmp_path / "source", AWKWARD)
    recipe = {"rounding": rounding, "rotation": rotation, "head_bits": 8}
    result = run(source, tmp_path / "out", recipe, bpw=9, uniform=True, bits=("*=8",))
    assert result["mean_kl"] < 1e-3
    assert result["perplexity_ratio"] == pytest.approx(1, abs=0.01)


def test_overrides_and_overhead(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", AWKWARD)
    recipe = {"head_bits": 5, "embed_bits": 4, "group_size": 16}  # 1 bit a weight for scales
    result = run(source, tmp_path / "out", recipe, bpw=7, bits=("*.v_proj=8", "model.layers.0.*=5"))
    linears = config_of_output(tmp_path / "out")["quantization_config"]["linears"]
    bits = {name: linear["segments"][0]["bits"] for name, linear in linears.items()}
    assert bits["model.layers.1.self_attn.v_proj"] == 8 and bits["model.layers.0.self_attn.v_proj"] == 5
    assert bits["lm_head"] == 5 and bits["model.embed_tokens"] == 4
    assert result["decoder_bpw"] <= 7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bpw": 1.5}, r"1\.5 bits per weight can't be met: choose from [23]"),
        ({"bits": ("*.w_proj=4",)}, r"--bits '\*\.w_proj=4' matches none of the 21 matrices"),
        ({"recipe": {"group_size": 48}}, r"--group-size 48 doesn't divide the 320 inputs of self_attn.o_proj"),
        ({"recipe": {"head_bits": 9}}, "--head-bits is 9: widths are 2 to 8"),
    ],
)
def test_refusals_come_before_the_work(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    source = write_model(tmp_path / "source", AWKWARD)
    with pytest.raises(Error, match=message):
        run(source, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists() and no_work(tmp_path / ".halfturn-work")


def no_work(folder: Path) -> bool:
    return not list(folder.glob("**/*.safetensors"))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", {"max_position_embeddings": 10**15}, "max_position_embeddings is 10{15}"),
        ("config.json", {"rope_scaling": {"rope_type": "linear", "factor": 0.001}}, "factor = 0.001"),
        ("config.json", {"eos_token_id": 2.5}, "eos_token_id is 2.5"),
        ("tokenizer.json", None, "neither tokenizer.json nor tokenizer.model"),
        ("tokenizer.json", "", "is not a usable tokenizer"),
        ("tokenizer.json", "{}", "is not a usable tokenizer"),
        ("tokenizer_config.json", "{", "can't be read as json"),
        ("tokenizer_config.json", '{"chat_template": [1]}', "is a list without names"),
        ("generation_config.json", "{", "can't be read as json"),
        ("generation_config.json", '{"temperature": "hot"}', "temperature is 'hot'.*; correct it or remove"),
        ("generation_config.json", '{"do_sample": false, "top_p": 0}', "top_p is 0"),
        ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id in .* is 'x'"),
    ],
)
def test_what_could_not_run_is_refused_before_the_work(tmp_path: Path, file: str, content: Any, message: str) -> None:
    source = write_model(tmp_path / "source", AWKWARD)
    if content is None:
        (source / file).unlink()
    elif isinstance(content, str):
        (source / file).write_text(content)
    else:
        edit_config(source, lambda config: config.update(content))
    with pytest.raises(Error, match=message) as refused:
        run(source, tmp_path / "out", uniform=True)
    assert str(source) in str(refused.value) and (content is None or file in str(refused.value))
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_tokenizer_that_breaks_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from halfturn.tokenizer import Tokenizer

    def fail(path: Path) -> None:
        raise TypeError("int() argument must be a string")

    monkeypatch.setattr(Tokenizer, "from_folder", fail)
    source = write_model(tmp_path / "source", AWKWARD)
    with pytest.raises(Error, match=r"the tokenizer of .*source can't be used \(TypeError"):
        run(source, tmp_path / "out", uniform=True)


def test_what_the_engine_refuses_does_not_appear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: bytes) -> None:
        assert (Path(os.fsdecode(path)) / "config.json").is_file()
        raise Error("its levels fall")

    monkeypatch.setattr(_C, "inspect", refuse)
    source = write_model(tmp_path / "source", AWKWARD)
    with pytest.raises(Error, match="the engine refuses the checkpoint that was made, so it was not kept: its levels"):
        run(source, tmp_path / "out", {"rounding": "rtn"}, uniform=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".halfturn-work", "source"]


@pytest.mark.parametrize("settings", [{}, {"uniform": True}, {"uniform": True, "recipe": {"rounding": "rtn"}}])
def test_room_is_asked_for_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """As much as checkpoint and work folder will take, tables of a tied model and all."""
    shape = {**AWKWARD, "tie_word_embeddings": True, "vocab_size": 2000, "attention_bias": False, "mlp_bias": False}
    source = write_model(tmp_path / "source", shape)
    asked: list[int] = []

    def refuse(path: Path, needed: int) -> None:
        asked.append(needed)
        raise Error("full")

    with monkeypatch.context() as patched:
        patched.setattr(module, "check_disk", refuse)
        with pytest.raises(Error, match="full"):
            run(source, tmp_path / "out", **settings)
    assert no_work(tmp_path / ".halfturn-work") and not (tmp_path / "out").exists()
    result = run(source, tmp_path / "out", **settings)
    work = sum(file.stat().st_size for file in (tmp_path / ".halfturn-work").glob("**/*.safetensors"))
    states = sum(file.stat().st_size for file in (tmp_path / ".halfturn-work").glob("*/reference/*"))
    needed = result["weight_bytes"] + work - states
    # An allocation that misses its prediction is compared with the uniform one, and both are kept.
    assert 0.85 * needed < asked[0] - module.RESERVED_BYTES < 1.1 * needed


@pytest.mark.parametrize("uniform", [False, True])
def test_room_for_what_is_here_is_asked_for_again_unless_it_will_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uniform: bool
) -> None:
    source = write_model(tmp_path / "source", AWKWARD)
    asked: list[int] = []

    def room(bpw: float = 4.5, **recipe: Any) -> int:
        def refuse(path: Path, needed: int) -> None:
            asked.append(needed)
            raise Error("full")

        with monkeypatch.context() as patched, pytest.raises(Error, match="full"):
            patched.setattr(module, "check_disk", refuse)
            run(source, tmp_path / "new", recipe, uniform=uniform, bpw=bpw, work_folder=tmp_path / "work")
        return asked[-1] - module.RESERVED_BYTES

    fresh, other_seed, rounded, wider = room(), room(seed=1), room(rounding="rtn"), room(5.5)
    packed = run(source, tmp_path / "out", uniform=uniform, bpw=4.5, work_folder=tmp_path / "work")["weight_bytes"]
    assert room(seed=1) == other_seed
    assert 0.9 * packed < room() < 1.3 * packed < fresh
    assert room() + 0.5 * packed < room(5.5) < wider
    if uniform:  # without statistics; only the embedding is the same
        assert 0.6 * rounded < room(rounding="rtn") < rounded


def test_a_disk_without_room_for_both_copies_of_a_tied_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_model(tmp_path / "source", {**AWKWARD, "tie_word_embeddings": True})
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=64_100_000))
    with pytest.raises(Error, match=r"67\.\d MB are needed in .*, 64\.1 MB are free"):
        run(source, tmp_path / "out", uniform=True)
    assert no_work(tmp_path / ".halfturn-work")


def test_two_conversions_into_one_folder_clash_at_the_start(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", AWKWARD)
    with (
        OutFolder(tmp_path / "out"),
        pytest.raises(Error, match=r"another conversion is writing .*out; wait for it or name another folder"),
    ):
        run(source, tmp_path / "out", work_folder=tmp_path / "work")
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "out", tmp_path / ("n" * 250)):
        with pytest.raises(Error, match=r"can't be written .*; choose another place for OUT"):
            run(source, out, work_folder=tmp_path / "work")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "source"]


def test_a_work_folder_that_would_be_replaced(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", AWKWARD)
    (tmp_path / "link").symlink_to(tmp_path / "out")
    for work in ("out", "out/work", "other/../out/work", "link/work", ".out.partial/work"):
        with pytest.raises(Error, match=r"the work folder .* is in .*, which the conversion replaces; name one"):
            run(source, tmp_path / "out", work_folder=tmp_path / work)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "source"]


@pytest.mark.parametrize("place", ["out/source", ".out.partial", ".out.trash/a", ".out.old"])
def test_a_source_that_would_be_replaced(tmp_path: Path, place: str) -> None:
    (tmp_path / place).parent.mkdir(exist_ok=True)
    source = write_model(tmp_path / place, AWKWARD)
    kept = sorted(tmp_path.rglob("*"))
    if place == "out/source":
        (tmp_path / "out" / "config.json").write_text('{"quantization_config": {"quant_method": "halfturn"}}')
        kept = sorted(tmp_path.rglob("*"))
    with pytest.raises(Error, match=r"the source .* is in .*, which the conversion replaces; choose another place"):
        run(source, tmp_path / "out", work_folder=tmp_path / "work", overwrite=True)
    assert sorted(tmp_path.rglob("*")) == kept


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", AWKWARD)
    text = tmp_path / os.fsdecode(b"t\xff.txt")
    text.write_text("".join(random.Random(0).choices("abcdefgh -,.ABC123", k=3000)))
    out = tmp_path / os.fsdecode(b"o\xff")
    run(source, out, {"calibration": (str(text),)}, uniform=True, command=f"halfturn convert x {out}")
    card = (out / "README.md").read_text("utf-8")
    assert "# o?\n" in card and "windows of t?.txt" in card and f"convert x {tmp_path}/o?" in card
    measured = config_of_output(out)["quantization_config"]["measured"]
    assert measured["text"] == "windows of t?.txt that calibration did not see"


def test_the_card_counts_the_tokens_that_were_there(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", AWKWARD)
    (tmp_path / "a.txt").write_text("".join(random.Random(0).choices("abcdefgh -,.ABC123", k=3000)))
    recipe = {"calibration": (str(tmp_path / "a.txt"),), "calibration_tokens": 24576}
    run(source, tmp_path / "out", recipe, uniform=True)
    windows = 3000 // 64  # one in nine of them is held out
    used = 64 * (windows - len(range(4, windows, 9)))
    assert f"calibrated on {used:,} tokens of 1 text file." in (tmp_path / "out" / "README.md").read_text()


def test_calibration_from_a_pipe(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", AWKWARD)
    text = "".join(random.Random(0).choices("abcdefgh -,.ABC123", k=3000)).encode()
    (tmp_path / "a.txt").write_bytes(text)
    reader, writer = os.pipe()
    os.write(writer, text)
    os.close(writer)
    try:
        run(source, tmp_path / "pipe", {"calibration": (f"/dev/fd/{reader}",)}, uniform=True)
    finally:
        os.close(reader)
    run(source, tmp_path / "file", {"calibration": (str(tmp_path / "a.txt"),)}, uniform=True)
    assert digest(tmp_path / "pipe")["model.safetensors"] == digest(tmp_path / "file")["model.safetensors"]


def test_costs_of_another_shape_are_computed_anew(tmp_path: Path) -> None:
    from safetensors import safe_open

    source = write_model(tmp_path / "source", {**AWKWARD, "num_hidden_layers": 1})
    work = tmp_path / "work"
    run(source, tmp_path / "out", work_folder=work)
    for file in work.glob("costs/*"):
        with safe_open(str(file), framework="pt") as entry:
            key = json.loads(entry.metadata()["halfturn"])["key"]
        with WorkFolder(work) as opened:
            opened.put("costs", key, {}, {"model.layers.0.self_attn.q_proj": {"2": None}})
    assert "predicted costs" in run(source, tmp_path / "again", work_folder=work)["stages"]
    for name in ("model.safetensors", "allocation.json"):
        assert digest(tmp_path / "again")[name] == digest(tmp_path / "out")[name]


def test_what_a_trial_of_fewer_tokens_found_is_not_taken(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", AWKWARD)
    for tokens, out, work in ((3072, "alone", "a"), (1024, "trial", "b"), (3072, "after", "b")):
        run(source, tmp_path / out, {"calibration_tokens": tokens}, work_folder=tmp_path / work)
    assert digest(tmp_path / "alone")["model.safetensors"] == digest(tmp_path / "after")["model.safetensors"]
    assert digest(tmp_path / "alone")["allocation.json"] == digest(tmp_path / "after")["allocation.json"]


def test_an_existing_folder_is_kept(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", AWKWARD)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    for overwrite in (False, True):
        with pytest.raises(Error, match="exists"):
            run(source, tmp_path / "out", overwrite=overwrite)
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"


def test_text_files_as_calibration(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", {**AWKWARD, "max_position_embeddings": 64})
    text = "".join(random.Random(0).choices("abcdefgh -,.ABC123", k=3000))
    (tmp_path / "a.txt").write_text(text)
    windows = read_texts(open_source(source), [text], 64 * 20, 64)
    assert windows.shape == (20, 64) and windows[0].tolist() == [ord(c) - 32 for c in text[:64]]
    result = run(source, tmp_path / "out", {"calibration": (str(tmp_path / "a.txt"),), "calibration_tokens": 1280})
    assert not result["stages"] & {"calibration text", "held-out text"}
    with WorkFolder(tmp_path / "work") as work:
        recipe = Recipe(calibration=(str(tmp_path / "a.txt"),), calibration_tokens=1280)
        stages = Stages(open_source(source), recipe, work, lambda *_: None)
        calibration, held_out = (
            {tuple(row) for row in t.tolist()} for t in (stages.texts.calibration, stages.texts.held_out)
        )
    assert len(calibration) >= 18 and len(held_out) >= 2 and not calibration & held_out
    (tmp_path / "short.txt").write_text("abc")
    with pytest.raises(Error, match="the calibration files hold 3 tokens"):
        run(source, tmp_path / "short", {"calibration": (str(tmp_path / "short.txt"),)})


@pytest.mark.parametrize("stage", ["text", "layers", "reference"])
def test_a_source_that_is_replaced_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    """Nothing of the other model is kept: with the first one back, the result is what it would have been."""
    shape = {**AWKWARD, "num_hidden_layers": 1}
    source, weights = write_model(tmp_path / "source", shape), tmp_path / "source" / "model.safetensors"
    run(source, tmp_path / "wanted", work_folder=tmp_path / "other-work", uniform=True)
    first = weights.read_bytes()
    second = (write_model(tmp_path / "second", shape, seed=1) / "model.safetensors").read_bytes()
    assert len(first) == len(second) and first != second
    put, entries = WorkFolder.put, list[Path]()

    def put_and_replace(work: WorkFolder, of: str, *content: Any) -> None:
        put(work, of, *content)
        if of == stage:
            weights.write_bytes(second)
            entries[:] = work.path.glob("*/*.safetensors")

    with (
        monkeypatch.context() as patched,
        pytest.raises(Error, match=r"model\.safetensors changed during the conversion"),
    ):
        patched.setattr(WorkFolder, "put", put_and_replace)
        run(source, tmp_path / "out", work_folder=tmp_path / "work", uniform=True)
    assert sorted((tmp_path / "work").glob("*/*.safetensors")) == sorted(entries) and entries
    assert not (tmp_path / "out").exists()
    weights.write_bytes(first)
    run(source, tmp_path / "out", work_folder=tmp_path / "work", uniform=True)
    assert digest(tmp_path / "out")["model.safetensors"] == digest(tmp_path / "wanted")["model.safetensors"]


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj", "lm_head"])
def test_weights_that_are_too_large_are_named(tmp_path: Path, name: str, uniform: bool) -> None:
    source = write_model(tmp_path / "source", {**AWKWARD, "num_hidden_layers": 2})
    tensors = read_tensors(source)
    tensors[f"{name}.weight"] = 1e9 * tensors[f"{name}.weight"]
    write_safetensors(source / "model.safetensors", tensors)
    with pytest.raises(Error, match=f"^{name} needs a scale of .*, above half precision's 65504"):
        run(source, tmp_path / "out", uniform=uniform)


@needs_stories
def test_a_real_model_predicted_and_measured(tmp_path: Path) -> None:
    """The allocation predicts what is measured and beats the uniform one; a second bitrate reuses the first's work."""
    recipe = {"calibration_tokens": 4096}
    allocated = run(STORIES, tmp_path / "allocated", recipe, bpw=5.0)
    assert allocated["allocation"] == "allocated"
    assert allocated["predicted_kl"] == pytest.approx(allocated["mean_kl"], rel=0.35)
    uniform = run(STORIES, tmp_path / "uniform", recipe, bpw=5.0, uniform=True)
    assert not uniform["stages"] & {"calibration text", "held-out text", "sensitivities", "predicted costs"}
    assert allocated["mean_kl"] < uniform["mean_kl"]
    plain = run(STORIES, tmp_path / "plain", {"rounding": "rtn", "rotation": "none"}, bpw=5.0, uniform=True)
    assert uniform["mean_kl"] < 0.8 * plain["mean_kl"]


# --- the command ------------------------------------------------------------------------------------------------------


def invoke(*words: Any) -> str:
    """stdout of a command, run in this process."""
    from click.testing import CliRunner

    from halfturn.cli import main

    return CliRunner().invoke(main, [str(w) for w in words], standalone_mode=False, catch_exceptions=False).stdout


def test_killed_at_any_moment_it_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", AWKWARD)
    work, out = tmp_path / "work", tmp_path / "out"
    words = ["convert", str(source), str(out), "--work-folder", str(work), "--bpw", "4.3", "--json"]
    words += ["--calibration-tokens", "1024", "--threads", "1"]
    invoke(*words)
    wanted, entries = digest(out), list(work.glob("*/*.safetensors"))
    stages = {f.parent.name for f in entries}
    assert stages == {"text", "sensitivities", "hessians", "costs", "embeddings", "layers", "heads", "reference"}
    out.rename(tmp_path / "whole")
    work.rename(tmp_path / "whole-work")
    # Killed while it gathers Hessians, between two layers, and while it measures or writes; each time it goes on.
    for count in (5, len(entries) - 4, len(entries)):
        program = [sys.executable, "-c", "from halfturn.cli import main; main()", *words]
        process = subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(work.glob("*/*.safetensors"))) < count:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.returncode == -signal.SIGKILL and not out.exists()
        assert count <= len(list(work.glob("*/*.safetensors"))) <= len(entries)
    invoke(*words)
    assert digest(out) == wanted
    damaged = max(work.glob("layers/*.safetensors"), key=os.path.getsize)
    damaged.write_bytes(damaged.read_bytes()[:-40])
    invoke(*words, "--overwrite")
    assert digest(out) == wanted
    assert {f.name for f in tmp_path.iterdir()} == {"source", "out", "work", "whole", "whole-work"}


def test_command_line(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", {**AWKWARD, "num_hidden_layers": 1})
    words = ["convert", source, tmp_path / "out", "--calibration-tokens", "1024", "--threads", "1"]
    shown = invoke(*words, "--bpw", "5")
    columns = shown.splitlines()[2].replace("┃", " ").split()
    assert columns == ["layer", "q", "k", "v", "o", "gate", "up", "down"]
    assert "KL" in shown
    said = " ".join(shown.split())
    weights = sum(tensor.nbytes for tensor in read_tensors(tmp_path / "out").values())
    whole = sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    assert f"{megabytes(weights)} of weights, " in said and " bits a decoder weight, " in said
    assert f" over all; {megabytes(whole)} with tokenizer and card" in said
    card = (tmp_path / "out" / "README.md").read_text()
    assert "\nhalfturn convert source out --bpw 5.0 --calibration-tokens 1024" in card
    assert str(tmp_path) not in card
    found = json.loads(invoke(*words, "--overwrite", "--json", "--bpw", "4.1234567"))
    assert found.keys() >= RESULT_FIELDS and found["weight_bytes"] < found["bytes"]
    assert " --bpw 4.1234567 " in (tmp_path / "out" / "README.md").read_text()


def test_the_published_command_names_no_folder_of_the_author(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from halfturn.converter.cli import command_line

    (tmp_path / "models" / "m").mkdir(parents=True)
    (tmp_path / "models" / "m.gguf").touch()
    monkeypatch.chdir(tmp_path / "models" / "m")
    monkeypatch.setenv("HOME", str(tmp_path))
    local = {f"{tmp_path}/models/m/": "m", ".": "m", "../m.gguf": "m.gguf", "~/models/m": "m"}
    for source, shown in {**local, "owner/model": "owner/model"}.items():
        assert command_line(source, "out", {"bpw": 4.0}) == f"halfturn convert {shown} out --bpw 4.0"


@needs_stories
def test_means_lower_what_int8_activations_cost(tmp_path: Path) -> None:
    """A real model: without its norms' means, the same checkpoint loses more to int8 activations."""
    run(STORIES, tmp_path / "out", {"calibration_tokens": 2048}, bpw=5, uniform=True)
    shutil.copytree(tmp_path / "out", tmp_path / "without")
    edit_config(tmp_path / "without", lambda config: config["quantization_config"].update(means=False))
    tensors = read_tensors(tmp_path / "out")
    assert sum(name.endswith(".mean") for name in tensors) == 2 * 5 + 1
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(".mean")}
    write_safetensors(tmp_path / "without" / "model.safetensors", kept)
    tokens = sample_text(open_source(STORIES), 8, 256, 1)

    def answers(name: str, mode: str) -> torch.Tensor:
        model = _C.Model(str(tmp_path / name), mode=mode, k_bits=16, v_bits=16, context=256)
        items = ([_C.Item(text.tolist(), 0, list(range(8)))] for text in tokens)
        return torch.cat([torch.from_numpy(model.logits(item)).log_softmax(-1) for item in items])

    exact = answers("out", "f16")
    assert torch.equal(exact, answers("without", "f16"))
    kl = {
        name: float(torch.nn.functional.kl_div(answers(name, "a8"), exact, log_target=True, reduction="batchmean"))
        for name in ("out", "without")
    }
    assert 0 < kl["out"] < kl["without"], kl


def test_eval_kl_of_the_engine(tmp_path: Path) -> None:
    """At 8 bits the compiled engine says what the source says; its numbers are those of the torch path."""
    source = write_model(tmp_path / "source", AWKWARD)
    run(source, tmp_path / "out", {"rounding": "rtn", "head_bits": 8}, bpw=9, uniform=True, bits=("*=8",))
    (tmp_path / "text.txt").write_text("".join(random.Random(1).choices("abcdefgh -,.ABC123", k=400)))
    words = ["eval", "kl", str(tmp_path / "out"), "--reference", str(source), "--text", str(tmp_path / "text.txt")]
    words += ["--context", "64", "--mode", "f16", "--kv-bits", "16", "--json"]
    result = json.loads(invoke(*words))
    told = invoke("eval", "kl", "--help").split("--json prints")[1].split(".")[0].replace(",", " ").split()
    assert set(told) - {"and"} == set(result)
    assert result["tokens"] == 6 * 64 and result["mean_kl"] < 2e-3 and result["top1_agreement"] > 0.95
    assert result["perplexity"] == pytest.approx(result["reference_perplexity"], rel=0.02)
    with pytest.raises(Error, match="has a vocabulary of 50"):
        other = write_model(tmp_path / "other")
        words[words.index("--reference") + 1] = str(other)
        invoke(*words)
