"""The loader under AddressSanitizer and UndefinedBehaviorSanitizer: valid, broken and fuzzed checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import sanitized
from checkpoints import write_checkpoint
from malformed import broken_copies

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed, so nothing can be sanitized")

SMALL: dict[str, Any] = dict(
    hidden=20, intermediate=40, layers=2, heads=2, kv_heads=1, head_dim=8, vocab=37, bits=3, biases=True
)
TINY: dict[str, Any] = dict(hidden=16, intermediate=16, layers=1, heads=1, kv_heads=1, head_dim=16, vocab=16, bits=2)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def load_folders() -> Path:
    return sanitized.build("load_folders", [*sanitized.LOADER, sanitized.TESTS / "load_folders.cpp"])


def test_valid_checkpoints(load_folders: Path, tmp_path: Path) -> None:
    """Every width, odd sizes, groups, shards: both decoders read all of it and agree."""
    folders = [write_checkpoint(tmp_path / f"bits{bits}", **SMALL | {"bits": bits}, seed=bits) for bits in range(2, 9)]
    folders.append(write_checkpoint(tmp_path / "groups", **SMALL, groups=3, r4_block=8, rope_scaling=LLAMA3))
    folders.append(
        write_checkpoint(tmp_path / "shards", **SMALL, shards=4, random_norms=True, means=True, rotation="hadamard")
    )
    lines = sanitized.run(load_folders, *folders).stdout.splitlines()
    assert lines == ["loaded"] * len(folders)


def test_two_hundred_broken_checkpoints(load_folders: Path, tmp_path: Path) -> None:
    sources = [write_checkpoint(tmp_path / "single", **SMALL), write_checkpoint(tmp_path / "shards", **SMALL, shards=3)]
    broken = broken_copies(sources, tmp_path, 200)
    lines = sanitized.run(load_folders, *broken).stdout.splitlines()
    assert len(lines) == len(broken)
    assert all(line == "loaded" or (line.startswith("refused: ") and len(line) > 30) for line in lines)
    assert sum(line != "loaded" for line in lines) >= 120


def test_the_engine_runs_what_the_loader_lets_through(tmp_path: Path) -> None:
    """Forward passes and sampling on every instruction set; broken copies are refused or run."""
    program = sanitized.build("run_folders", [*sanitized.ENGINE, sanitized.TESTS / "run_folders.cpp"])
    small = {**SMALL, "max_position_embeddings": 64, "layers": 1}
    folders = [write_checkpoint(tmp_path / f"bits{bits}", **small | {"bits": bits}, seed=bits) for bits in range(2, 9)]
    folders.append(write_checkpoint(tmp_path / "groups", **small, groups=3, r4_block=8, rotation="hadamard"))
    folders.append(write_checkpoint(tmp_path / "means", **small, means=True))
    assert sanitized.run(program, *folders).stdout.splitlines() == ["ran"] * len(folders)
    broken = broken_copies(folders[:2], tmp_path, 200)
    lines = sanitized.run(program, *broken).stdout.splitlines()
    assert len(lines) == len(broken)
    assert all(line == "ran" or (line.startswith("refused: ") and len(line) > 30) for line in lines)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Inputs of fuzz_checkpoint.cpp."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    changes: list[dict[str, Any]] = [{}, {"biases": True}, {"rope_scaling": LLAMA3}, {"bits": 7, "r4_block": 8}]
    for number, change in enumerate(changes):
        model = write_checkpoint(tmp_path / f"seed{number}", **TINY | change, seed=number)
        config, weights = (model / "config.json").read_bytes(), (model / "model.safetensors").read_bytes()
        (folder / f"single{number}").write_bytes(config + b"\x1e\x1e" + weights)
    model = write_checkpoint(tmp_path / "sharded", **TINY, shards=2)
    index = (model / "model.safetensors.index.json").read_bytes()
    for shard in (b"00001", b"00002"):
        index = index.replace(b"model-" + shard + b"-of-00002.safetensors", b"shard.safetensors")
    weights = (tmp_path / "seed0" / "model.safetensors").read_bytes()
    (folder / "index").write_bytes((model / "config.json").read_bytes() + b"\x1e" + index + b"\x1e" + weights)
    return folder


def test_random_changes(corpus: Path) -> None:
    sources = [*sanitized.LOADER, sanitized.TESTS / "fuzz_checkpoint.cpp", sanitized.TESTS / "mutate_main.cpp"]
    program = sanitized.build("mutate", sources)
    assert "2000 runs" in sanitized.run(program, "2000", "1", *sorted(corpus.iterdir())).stdout


def test_libfuzzer(corpus: Path, tmp_path: Path) -> None:
    missing = sanitized.libfuzzer_is_missing(tmp_path)
    if missing:
        pytest.skip(missing)
    program = sanitized.build(
        "fuzz",
        [*sanitized.LOADER, sanitized.TESTS / "fuzz_checkpoint.cpp"],
        compiler="clang++",
        sanitizers="-fsanitize=fuzzer,address,undefined",
    )
    options = ["-runs=2000", "-seed=1", "-max_len=16384", "-timeout=10", "-print_final_stats=1"]
    dictionary = f"-dict={sanitized.TESTS / 'checkpoint.dict'}"
    done = sanitized.run(program, *options, dictionary, f"-artifact_prefix={tmp_path}/", corpus)
    assert "Done 2000 runs" in done.stderr
