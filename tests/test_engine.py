"""The compiled engine as a whole: against a plain forward pass in numpy, across instruction sets and batches."""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import dense_weights, read_tensors, write_checkpoint, write_overflowing, write_safetensors
from halfturn import _C
from halfturn.error import Error
from halfturn.model import Model

ISAS = _C.cpu_features()["available"]
SHAPE: dict[str, Any] = dict(hidden=64, intermediate=96, layers=2, heads=4, kv_heads=2, head_dim=16, vocab=300)
ODD: dict[str, Any] = dict(
    hidden=72, intermediate=172, layers=2, heads=6, kv_heads=3, head_dim=10, vocab=261, biases=True
)


def hadamard_blocks(x: np.ndarray, block: int) -> np.ndarray:
    matrix = np.ones((1, 1))
    while len(matrix) < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return (x.reshape(*x.shape[:-1], -1, block) @ matrix.T / math.sqrt(block)).reshape(x.shape)


def plain_logits(folder: Path, tokens: list[int], means: dict[str, np.ndarray] | None = None) -> np.ndarray:
    """float64 logits [tokens, vocab] from the definition, with nothing quantized but the weights; means <- what each
    norm gives on average."""
    config = json.loads((folder / "config.json").read_text())
    weights, tensors = dense_weights(folder), read_tensors(folder)
    heads, kv_heads, dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    linears = config["quantization_config"]["linears"]

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        y = x @ weights[name].astype(np.float64).T
        return y + tensors[f"{name}.bias"] if f"{name}.bias" in tensors else y

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        scale = tensors[f"{name}.weight"].astype(np.float64)
        normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + config["rms_norm_eps"]) * scale
        if means is not None:
            means[name] = normed.mean(0)
        return normed

    angles = np.arange(len(tokens))[:, None] * config["rope_theta"] ** (-np.arange(0, dim, 2) / dim)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]

    def rope(x: np.ndarray) -> np.ndarray:
        a, b = x[..., : dim // 2], x[..., dim // 2 :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    x = weights["model.embed_tokens"][tokens].astype(np.float64)
    causal = np.tril(np.ones((len(tokens), len(tokens)), bool))
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        n = norm(p + "input_layernorm", x)
        q = rope(linear(p + "self_attn.q_proj", n).reshape(-1, heads, dim))
        k = rope(linear(p + "self_attn.k_proj", n).reshape(-1, kv_heads, dim))
        v = linear(p + "self_attn.v_proj", n).reshape(-1, kv_heads, dim)
        k, v = np.repeat(k, heads // kv_heads, 1), np.repeat(v, heads // kv_heads, 1)
        scores = np.where(causal, np.einsum("qhd,khd->hqk", q, k) / math.sqrt(dim), -np.inf)
        p_attn = np.exp(scores - scores.max(-1, keepdims=True))
        p_attn /= p_attn.sum(-1, keepdims=True)
        x = x + linear(p + "self_attn.o_proj", np.einsum("hqk,khd->qhd", p_attn, v).reshape(len(tokens), -1))
        n = norm(p + "post_attention_layernorm", x)
        gate, up = linear(p + "mlp.gate_proj", n), linear(p + "mlp.up_proj", n)
        hidden = gate / (1 + np.exp(-gate)) * up
        block = linears[p + "mlp.down_proj"].get("r4_block", 1)
        x = x + linear(p + "mlp.down_proj", hadamard_blocks(hidden, block))
    return linear("lm_head", norm("model.norm", x))


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def tokens_of(vocab: int, count: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(0, vocab, count)]


def logits(model: Any, tokens: list[int]) -> np.ndarray:
    return np.asarray(model.logits([_C.Item(tokens, 0, list(range(-(-len(tokens) // model.page_size))))]))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("isa", ISAS)
def test_every_width_against_the_plain_forward(tmp_path: Path, bits: int, isa: str) -> None:
    """f16 mode rounds activations to half precision, a8 to 8 bits: errors of that size and no more."""
    write_checkpoint(tmp_path / "m", **SHAPE, bits=bits, r4_block=8, rotation="hadamard")
    tokens = tokens_of(300, 40)
    plain = plain_logits(tmp_path / "m", tokens)
    for mode, limit in (("f16", 3e-3), ("a8", 6e-2)):
        model = _C.Model(str(tmp_path / "m"), threads=2, mode=mode, k_bits=16, v_bits=16, context=64, isa=isa)
        assert difference(logits(model, tokens), plain) < limit


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("isa", ISAS)
def test_odd_sizes_biases_and_groups(tmp_path: Path, groups: int, isa: str) -> None:
    shape = ODD if groups == 1 else {**SHAPE, "biases": True}
    write_checkpoint(tmp_path / "m", **shape, bits=5, groups=groups, r4_block=4)
    tokens = tokens_of(shape["vocab"], 33)
    model = _C.Model(str(tmp_path / "m"), mode="f16", k_bits=16, v_bits=16, context=64, isa=isa)
    assert difference(logits(model, tokens), plain_logits(tmp_path / "m", tokens)) < 3e-3


@pytest.mark.parametrize("shape", [SHAPE, ODD])
@pytest.mark.parametrize("isa", ISAS)
def test_means_are_left_out_of_int8(tmp_path: Path, shape: dict[str, Any], isa: str) -> None:
    """The same token over and over: without the mean, nothing is left of what a norm gives. f16 mode is as it was."""
    tokens = [5] * 30
    given = {"no": False, "their": True, "random": True}
    for name, means in given.items():
        write_checkpoint(tmp_path / name, **shape, bits=4, random_norms=True, means=means)
    found: dict[str, np.ndarray] = {}
    plain = plain_logits(tmp_path / "no", tokens, found)
    tensors = read_tensors(tmp_path / "their")
    assert found.keys() == {name.removesuffix(".mean") for name in tensors if name.endswith(".mean")}
    replaced = {f"{name}.mean": mean.astype("<f2") for name, mean in found.items()}
    write_safetensors(tmp_path / "their" / "model.safetensors", tensors | replaced)
    models = {
        (name, mode): _C.Model(str(tmp_path / name), mode=mode, k_bits=16, v_bits=16, context=64, isa=isa)
        for name in given
        for mode in ("a8", "f16")
    }
    results = {which: logits(model, tokens) for which, model in models.items()}
    assert np.array_equal(results["no", "f16"], results["their", "f16"])
    errors = {which: difference(result, plain) for which, result in results.items()}
    assert errors["their", "a8"] < 0.75 * errors["no", "a8"]
    assert errors["random", "a8"] < 6e-2 and errors["their", "f16"] < 3e-3


def test_instruction_sets_agree(tmp_path: Path) -> None:
    """Integer sums are exact: only float steps around them may differ, in their last bits."""
    write_checkpoint(tmp_path / "m", **SHAPE, bits=4, r4_block=8)
    tokens = tokens_of(300, 60)
    every = [logits(_C.Model(str(tmp_path / "m"), context=64, k_bits=16, v_bits=16, isa=isa), tokens) for isa in ISAS]
    for other in every[1:]:
        assert difference(other, every[0]) < 2e-2  # one activation that rounds the other way moves a code by one
        assert (other.argmax(-1) == every[0].argmax(-1)).mean() > 0.9


@pytest.mark.parametrize("mode", ["a8", "f16"])
@pytest.mark.parametrize("isa", ISAS)
def test_rows_do_not_depend_on_their_neighbours(tmp_path: Path, mode: str, isa: str) -> None:
    """Bit for bit: a token alone, in a prompt, and beside other sequences, with every number of rows up to 13."""
    write_checkpoint(
        tmp_path / "m",
        **SHAPE,
        bits=lambda name: 2 + sum(map(ord, name)) % 7,
        r4_block=8,
        rotation="hadamard",
        means=True,
    )
    model = _C.Model(str(tmp_path / "m"), threads=2, mode=mode, context=64, kv_tokens=2048, isa=isa)
    tokens = tokens_of(300, 45)
    whole = logits(model, tokens)
    single = [np.asarray(model.logits([_C.Item([t], i, [8, 9])]))[0] for i, t in enumerate(tokens)]
    assert np.array_equal(np.stack(single), whole)
    for sequences in range(2, 14):
        for s in range(sequences):
            model.logits([_C.Item(tokens[: 20 + s], 0, [2 * s, 2 * s + 1])])
        rows = model.logits([_C.Item([tokens[20 + s]], 20 + s, [2 * s, 2 * s + 1]) for s in range(sequences)])
        assert np.array_equal(rows, whole[20 : 20 + sequences]), sequences


def test_prompts_longer_than_one_pass(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", **{**SHAPE, "layers": 1}, bits=3, max_position_embeddings=2048)
    model = _C.Model(str(tmp_path / "m"), context=2048, kv_tokens=4096)
    tokens = tokens_of(300, 1100)
    whole = logits(model, tokens)
    parts = [
        np.asarray(model.logits([_C.Item(tokens[a:b], a, list(range(64, 128)))]))
        for a, b in ((0, 7), (7, 700), (700, 1100))
    ]
    assert np.array_equal(np.concatenate(parts), whole)
    nll = np.asarray(model.nll([_C.Item(tokens, 0, list(range(64)))]))
    exact = np.log(np.exp(whole.astype(np.float64)).sum(-1))[:-1] - whole[np.arange(1099), tokens[1:]]
    assert nll.shape == (1099,) and np.allclose(nll, exact, atol=1e-4)


def test_step_samples_only_where_asked(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", **SHAPE, bits=4)
    model = _C.Model(str(tmp_path / "m"), context=64, kv_tokens=256)
    tokens = tokens_of(300, 30)
    best = int(logits(model, tokens)[-1].argmax())
    none, sample = model.step([
        _C.Item(tokens, 0, [2, 3]),
        _C.Item(tokens, 0, [4, 5], _C.Sampler(temperature=0.0)),
    ])  # fmt: skip
    assert none is None and sample.token == best
    banned = _C.Sampler(temperature=0.0, banned=list(range(300)))
    good = _C.Sampler(temperature=0.0)
    reason, sample = model.step([_C.Item(tokens, 0, [2, 3], banned), _C.Item(tokens, 0, [4, 5], good)])
    assert isinstance(reason, str) and sample.token == best  # one item's fault is its own


@pytest.mark.parametrize(
    ("item", "sentence"),
    [
        (([], 0, [0]), "no tokens"),
        (([300], 0, [0]), "token 300 is outside the vocabulary of 300"),
        (([-1], 0, [0]), "token -1 is outside"),
        (([1] * 65, 0, [0, 1, 2]), "positions 0 to 65, the context has 64"),
        (([1], -1, [0]), "positions -1 to 0"),
        (([1] * 33, 0, [0]), "pages hold 32"),
        (([1], 0, [2]), "page 2 is outside the pool of 2"),
        (([1], 0, [-1]), "page -1 is outside"),
    ],
)
def test_items_out_of_range(tmp_path: Path, item: tuple[list[int], int, list[int]], sentence: str) -> None:
    write_checkpoint(tmp_path / "m", **SHAPE, bits=4)
    model = _C.Model(str(tmp_path / "m"), context=64, kv_tokens=64)
    with pytest.raises(Error, match=sentence):
        model.step([_C.Item(*item)])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"mode": "int8"}, 'mode is "int8"'),
        ({"isa": "neon"}, 'isa is "neon"'),
        ({"context": 0}, "context is 0"),
        ({"context": 1 << 20}, "this model has positions for"),
        ({"k_bits": 5}, "5"),
        ({"threads": -1}, "threads is -1"),
    ],
)
def test_settings_out_of_range(tmp_path: Path, settings: dict[str, Any], sentence: str) -> None:
    write_checkpoint(tmp_path / "m", **SHAPE, bits=4)
    with pytest.raises(Error, match=sentence):
        _C.Model(str(tmp_path / "m"), **{"context": 64, **settings})


@pytest.mark.parametrize("means", [False, True])
@pytest.mark.parametrize("mode", ["a8", "f16"])
def test_states_that_overflow_have_a_sentence(tmp_path: Path, mode: str, means: bool) -> None:
    folder = write_overflowing(tmp_path / "m", means=means)
    for isa in ISAS:
        model = _C.Model(str(folder), mode=mode, context=64, isa=isa)
        for tokens in ([5], [5] * 20):
            (error,) = model.step([_C.Item(tokens, 0, [0], _C.Sampler(temperature=0.0))])
            assert error == "the model returned logits that are not numbers: its weights or scales are broken", isa


def test_more_threads_than_the_system_gives(tmp_path: Path) -> None:
    """1023 stacks of 8 MiB do not fit into 4 GiB of addresses."""
    write_checkpoint(tmp_path / "m", **SHAPE, bits=4)
    code = """
import sys
from halfturn import _C
try:
    _C.Model(sys.argv[1], context=64, threads=1024)
except Exception as error:
    print(type(error).__name__, error)
"""
    limits = "ulimit -s 8192 && ulimit -v 4194304 && exec "
    command = limits + shlex.join([sys.executable, "-c", code, str(tmp_path / "m")])
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"Error only \d+ of 1024 threads could be started: lower threads\n", done.stdout), done.stdout


def test_a_forked_process_drops_a_model_and_loads_its_own(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", **SHAPE, bits=4)
    code = """
import os, sys
from halfturn import _C
model = _C.Model(sys.argv[1], context=64, threads=3)
child = os.fork()
for _ in range(20):
    model = _C.Model(sys.argv[1], context=64, threads=3)
if child == 0:
    sys.exit(7)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 7, done.stderr


@pytest.mark.parametrize(
    ("scaling", "limit"),
    [
        ({"rope_type": "linear", "factor": 4.0}, 256),
        ({"rope_type": "dynamic", "factor": 2.0}, 128),
        ({"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 32}, 128),  # as in transformers
    ],
)
def test_stretched_positions(tmp_path: Path, scaling: dict[str, Any], limit: int) -> None:
    write_checkpoint(tmp_path / "m", **SHAPE, bits=4, max_position_embeddings=64, rope_scaling=scaling)
    assert _C.Model(str(tmp_path / "m"), context=limit).context == limit
    assert Model.load(tmp_path / "m", context=limit).context == limit
    for load in (
        lambda: _C.Model(str(tmp_path / "m"), context=limit + 1),
        lambda: Model.load(tmp_path / "m", context=limit + 1),
    ):
        with pytest.raises(Error, match=f"context is {limit + 1}"):
            load()


def test_dynamic_rope_is_the_trained_one_by_default(tmp_path: Path) -> None:
    """One theta serves a whole cache, so allowing longer texts turns the short ones otherwise too: only where asked."""
    scaling = {"rope_type": "dynamic", "factor": 4.0}
    write_checkpoint(tmp_path / "plain", **SHAPE, bits=8, max_position_embeddings=64)
    write_checkpoint(tmp_path / "dynamic", **SHAPE, bits=8, max_position_embeddings=64, rope_scaling=scaling)
    plain, dynamic = (Model.load(tmp_path / name) for name in ("plain", "dynamic"))
    assert plain.context == dynamic.context == 64
    tokens = tokens_of(300, 40)
    np.testing.assert_array_equal(logits(plain.native, tokens), logits(dynamic.native, tokens))
    longer = Model.load(tmp_path / "dynamic", context=256)
    assert difference(logits(longer.native, tokens), logits(plain.native, tokens)) > 0.01
