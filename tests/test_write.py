"""The writer and the model card: what is written, what is refused, what a kill leaves behind."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from checkpoints import dense_weights, dequantize, read_tensors
from halfturn import _C
from halfturn.converter import out_folder, write
from halfturn.converter.architectures import ModelConfig
from halfturn.converter.card import Card, Quality, model_card
from halfturn.converter.codecs.tiles import PLANES, pack_codes, round_up
from halfturn.converter.out_folder import OutFolder, check_disk
from halfturn.converter.write import LinearPlan, Writer, bits_per_weight, plan_linears
from halfturn.error import Error

NORMS = [f"model.layers.{n}.{which}_layernorm" for n in range(2) for which in ("input", "post_attention")]
NORMS.append("model.norm")
CONFIG = ModelConfig(
    hidden_size=40,  # none of the sizes is a multiple of 16
    intermediate_size=72,
    num_hidden_layers=2,
    num_attention_heads=5,
    num_key_value_heads=1,
    head_dim=8,
    vocab_size=99,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    attention_bias=True,
    tie_word_embeddings=True,
    eos_token_id=[1, 2],
)


def linears_of(config: ModelConfig = CONFIG) -> dict[str, LinearPlan]:
    names = [f"model.layers.{i}.{short}" for i in range(config.num_hidden_layers) for short in config.linear_shapes()]
    widths = {name: 2 + i % 7 for i, name in enumerate(names)}
    return plan_linears(config, {**widths, write.EMBEDDING: 8, write.HEAD: 6}, r4_block=4)


def content(name: str, plan: LinearPlan) -> dict[str, Any]:
    """What is written of a linear, the same every time, and its codes [out_padded, in_padded]."""
    rng = np.random.default_rng([*name.encode()])
    outs, ins = round_up(plan.outs), round_up(plan.ins)
    codes = rng.integers(0, 2**plan.bits, (outs, ins), dtype=np.uint8)
    scales = rng.uniform(0.01, 0.02, (plan.groups, outs)).astype(np.float16)
    scales[:, plan.outs :] = 0
    levels = np.minimum(np.arange(2**plan.bits) - 127, 127).astype(np.int8)
    bias = rng.standard_normal(plan.outs, dtype=np.float32) if plan.bias else None
    return {"codes": codes, "tiles": pack_codes(codes, plan.bits), "scales": scales, "levels": levels, "bias": bias}


def fill(writer: Writer, names: list[str] | None = None) -> None:
    for name in names or list(writer.linears):
        c = content(name, writer.linears[name])
        writer.write_linear(name, c["tiles"], c["scales"], c["levels"], c["bias"])


def tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def checkpoint(out: Path, **options: Any) -> Path:
    writer = Writer(out, CONFIG, linears_of(), rotation="hadamard", **options)
    fill(writer)
    if options.get("means"):
        for number, norm in enumerate(NORMS):
            writer.write_mean(norm, np.arange(CONFIG.hidden_size, dtype=np.float16) + number)
    return writer.finish(tokenizer, "# card\n", {"mean_kl": 0.5})


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_what_is_in_the_folder(tmp_path: Path) -> None:
    out = checkpoint(tmp_path / "deep" / "out")
    assert sorted(files(out)) == ["README.md", "config.json", "model.safetensors", "tokenizer.json"]
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    config = json.loads((out / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == {**CONFIG.to_dict(), "tie_word_embeddings": False}
    assert config["head_dim"] == 8 and config["hidden_act"] == "silu" and config["eos_token_id"] == [1, 2]
    linears = quantization.pop("linears")
    assert quantization == {
        "quant_method": "halfturn",
        "format": 1,
        "rotation": "hadamard",
        "source_tied": True,
        "means": False,
        "measured": {"mean_kl": 0.5},
    }
    segment = {"codec": "grid", "bits": 8, "rows": 80}
    assert linears["model.layers.0.mlp.down_proj"] == {"segments": [segment], "r4_block": 4}
    assert linears["lm_head"] == {"segments": [{"codec": "grid", "bits": 6, "rows": 48}]}
    tensors = read_tensors(out)
    dense = dense_weights(out)
    for name, plan in linears_of().items():
        c = content(name, plan)
        assert np.array_equal(tensors[f"{name}.codes"], c["tiles"]) and np.array_equal(
            tensors[f"{name}.scales"], c["scales"]
        )
        whole = dequantize(c["tiles"], c["scales"], c["levels"], plan.bits)
        assert np.array_equal(dense[name], whole[: plan.outs, : plan.ins])
        assert (f"{name}.bias" in tensors) == ("self_attn" in name)
        if plan.bias:
            assert np.array_equal(tensors[f"{name}.bias"], c["bias"])
    norms = [n for n in tensors if "norm" in n]
    assert len(norms) == 5 and all(tensors[n].tolist() == [1.0] * 40 for n in norms)
    assert len(tensors) == len(norms) + 16 * 3 + 8


def test_safetensors_reads_it_and_codes_are_aligned(tmp_path: Path) -> None:
    numpy = pytest.importorskip("safetensors.numpy", reason="the converter needs the extra [convert]")
    out = checkpoint(tmp_path / "out")
    ours = read_tensors(out)
    theirs = numpy.load_file(out / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[n], theirs[n]) for n in ours)
    data = (out / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert (8 + length) % 32 == 0
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name.endswith(".codes"):
            assert entry["data_offsets"][0] % 32 == 0, name


def test_shards(tmp_path: Path) -> None:
    one, several = checkpoint(tmp_path / "one"), checkpoint(tmp_path / "several", shard_bytes=8000)
    index = json.loads((several / "model.safetensors.index.json").read_text())
    shards = sorted(several.glob("*.safetensors"))
    assert len(shards) > 3
    assert [s.name for s in shards] == [
        f"model-{k:05d}-of-{len(shards):05d}.safetensors" for k in range(1, len(shards) + 1)
    ]
    a, b = read_tensors(one), read_tensors(several)
    assert a.keys() == b.keys() and all(np.array_equal(a[n], b[n]) for n in a)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in a.values())
    for shard in shards:
        names = {n for n, file in index["weight_map"].items() if file == shard.name}
        assert sum(a[n].nbytes for n in names) <= 8000
        text = shard.read_bytes()
        header = json.loads(text[8 : 8 + int.from_bytes(text[:8], "little")])
        assert names == header.keys() - {"__metadata__"}
        linears = {n.rpartition(".")[0] for n in names if "norm" not in n}
        assert all({f"{n}.codes", f"{n}.scales", f"{n}.levels"} <= names for n in linears)


def test_the_same_input_gives_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    first = files(checkpoint(tmp_path / "a"))
    writer = Writer(tmp_path / "b", CONFIG, linears_of(), rotation="hadamard")
    fill(writer, list(reversed(writer.linears)))
    assert files(writer.finish(tokenizer, "# card\n", {"mean_kl": 0.5})) == first


@pytest.mark.parametrize("means", [False, True])
def test_bits_per_weight_are_those_of_the_file(tmp_path: Path, means: bool) -> None:
    out = checkpoint(tmp_path / "out", means=means)
    tensors = read_tensors(out)
    found = bits_per_weight(CONFIG, linears_of(), means)
    assert found["bytes"] == sum(t.nbytes for t in tensors.values())
    decoder = sum(t.nbytes for n, t in tensors.items() if "_proj." in n)
    weights = 2 * (40 * 40 * 2 + 8 * 40 * 2 + 72 * 40 * 3)
    assert found["decoder"] == pytest.approx(8 * decoder / weights)
    assert found["file"] == pytest.approx(8 * found["bytes"] / (weights + 99 * 40 + 5 * 40 + 2 * (40 + 8 + 8 + 40)))


def test_means_of_norms(tmp_path: Path) -> None:
    assert not any(name.endswith(".mean") for name in read_tensors(checkpoint(tmp_path / "without")))
    out = checkpoint(tmp_path / "with", means=True)
    assert json.loads((out / "config.json").read_text())["quantization_config"]["means"] is True
    tensors = read_tensors(out)
    for number, norm in enumerate(NORMS):
        assert tensors[f"{norm}.mean"].tolist() == [i + number for i in range(CONFIG.hidden_size)]
    writer = Writer(tmp_path / "spoilt", CONFIG, linears_of(), rotation="none", means=True)
    with pytest.raises(Error, match=r"model.norm has a mean that is NaN"):
        writer.write_mean("model.norm", np.full(CONFIG.hidden_size, np.nan, np.float16))
    fill(writer)
    with pytest.raises(Error, match=r"5 of \d+ tensors were not written, the first is .*input_layernorm.mean"):
        writer.write_config()
    writer.abort()


def test_groups_and_their_errors() -> None:
    plan = LinearPlan(40, 72, 4, groups=5)
    assert plan.tensors("x")[1].shape == (5, 48)
    with pytest.raises(Error, match="3 groups don't divide 80 inputs"):
        LinearPlan(40, 72, 4, groups=3)
    with pytest.raises(Error, match=r"no width was chosen for model.embed_tokens"):
        plan_linears(CONFIG, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": lambda s: -s}, "scales that are negative"),
        ({"scales": lambda s: np.full_like(s, np.inf)}, "negative, NaN or infinite"),
        ({"scales": lambda s: s + np.float16(1)}, "aren't 0 in its padding, outputs 40 to 48"),
        ({"scales": lambda s: s.astype(np.float32)}, r"q_proj.scales is float32 \[1, 48\], planned were F16 \[1, 48\]"),
        ({"tiles": lambda t: t[:2]}, r"q_proj.codes is uint32 \[2, 3, 16\], planned were U32 \[3, 3, 16\]"),
        ({"levels": lambda v: v[::-1].copy()}, "levels that do not increase"),
        ({"levels": lambda v: v - np.int8(1)}, "from -127 or above"),
        ({"bias": lambda b: None}, "lacks a bias"),
        ({"bias": lambda b: b * np.nan}, "bias that is NaN"),
    ],
)
def test_refused_tensors(tmp_path: Path, change: dict[str, Callable[[Any], Any]], message: str) -> None:
    writer = Writer(tmp_path / "out", CONFIG, linears_of(), rotation="none")
    name = "model.layers.0.self_attn.q_proj"
    c = content(name, writer.linears[name])
    for part, spoil in change.items():
        c[part] = spoil(c[part])
    with pytest.raises(Error, match=message):
        writer.write_linear(name, c["tiles"], c["scales"], c["levels"], c["bias"])
    writer.abort()
    assert list(tmp_path.iterdir()) == []


def test_tensors_twice_unknown_or_missing(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "out", CONFIG, linears_of(), rotation="none")
    fill(writer, ["lm_head"])
    with pytest.raises(Error, match=r"lm_head.codes was written before"):
        fill(writer, ["lm_head"])
    with pytest.raises(Error, match=r"model.norm.bias is not a tensor of this checkpoint"):
        writer.write("model.norm.bias", np.ones(40, np.float16))
    with pytest.raises(Error, match=r"53 of 61 tensors were not written, the first is model.embed_tokens.codes"):
        writer.finish(tokenizer, "# card\n")
    assert not (tmp_path / "out").exists()
    writer.abort()


def test_the_folder_can_be_loaded_before_it_is_finished(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "out", CONFIG, linears_of(), rotation="none")
    fill(writer)
    writer.write_config()
    assert not (tmp_path / "out").exists()
    assert read_tensors(writer.folder)["model.norm.weight"].tolist() == [1.0] * 40
    (writer.folder / "allocation.json").write_text("{}")
    out = writer.finish(tokenizer, "# card\n", {"mean_kl": 1.0})
    assert (out / "allocation.json").is_file() and not writer.folder.exists()
    assert json.loads((out / "config.json").read_text())["quantization_config"]["measured"] == {"mean_kl": 1.0}


def test_an_existing_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    first = files(checkpoint(out))  # an empty folder is no obstacle
    with pytest.raises(Error, match="out exists; choose another folder, or replace it with --overwrite"):
        checkpoint(out)
    (out / "README.md").write_text("mine")
    assert files(checkpoint(out, overwrite=True)) == first
    foreign = tmp_path / "home"
    foreign.mkdir()
    (foreign / "letter.txt").write_text("dear")
    with pytest.raises(Error, match="is not a Halfturn checkpoint, so it is not replaced"):
        checkpoint(foreign, overwrite=True)
    assert files(foreign) == {"letter.txt": b"dear"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home", "out"]


def test_a_link_to_a_folder_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "disk" / "real").mkdir(parents=True)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "disk" / "real")
    first = files(checkpoint(link))
    for _ in range(2):
        (link / "README.md").write_text("mine")
        assert files(checkpoint(link, overwrite=True)) == first
    assert link.is_symlink() and files(tmp_path / "disk" / "real") == first
    assert sorted(p.name for p in tmp_path.glob("**/*") if p.parent in (tmp_path, tmp_path / "disk")) == [
        "disk",
        "link",
        "real",
    ]


def test_a_link_that_an_earlier_version_moved_away(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "letter.txt").write_text("dear")
    (tmp_path / ".out.old").symlink_to(tmp_path / "real")
    checkpoint(tmp_path / "out")
    checkpoint(tmp_path / "out", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "real"]
    assert files(tmp_path / "real") == {"letter.txt": b"dear"}


def test_a_folder_that_appeared_meanwhile_is_kept(tmp_path: Path) -> None:
    with OutFolder(tmp_path / "out") as place:
        writer = Writer(place, CONFIG, linears_of(), rotation="none")
        fill(writer)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "letter.txt").write_text("dear")
        with pytest.raises(Error, match="out exists; choose another folder"):
            writer.finish(tokenizer, "# card\n")
        writer.abort()
    assert files(tmp_path / "out") == {"letter.txt": b"dear"} and not writer.folder.exists()


def test_folders_that_no_other_can_replace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    with pytest.raises(Error, match="is the folder you are in, and would be replaced"):
        OutFolder(".")
    with pytest.raises(Error, match="is a mount point"):
        out_folder._check_replaceable(Path("/proc"))
    assert not list(tmp_path.rglob(".*"))


def test_links_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("dangling", "loop"):
        with pytest.raises(Error, match=f"{name} is a link to .*, which does not exist; remove it"):
            OutFolder(tmp_path / name)
    with pytest.raises(Error, match="loop"):
        OutFolder(tmp_path / "loop" / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dangling", "loop"]


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "out", tmp_path / ("n" * 250), tmp_path / ("n" * 300)):
        with pytest.raises(Error, match=r"can't be written .*; choose another place for OUT"):
            OutFolder(out)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_writer_that_fails_to_begin_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(writer: Writer, name: str, value: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Writer, "write", full)
    with pytest.raises(OSError, match="No space"):
        Writer(tmp_path / "out", CONFIG, linears_of(), rotation="none")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_the_check_refuses_does_not_appear(tmp_path: Path) -> None:
    def check(folder: Path) -> None:
        assert {"config.json", "tokenizer.json", "README.md"} <= {file.name for file in folder.iterdir()}
        raise Error("no")

    writer = Writer(tmp_path / "out", CONFIG, linears_of(), rotation="none")
    fill(writer)
    with pytest.raises(Error, match="no"):
        writer.finish(tokenizer, "# card\n", {}, check)
    writer.abort()
    assert list(tmp_path.iterdir()) == []


def test_two_conversions_into_one_folder(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "out", CONFIG, linears_of(), rotation="none")
    fill(writer)
    with pytest.raises(Error, match=r"another conversion is writing .*out; wait for it"):
        Writer(tmp_path / "out", CONFIG, linears_of(), rotation="none")
    writer.finish(tokenizer, "# card\n")


def test_kill_leaves_no_folder_and_the_next_run_gives_the_same_bytes(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; sys.path.insert(0, sys.argv[2]); from pathlib import Path; import test_write as t\n"
        "writer = t.Writer(Path(sys.argv[1]), t.CONFIG, t.linears_of(), rotation='hadamard')\n"
        "t.fill(writer, ['lm_head', 'model.embed_tokens'])\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    tests = str(Path(__file__).parent)
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path / "out"), tests]).returncode
    assert ended == -signal.SIGKILL
    assert [p.name for p in tmp_path.iterdir()] == [".out.partial"]
    assert files(checkpoint(tmp_path / "out")) == files(checkpoint(tmp_path / "never-killed"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["never-killed", "out"]


def test_kill_between_the_renames_loses_nothing(tmp_path: Path) -> None:
    """The replaced folder was moved away and the new one not yet in place: the next run puts the old one back first,
    and may then not replace it without being told to."""
    out = checkpoint(tmp_path / "out")
    before = files(out)
    out.rename(tmp_path / ".out.old")
    (tmp_path / ".out.partial").mkdir()
    with pytest.raises(Error, match="out exists; choose another folder, or replace it with --overwrite"):
        Writer(out, CONFIG, linears_of(), rotation="none")
    assert files(out) == before and [p.name for p in tmp_path.iterdir()] == ["out"]
    out.rename(tmp_path / ".out.old")
    (tmp_path / ".out.partial").mkdir()
    Writer(out, CONFIG, linears_of(), rotation="none", overwrite=True).abort()
    assert files(out) == before and [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(5, "Input/output error")])
@pytest.mark.parametrize("moved", [False, True])
def test_a_failure_between_the_renames_puts_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, moved: bool
) -> None:
    """moved: the interrupt comes when the new folder is in its place already; then it stays there."""
    out, rename = checkpoint(tmp_path / "out"), Path.rename
    before = files(out)

    def fail(path: Path, target: Path) -> Path:
        if path.name != ".out.partial":
            return rename(path, target)
        if moved:
            rename(path, target)
        raise error

    with monkeypatch.context() as patched, pytest.raises(type(error)), OutFolder(out, overwrite=True) as place:
        (place.folder / "new.txt").write_text("new")
        patched.setattr(Path, "rename", fail)
        place.publish()
    if moved:
        assert (out / "new.txt").read_text() == "new" and not (tmp_path / ".out.old").exists()
    else:
        assert files(out) == before and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_was_replaced_is_not_put_back(tmp_path: Path) -> None:
    """Killed when the new one was in its place, which was moved elsewhere."""
    checkpoint(tmp_path / ".out.old")
    with pytest.raises(Error, match=r"/\.out\.old is what an earlier conversion replaced; rename it to keep it, or"):
        OutFolder(tmp_path / "out", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == [".out.old"]


@pytest.mark.parametrize("name", [".out.old", ".out.trash"])
def test_what_is_in_the_way_of_what_is_replaced(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(Error, match=f"/{name} is in the way of what a conversion replaces; remove or rename it"):
        OutFolder(tmp_path / "out", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_what_was_replaced_never_comes_back(tmp_path: Path) -> None:
    """Killed while it was being removed, and its successor moved elsewhere."""
    program = (
        "import os, shutil, signal, sys; sys.path.insert(0, sys.argv[2]); from pathlib import Path\n"
        "import test_write as t\n"
        "def killed(path, *a, **k):\n"
        "    if Path(path).exists():\n"
        "        next(Path(path).iterdir()).unlink()\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "shutil.rmtree = killed\n"
        "t.checkpoint(Path(sys.argv[1]), overwrite=True)"
    )
    out = checkpoint(tmp_path / "out")
    whole = files(out)
    ended = subprocess.run([sys.executable, "-c", program, str(out), str(Path(__file__).parent)]).returncode
    assert ended == -signal.SIGKILL and files(out) == whole
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.trash", "out"]
    out.rename(tmp_path / "elsewhere")
    with OutFolder(out):
        assert not out.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["elsewhere"]


def test_a_lock_that_a_kill_left_in_a_complete_folder(tmp_path: Path) -> None:
    out = checkpoint(tmp_path / "out")
    (tmp_path / "other").mkdir()
    for folder in (out, tmp_path / "other"):
        (folder / ".lock").touch()
        with out_folder.lock(folder / ".lock", "held"), pytest.raises(Error, match="exists"):
            OutFolder(folder)
        assert (folder / ".lock").exists()  # it was held
        with pytest.raises(Error, match="exists"):
            OutFolder(folder)
    assert not (out / ".lock").exists() and (tmp_path / "other" / ".lock").exists()


def test_full_disk_is_noticed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(out_folder.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    check_disk(tmp_path / "not" / "yet", 10**9)
    with pytest.raises(Error, match=r"2\.5 GB are needed in .*, 1\.0 GB are free"):
        check_disk(tmp_path / "not" / "yet", 2_500_000_000)
    monkeypatch.setattr(out_folder.shutil, "disk_usage", lambda path: SimpleNamespace(free=1_200_000))
    with pytest.raises(Error, match=r"2.5 MB are needed in .*, 1.2 MB are free"):
        check_disk(tmp_path / "not" / "yet", 2_500_000)
    monkeypatch.setattr(out_folder.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    big = dataclasses.replace(CONFIG, vocab_size=16_000_000)
    with pytest.raises(Error, match=r"GB are needed in .*, 1\.0 GB are free"):
        Writer(tmp_path / "out", big, linears_of(big), rotation="none")
    assert list(tmp_path.iterdir()) == []


def test_native_reader_accepts_it(tmp_path: Path) -> None:
    out = checkpoint(tmp_path / "out", shard_bytes=8000)
    _C.inspect(str(out))
    for bits in PLANES:
        codes = np.random.default_rng(bits).integers(0, 2**bits, (32, 48), dtype=np.uint8)
        assert np.array_equal(_C.pack(codes, bits), pack_codes(codes, bits))


def test_card_says_the_numbers() -> None:
    card = Card(
        name="tiny-4.0bpw",
        source="Tiny",
        config=CONFIG,
        decoder_bits=4.0123,
        file_bytes=2_500_000,
        command="halfturn convert Tiny tiny-4.0bpw --bpw 4.0",
        version="0.1.0",
        quality=Quality(0.1234, 1.0567, 0.9111, 10240, "wiki.test.raw", predicted_kl=0.11),
        calibration="32,768 tokens sampled from the model itself",
        widths={"v_proj": 5.9},
        facts={"license": "apache-2.0", "base_model": "someone/tiny"},
    )
    text = model_card(card)
    front, _, body = text.removeprefix("---\n").partition("---\n")
    assert 'license: "apache-2.0"\nbase_model: "someone/tiny"\nbase_model_relation: quantized\n' in front
    for part in (
        "| 4.012 |",
        "| 2.5 MB |",
        "| 0.1234 |",
        "| 1.0567 |",
        "| 91.11% |",
        "| 0.1100 |",
        "10,240 tokens of wiki.test.raw",
        "| v_proj | 5.90 |",
        "halfturn convert Tiny tiny-4.0bpw --bpw 4.0\n",
        "32,768 tokens sampled from the model itself",
    ):
        assert part in body, part
    assert f"| {8 * 2_500_000 / CONFIG.parameters():.3f} |" in body
    assert text == model_card(card)
    bare = model_card(dataclasses.replace(card, quality=None, facts={}))
    odd = os.fsdecode(b"o\xff")
    assert "# o?\n" in model_card(dataclasses.replace(card, name=odd)) and odd not in model_card(
        dataclasses.replace(card, source=odd, command=f"halfturn convert {odd}")
    )
    assert "Not measured" in bare and "license" not in bare
