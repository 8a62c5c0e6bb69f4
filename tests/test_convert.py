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
from typing import Any

import numpy as np
import pytest

from checkpoints import read_tensors, write_safetensors
from halfturn.converter.architectures import NORMS
from halfturn.converter.checkpoint import open_source
from halfturn.error import Error
from malformed import edit_config
from random_models import AWKWARD, STORIES, logits_of, random_tokens, write_model
from tiny_sources import torch

from halfturn.converter.calibrate import (  # isort: skip
    Moment,
    advance,
    first_states,
    layer_hessians,
    round_layer,
    sensitivities,
)
from halfturn.converter.codecs.grid import rtn  # isort: skip
from halfturn.converter.convert import ConvertOptions, convert  # isort: skip
from halfturn.converter.llama import GROUPS, layer_forward, logits, rope_table  # isort: skip
from halfturn.converter.measure import Comparison  # isort: skip
from halfturn.converter.packed import pack, unpack  # isort: skip
from halfturn.converter.stages import Recipe, Stages  # isort: skip
from halfturn.converter.text import draw, read_texts, sample_text  # isort: skip
from halfturn.converter.work import WorkFolder  # isort: skip

needs_stories = pytest.mark.skipif(not STORIES.is_dir(), reason="stories260K is not in ../shared")
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


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


# --- calibration ------------------------------------------------------------------------------------------------------


def test_draw_follows_the_distribution() -> None:
    scores = torch.tensor([[0.0, 1.0, -2.0, float("-inf")]]).expand(40000, -1)
    counts = torch.bincount(draw(scores, torch.Generator().manual_seed(0)), minlength=4) / 40000
    torch.testing.assert_close(counts, scores[0].softmax(-1), atol=0.01, rtol=0)
    assert counts[3] == 0


def test_sampled_text_is_seeded_and_starts_anew_after_an_end(tmp_path: Path) -> None:
    source = open_source(write_model(tmp_path, {"bos_token_id": 3, "eos_token_id": [4, 5]}))
    text = sample_text(source, 8, 16, seed=1)
    assert text.shape == (8, 16) and text.dtype == torch.int64
    assert text[::2, 0].tolist() == [3] * 4
    assert torch.equal(text, sample_text(source, 8, 16, seed=1))
    assert not torch.equal(text, sample_text(source, 8, 16, seed=2))


@needs_stories
def test_sampled_stories_are_likely_under_the_model() -> None:
    source = open_source(STORIES)
    text = sample_text(source, 4, 96, seed=0)
    log_p = logits_of(source, text).log_softmax(-1)
    loss = -log_p[:, :-1].gather(-1, text[:, 1:, None]).mean()
    entropy = -(log_p.exp() * log_p).sum(-1).mean()
    assert abs(float(loss - entropy)) < 0.25  # text at temperature 1 costs its entropy
    assert float(loss) < 3


def test_hessians_are_the_mean_outer_products_of_inputs(tmp_path: Path) -> None:
    source = open_source(write_model(tmp_path, AWKWARD))
    config, tensors = source.config, source.layer(0)
    tokens = random_tokens(source, 19, 8)  # two batches of unequal size
    states = first_states(tokens, source.embedding())
    found = layer_hessians(config, tensors, states, 4)
    inputs: dict[str, Any] = {}

    def watch(name, x):
        inputs[name] = x
        return torch.nn.functional.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    rope = rope_table(config, torch.arange(8))
    out = layer_forward(config, tensors, source.embedding()[tokens], rope, linear=watch, r4_block=4)
    torch.testing.assert_close(torch.cat(states), out)
    assert set(found) == {group[0] for group in GROUPS}
    for group in GROUPS:
        x = inputs[group[0]].reshape(-1, inputs[group[0]].shape[-1]).double()
        for name in group:
            assert torch.equal(inputs[name], inputs[group[0]])
        torch.testing.assert_close(found[group[0]].double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)


def test_moments_predict_a_small_change(tmp_path: Path) -> None:
    """1/2 sum S_o D H D^T of random noise in one matrix is the KL divergence that the noise causes."""
    source = open_source(write_model(tmp_path, {**AWKWARD, "attention_bias": False, "mlp_bias": False}, seed=2))
    config, ones = source.config, torch.ones(source.config.hidden_size)
    tokens = random_tokens(source, 64, 32)
    head = source.head() * source.final_norm()
    layers = [source.layer(i) for i in range(config.num_hidden_layers)]
    found = dict(sensitivities(config, lambda i: layers[i], source.embedding(), ones, head, tokens, 1, seed=0))
    assert list(found) == [3, 2, 1, 0] and found[3]["lm_head"].moment.shape == (config.vocab_size,)

    def answers(changed: int, tensors: Mapping[str, Any]) -> Any:
        states = first_states(tokens, source.embedding())
        for i, layer in enumerate(layers):
            advance(config, tensors if i == changed else layer, states, 1)
        return logits(config, torch.cat(states), ones, head).log_softmax(-1)

    generator = torch.Generator().manual_seed(1)
    plain = answers(-1, {})
    for index, group in ((0, GROUPS[3]), (1, GROUPS[0]), (2, GROUPS[1]), (2, GROUPS[2])):
        name = group[-1]
        noise = 0.02 * torch.randn(layers[index][f"{name}.weight"].shape, generator=generator)
        cost = 0.5 * found[index][name].moment @ ((noise @ found[index][name].hessian) * noise).sum(1)
        changed = answers(index, {**layers[index], f"{name}.weight": layers[index][f"{name}.weight"] + noise})
        kl = torch.nn.functional.kl_div(changed, plain, log_target=True, reduction="none").sum(-1).mean()
        assert float(cost) == pytest.approx(float(kl), rel=0.35), (index, name)
        assert float(kl) > 1e-5
    # Errors of a head's outputs in the directions that matter least: what hangs together is seen in the blocks alone.
    size, name = config.head_dim, "self_attn.q_proj"
    sensitivity = found[1][name]
    moments = sensitivity.blocks.mean(0)
    assert sensitivity.blocks.shape == (2, config.num_attention_heads, size, size)
    torch.testing.assert_close(moments.diagonal(dim1=1, dim2=2).reshape(-1), sensitivity.moment)
    assert found[1]["self_attn.v_proj"].blocks is None
    weak = torch.linalg.eigh(moments).eigenvectors[:, :, 0]
    noise = 0.5 * weak[:, :, None] * torch.randn(len(weak), 1, config.hidden_size, generator=generator)
    cost = 0.5 * ((moments @ noise @ sensitivity.hessian) * noise).sum()
    noise = noise.reshape(-1, config.hidden_size)
    alone = 0.5 * sensitivity.moment @ ((noise @ sensitivity.hessian) * noise).sum(1)
    changed = answers(1, {**layers[1], f"{name}.weight": layers[1][f"{name}.weight"] + noise})
    kl = torch.nn.functional.kl_div(changed, plain, log_target=True, reduction="none").sum(-1).mean()
    assert float(cost) == pytest.approx(float(kl), rel=0.5) and float(alone) > 3 * float(kl)


@pytest.mark.parametrize("kept_bytes", [0, 1 << 29])
def test_round_layer_moves_states_like_a_resumed_conversion(tmp_path: Path, kept_bytes: int) -> None:
    """Bit by bit; and every group sees the inputs that the groups before it, quantized, produce."""
    source = open_source(write_model(tmp_path, AWKWARD))
    config, tensors = source.config, source.layer(0)
    tokens, new, seen = random_tokens(source, 19, 8), {}, {}
    originals = first_states(tokens, source.embedding())
    states = [state + 0.1 * torch.randn(state.shape) for state in originals]
    starts = [[state.clone() for state in both] for both in (states, originals)]

    def quantize(names, hessian, pulls):
        fresh = {n: pack(rtn(tensors[f"{n}.weight"], 4)).weight(*tensors[f"{n}.weight"].shape) for n in names}
        new.update({f"{n}.weight": w for n, w in fresh.items()})
        seen[tuple(names)] = hessian, pulls
        return fresh

    means = round_layer(config, tensors, states, originals, 4, quantize, kept_bytes)
    assert list(seen) == list(GROUPS)
    quantized = {**tensors, **new}
    between: list[Any] = []  # states before each group's outputs are added
    inputs: list[dict[str, Any]] = []
    for t, begun, moved in zip((quantized, tensors), starts, (states, originals)):
        found: dict[str, Any] = {}

        def watch(name, x, t=t, found=found):
            found[name] = x.reshape(-1, x.shape[-1]).double()
            return torch.nn.functional.linear(x, t[f"{name}.weight"], t[f"{name}.bias"])

        rope = rope_table(config, torch.arange(8))
        start = torch.cat(begun)
        layer_forward(config, t, start, rope, linear=watch, r4_block=4)
        inputs.append(found)
        attended = torch.nn.functional.linear(
            found["self_attn.o_proj"], t["self_attn.o_proj.weight"].double(), t["self_attn.o_proj.bias"].double()
        )
        start = start.reshape(-1, config.hidden_size).double()
        between.append((start, start + attended))
        advance(config, t, begun, 4)
        assert all(torch.equal(a, b) for a, b in zip(begun, moved))
    for norm, group in zip(NORMS, GROUPS[::2], strict=True):
        torch.testing.assert_close(means[norm].double(), inputs[0][group[0]].mean(0), rtol=1e-5, atol=1e-6)
    for group, (hessian, pulls) in seen.items():
        x, x0 = (found[group[0]] for found in inputs)
        torch.testing.assert_close(hessian.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-4)
        lacking = (x0 - x) @ torch.cat([tensors[f"{name}.weight"] for name in group]).double().T
        if group == GROUPS[1]:
            lacking += between[1][0] - between[0][0]
        elif group == GROUPS[3]:
            lacking += between[1][1] - between[0][1]
        # Every batch of 16 sequences gives each half its half: here 8 and 8, then 2 and 1 (12 tokens each).
        first = torch.cat([torch.arange(64), torch.arange(128, 140)])
        second = torch.cat([torch.arange(64, 128), torch.arange(140, 152)])
        for pull, half in zip(pulls, (first, second), strict=True):
            torch.testing.assert_close(pull.double(), lacking[half].T @ x[half] / len(half), rtol=1e-4, atol=1e-4)


def test_hessian_counts_every_token() -> None:
    hessian = Moment(3)
    hessian.add(torch.tensor([[[1.0, 2, 0], [0, 0, 0]]]))
    hessian.add(torch.tensor([[3.0, 0, 0]]))
    torch.testing.assert_close(hessian.mean(), torch.tensor([[10.0, 2, 0], [2, 4, 0], [0, 0, 0]]) / 3)


def test_packed_matrices_come_back(tmp_path: Path) -> None:
    for bits in range(2, 9):
        grid = rtn(torch.randn(37, 21), bits)
        packed = unpack(pack(grid).tensors("x"), "x")
        assert packed.bits == bits and packed.codes.shape == (2, 3, 8 * bits)
        wanted = grid.levels.float()[grid.codes.long()] * grid.scales.float().T
        torch.testing.assert_close(packed.weight(37, 21), wanted)
        assert not packed.scales[:, 37:].any()


def test_comparison_known_answers() -> None:
    same, other = torch.log(torch.tensor([[0.5, 0.25, 0.25]])), torch.log(torch.tensor([[0.25, 0.5, 0.25]]))
    found = Comparison()
    found.add(torch.cat([same, same]), torch.cat([same + 3, other]), torch.tensor([0]))
    result = found.result()
    assert result["mean_kl"] == pytest.approx(0.5 * (0.5 * np.log(2) - 0.25 * np.log(2)))
    assert (result["tokens"], result["top1_agreement"], result["perplexity"]) == (2, 0.5, pytest.approx(2.0))


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
    began = time.monotonic()
    with pytest.raises(Error, match=message):
        run(source, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists() and time.monotonic() - began < 30
    assert not list((tmp_path / ".halfturn-work").glob("*/*/*.safetensors"))


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
    windows = read_texts(open_source(source), [tmp_path / "a.txt"], 64 * 20, 64)
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
    assert "KL" in shown and "bits a decoder weight" in " ".join(shown.split())
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"halfturn convert {source} {tmp_path / 'out'} --bpw 5 --calibration-tokens 1024" in card
    assert json.loads(invoke(*words, "--overwrite", "--json")).keys() >= RESULT_FIELDS


@needs_stories
def test_means_lower_what_int8_activations_cost(tmp_path: Path) -> None:
    """A real model: without its norms' means, the same checkpoint loses more to int8 activations."""
    native = pytest.importorskip("halfturn._C", reason="the engine is not built")
    run(STORIES, tmp_path / "out", {"calibration_tokens": 2048}, bpw=5, uniform=True)
    shutil.copytree(tmp_path / "out", tmp_path / "without")
    edit_config(tmp_path / "without", lambda config: config["quantization_config"].update(means=False))
    tensors = read_tensors(tmp_path / "out")
    assert sum(name.endswith(".mean") for name in tensors) == 2 * 5 + 1
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(".mean")}
    write_safetensors(tmp_path / "without" / "model.safetensors", kept)
    tokens = sample_text(open_source(STORIES), 8, 256, 1)

    def answers(name: str, mode: str) -> torch.Tensor:
        model = native.Model(str(tmp_path / name), mode=mode, k_bits=16, v_bits=16, context=256)
        items = ([native.Item(text.tolist(), 0, list(range(8)))] for text in tokens)
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
    pytest.importorskip("halfturn._C", reason="the engine is not built")
    source = write_model(tmp_path / "source", AWKWARD)
    run(source, tmp_path / "out", {"rounding": "rtn", "head_bits": 8}, bpw=9, uniform=True, bits=("*=8",))
    (tmp_path / "text.txt").write_text("".join(random.Random(1).choices("abcdefgh -,.ABC123", k=400)))
    words = ["eval", "kl", str(tmp_path / "out"), "--reference", str(source), "--text", str(tmp_path / "text.txt")]
    words += ["--context", "64", "--mode", "f16", "--kv-bits", "16", "--json"]
    result = json.loads(invoke(*words))
    assert result["tokens"] == 6 * 64 and result["mean_kl"] < 2e-3 and result["top1_agreement"] > 0.95
    assert result["perplexity"] == pytest.approx(result["reference_perplexity"], rel=0.02)
    with pytest.raises(Error, match="has a vocabulary of 50"):
        other = write_model(tmp_path / "other")
        words[words.index("--reference") + 1] = str(other)
        invoke(*words)
