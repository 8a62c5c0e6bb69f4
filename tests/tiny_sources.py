"""Tiny random models as Hugging Face folders and GGUF files, for the tests of what reads them.

Importing this skips a test file where the converter's libraries are not installed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halfturn.converter.architectures import ModelConfig, canonical_config, find_family
from halfturn.converter.checkpoint import Source

torch = pytest.importorskip("torch", reason="the converter needs the extra [convert]")
gguf = pytest.importorskip("gguf", reason="the converter needs the extra [convert]")

ROOT = Path(__file__).resolve().parent.parent
SMOLLM2 = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
needs_model = pytest.mark.skipif(not SMOLLM2.is_file(), reason="SmolLM2 is not here: scripts/get_model.py gets it")

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
TINY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 50,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def config_of(changes: Mapping[str, Any] | None = None, drop: tuple[str, ...] = ()) -> ModelConfig:
    keys = {k: v for k, v in {**TINY, **(changes or {})}.items() if k not in drop}
    return canonical_config(keys, find_family(keys))


def hf_tensors(config: ModelConfig, dtype: Any = torch.float32, seed: int = 0) -> dict[str, Any]:
    """Random tensors under Hugging Face's names, spelled out here on purpose and not by the code under test."""
    random = torch.Generator().manual_seed(seed)
    d, f, dh = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_attention_heads * dh, config.num_key_value_heads * dh
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, d),
        "model.norm.weight": (d,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, d)
    for i in range(config.num_hidden_layers):
        p = f"model.layers.{i}."
        linears = {"self_attn.q_proj": (q, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d)}
        linears |= {"self_attn.o_proj": (d, q), "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f)}
        for name, shape in linears.items():
            shapes[f"{p}{name}.weight"] = shape
            if config.attention_bias if "attn" in name else config.mlp_bias:
                shapes[f"{p}{name}.bias"] = shape[:1]
        shapes |= {f"{p}input_layernorm.weight": (d,), f"{p}post_attention_layernorm.weight": (d,)}
    return {name: torch.randn(shape, generator=random).to(dtype) for name, shape in shapes.items()}


def write_folder(
    folder: Path, changes: Mapping[str, Any] | None = None, dtype: Any = torch.float32, shards: int = 1
) -> dict[str, Any]:
    """A Hugging Face folder of a tiny random model; returns its tensors."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = hf_tensors(config_of(changes), dtype)
    (folder / "config.json").write_text(json.dumps({**TINY, **(changes or {})}))
    (folder / "tokenizer.json").write_text("{}")
    names = list(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return tensors
    parts = {f"model-{k + 1:05d}-of-{shards:05d}.safetensors": names[k::shards] for k in range(shards)}
    for file, part in parts.items():
        save_file({n: tensors[n] for n in part}, folder / file)
    index = {"weight_map": {n: file for file, part in parts.items() for n in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


def check_tensors(source: Source, tensors: Mapping[str, Any]) -> None:
    """Every tensor of the source is the given one in float32."""
    seen = {"model.embed_tokens.weight": source.embedding(), "model.norm.weight": source.final_norm()}
    if "lm_head.weight" in tensors:
        seen["lm_head.weight"] = source.head()
    for i in range(source.config.num_hidden_layers):
        seen |= {f"model.layers.{i}.{short}": tensor for short, tensor in source.layer(i).items()}
    assert seen.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert seen[name].dtype == torch.float32 and torch.equal(seen[name], tensor.float()), name


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def interleave(tensor: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of Q and K as llama.cpp stores them: row 2i of a head is i of the first half, 2i+1 of the second."""
    stored = np.empty_like(tensor)
    for head in range(0, len(tensor), head_dim):
        for i in range(head_dim // 2):
            stored[head + 2 * i] = tensor[head + i]
            stored[head + 2 * i + 1] = tensor[head + head_dim // 2 + i]
    return stored


def write_gguf(
    path: Path,
    config: ModelConfig,
    kinds: Mapping[str, str] | None = None,
    factors: np.ndarray | None = None,
    settings: Callable[[Any], None] = lambda writer: None,
    drop: str = "",
) -> dict[str, Any]:
    """A GGUF file of a random model; returns its tensors as Hugging Face would have them. kinds: GGUF part -> type."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    settings(writer)
    expected: dict[str, Any] = {}
    for name, tensor in hf_tensors(config).items():
        short = re.sub(r"model\.layers\.\d+\.", "", name).rpartition(".")[0]
        part, suffix = GGUF_NAMES[short], name.rpartition(".")[2]
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        stored_name = (f"blk.{layer.group(1)}." if layer else "") + f"{part}.{suffix}"
        stored = tensor.numpy()
        if part in ("attn_q", "attn_k"):
            stored = interleave(stored, config.head_dim)
        kind = (kinds or {}).get(part, "F32")
        if kind == "F32" or stored.ndim == 1:
            value = stored
            writer_tensor: tuple[Any, ...] = (stored, None)
        else:
            type_ = gguf.GGMLQuantizationType[kind]
            data = gguf.quants.quantize(stored, type_)
            value = gguf.quants.dequantize(data, type_)
            writer_tensor = (data, type_)
        if stored_name == drop:
            continue
        writer.add_tensor(stored_name, writer_tensor[0], raw_dtype=writer_tensor[1])
        head = config.head_dim
        expected[name] = undo_slowly(value, head) if part in ("attn_q", "attn_k") else torch.from_numpy(value)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def undo_slowly(stored: np.ndarray, head_dim: int) -> Any:
    rows = [
        head + (2 * i if half == 0 else 2 * i + 1)
        for head in range(0, len(stored), head_dim)
        for half in (0, 1)
        for i in range(head_dim // 2)
    ]
    return torch.from_numpy(stored[rows])


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
