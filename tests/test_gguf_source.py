"""GGUF files as sources: weights, row order, rotary settings, and what is refused with which words."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halfturn.converter.checkpoint import open_source
from halfturn.converter.gguf_source import Entry, llama3_factors, read_tensor, undo_interleave
from halfturn.error import Error
from shared_data import SHARED, needs_shared
from tiny_sources import LLAMA3, check_tensors, config_of, gguf, hf_tensors, torch, write_gguf


def test_row_order_known_answer() -> None:
    """One head of 6 rows, stored 0 3 1 4 2 5."""
    stored = torch.tensor([0.0, 3.0, 1.0, 4.0, 2.0, 5.0])
    assert undo_interleave(stored, 6).tolist() == [0, 1, 2, 3, 4, 5]
    both = torch.cat([stored, stored + 6])[:, None].expand(12, 3)
    assert undo_interleave(both, 6)[:, 1].tolist() == list(range(12))


def test_gguf_equals_the_folder_it_came_from(tmp_path: Path) -> None:
    """All of float32: the very tensors, with biases on Q and K in the right order, and a head of its own."""
    config = config_of({"attention_bias": True, "mlp_bias": True, "bos_token_id": None, "eos_token_id": None})
    config = dataclasses.replace(config, bos_token_id=None, eos_token_id=None)
    expected = write_gguf(tmp_path / "a.gguf", config)
    source = open_source(tmp_path / "a.gguf")
    assert source.config == config
    check_tensors(source, expected)
    for name, tensor in hf_tensors(config).items():
        assert torch.equal(expected[name], tensor), name


def test_gguf_quantized_types_and_tied_head(tmp_path: Path) -> None:
    config = dataclasses.replace(
        config_of({"hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": True}),
        bos_token_id=None,
        eos_token_id=None,
    )
    kinds = {
        "token_embd": "Q8_0",
        "attn_q": "Q4_1",
        "attn_k": "Q5_0",
        "attn_v": "F16",
        "ffn_up": "BF16",
        "ffn_down": "Q4_0",
    }
    expected = write_gguf(tmp_path / "a.gguf", config, kinds)
    source = open_source(tmp_path / "a.gguf")
    assert source.config == config
    check_tensors(source, expected)
    assert torch.equal(source.head(), source.embedding())


def test_a_missing_bias_beside_others_is_zero(tmp_path: Path) -> None:
    config = config_of({"attention_bias": True})
    write_gguf(tmp_path / "a.gguf", config, drop="blk.1.attn_output.bias")
    bias = open_source(tmp_path / "a.gguf").layer(1)["self_attn.o_proj.bias"]
    assert bias.tolist() == [0.0] * config.hidden_size


@needs_shared
@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "Q6_K"])
def test_dequantized_blocks_known_answer(tmp_path: Path, kind: str) -> None:
    """Recorded blocks somewhere in a file give the recorded values."""
    vectors = np.load(SHARED / "gguf_dequant_vectors.npz")
    raw, values = vectors[f"{kind}_raw"], vectors[f"{kind}_f32"]
    path = tmp_path / "blocks"
    path.write_bytes(b"before" + raw.tobytes() + b"behind")
    entry = Entry("blocks", gguf.GGMLQuantizationType[kind], values.shape, 6, raw.nbytes)
    assert np.array_equal(read_tensor(path, entry), values)
    path.write_bytes(b"before" + raw.tobytes()[:-10])
    with pytest.raises(Error, match=f"blocks in .* has {raw.nbytes - 10} of its {raw.nbytes} bytes"):
        read_tensor(path, entry)


@pytest.mark.parametrize(("factor", "head_dim"), [(8.0, 128), (32.0, 64)])
def test_llama3_factors_become_parameters(tmp_path: Path, factor: float, head_dim: int) -> None:
    config = config_of({"head_dim": head_dim, "rope_theta": 500000.0, "rope_scaling": {**LLAMA3, "factor": factor}})
    config = dataclasses.replace(config, bos_token_id=None, eos_token_id=None)
    factors = llama3_factors(factor, 500000.0, head_dim)
    assert factors[0] == 1.0 and factors[-1] == pytest.approx(factor)
    write_gguf(tmp_path / "a.gguf", config, factors=factors)
    assert open_source(tmp_path / "a.gguf").config == config


def test_llama3_factors_known_answer() -> None:
    """Llama 3.1's own code, case by case over wavelengths."""
    head_dim, theta, factor = 128, 500000.0, 8.0
    expected = []
    for i in range(0, head_dim, 2):
        frequency = theta ** (-i / head_dim)
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            expected.append(1.0)
        elif wavelength > 8192 / 1:
            expected.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected.append(frequency / ((1 - smooth) * frequency / factor + smooth * frequency))
    assert llama3_factors(factor, theta, head_dim) == pytest.approx(expected, rel=1e-12)


def test_gguf_rope_settings(tmp_path: Path) -> None:
    config = config_of()

    def linear(writer: Any) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    write_gguf(tmp_path / "linear.gguf", config, settings=linear)
    assert open_source(tmp_path / "linear.gguf").config.rope_scaling == {"rope_type": "linear", "factor": 4.0}
    write_gguf(tmp_path / "ones.gguf", config, factors=np.ones(4))
    assert open_source(tmp_path / "ones.gguf").config.rope_scaling is None
    write_gguf(tmp_path / "odd.gguf", config, factors=np.array([1.0, 2.0, 3.0, 8.0]))
    with pytest.raises(Error, match=r"rope_freqs.weight that don't follow from llama3 scaling"):
        open_source(tmp_path / "odd.gguf")

    def untyped(writer: Any) -> None:
        writer.add_rope_scaling_factor(4.0)

    def never(writer: Any) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
        writer.add_float32("llama.rope.scale_linear", 4.0)

    def old(writer: Any) -> None:
        writer.add_float32("llama.rope.scale_linear", 4.0)

    def zero(writer: Any) -> None:
        writer.add_rope_scaling_factor(0.0)

    expected = {"rope_type": "linear", "factor": 4.0}
    cases = (("a", untyped, expected), ("b", never, None), ("c", old, expected), ("zero", zero, None))
    for name, settings, scaling in cases:
        write_gguf(tmp_path / f"{name}.gguf", config, settings=settings)
        assert open_source(tmp_path / f"{name}.gguf").config.rope_scaling == scaling

    write_gguf(tmp_path / "d.gguf", config, settings=lambda w: w.add_float32("llama.rope.scaling.attn_factor", 1.2))
    with pytest.raises(Error, match=r"attn_factor = 1.2; only 1 is supported"):
        open_source(tmp_path / "d.gguf")

    def yarn(writer: Any) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)

    write_gguf(tmp_path / "yarn.gguf", config, settings=yarn)
    with pytest.raises(Error, match="rope scaling 'yarn' is not supported"):
        open_source(tmp_path / "yarn.gguf")


def change(writer: Any, key: str, value: int | str) -> None:
    """What write_gguf said of the key before, said otherwise."""
    del writer.kv_data[0][key]
    (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (lambda w: w.add_expert_count(8), "mixture of 8 experts"),
        (lambda w: w.add_sliding_window(64), "sliding window of 64 tokens .context 128."),
        (lambda w: w.add_causal_attention(False), "attention.causal false; only models that see no later tokens"),
        (lambda w: w.add_tensor("blk.0.attn_q_norm.weight", np.ones(8, np.float32)), "blk.0.attn_q_norm.weight .* not"),
        (
            lambda w: w.add_tensor("blk.7.attn_norm.weight", np.ones(24, np.float32)),
            "blk.7.attn_norm.weight .* no place",
        ),
        (lambda w: w.add_uint16("split.count", 3), "one of 3 parts"),
        (lambda w: w.add_string("split.count", "3"), "a.gguf has split.count = '3'; it must be a whole number"),
        (lambda w: w.add_string("llama.attention.sliding_window", "x"), "llama.attention.sliding_window = 'x'"),
        (lambda w: w.add_string("tokenizer.ggml.bos_token_id", "x"), "tokenizer.ggml.bos_token_id is 'x'"),
        (lambda w: w.add_uint32("tokenizer.ggml.tokens", 5), "tokenizer.ggml.tokens or .* is no list"),
        (lambda w: change(w, "llama.attention.head_count", 0), "a.gguf: it has llama.attention.head_count = 0"),
        (lambda w: change(w, "llama.embedding_length", "x"), "llama.embedding_length = 'x'; it must be a whole number"),
        (lambda w: change(w, "llama.rope.freq_base", "x"), "llama.rope.freq_base = 'x'; it must be a number"),
        (
            lambda w: change(w, "llama.attention.layer_norm_rms_epsilon", "x"),
            "llama.attention.layer_norm_rms_epsilon = 'x'; it must be a number",
        ),
    ],
)
def test_refused_gguf(tmp_path: Path, settings: Callable[[Any], None], message: str) -> None:
    write_gguf(tmp_path / "a.gguf", config_of(), settings=settings)
    with pytest.raises(Error, match=message):
        open_source(tmp_path / "a.gguf")


def test_damaged_gguf(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    write_gguf(path, config_of())
    data = path.read_bytes()
    for keep in (10, 200, 900, len(data) - 3000):
        path.write_bytes(data[:keep])
        with pytest.raises(Error, match="damaged or not a GGUF file"):
            open_source(path)
    write_gguf(path, config_of(), drop="output_norm.weight")
    with pytest.raises(Error, match=r"lacks model.norm.weight"):
        open_source(path)
    gguf_writer = gguf.GGUFWriter(path, "qwen2")
    gguf_writer.write_header_to_file()
    gguf_writer.write_kv_data_to_file()
    gguf_writer.write_tensors_to_file()
    gguf_writer.close()
    with pytest.raises(Error, match="holds a 'qwen2' model"):
        open_source(path)
