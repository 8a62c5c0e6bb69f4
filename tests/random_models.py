"""Random models of a sensible scale as Hugging Face folders, and their whole forward pass, for the converter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halfturn.converter.checkpoint import Source, open_source
from tiny_sources import TINY, config_of, hf_tensors, torch

AWKWARD: dict[str, Any] = {  # biases, GQA, head_dim 80, and neither hidden nor intermediate a power of two
    "hidden_size": 144,
    "intermediate_size": 272,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 80,
    "attention_bias": True,
    "mlp_bias": True,
    "vocab_size": 80,
    "max_position_embeddings": 64,  # also the length of sampled sequences
}


def write_model(folder: Path, changes: Mapping[str, Any] | None = None, seed: int = 0) -> Path:
    """Linears keep the size of their input, norms are near 1, biases small; a tokenizer of single characters."""
    from safetensors.torch import save_file

    config = config_of(changes)
    tensors = hf_tensors(config, seed=seed)
    for name, tensor in tensors.items():
        if "norm" in name:
            tensors[name] = 1 + 0.3 * tensor
        elif name.endswith(".bias"):
            tensors[name] = 0.3 * tensor
        elif "embed" not in name:
            tensors[name] = tensor * tensor.shape[1] ** -0.5
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**TINY, **(changes or {})}))
    vocabulary = {chr(32 + i): i for i in range(config.vocab_size)}
    model = {"type": "BPE", "vocab": vocabulary, "merges": [], "unk_token": " "}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    return folder


def logits_of(source: Source, tokens: Any, rotation: Any = None, dtype: Any = torch.float32) -> Any:
    """Logits [sequences, length, vocab] of a source, rotated or as it is, every tensor cast to dtype first."""
    from halfturn.converter.llama import final_states, logits

    config = source.config
    layers: Any = ({k: v.to(dtype) for k, v in source.layer(i).items()} for i in range(config.num_hidden_layers))
    embedding, norm, head = source.embedding().to(dtype), source.final_norm().to(dtype), source.head().to(dtype)
    block = 1
    if rotation is not None:
        layers = (rotation.layer(i, tensors) for i, tensors in enumerate(layers))
        embedding, head, norm = rotation.embedding(embedding), rotation.head(head, norm), torch.ones_like(norm)
        block = rotation.r4_block
    with torch.inference_mode():
        return logits(config, final_states(config, embedding, layers, tokens, block), norm, head)


def random_tokens(source: Source, sequences: int = 2, length: int = 24) -> Any:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(source.config.vocab_size, (sequences, length), generator=generator)


def open_model(folder: Path, changes: Mapping[str, Any] | None = None, seed: int = 0) -> Source:
    return open_source(write_model(folder, changes, seed))
