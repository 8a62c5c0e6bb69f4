"""`halfturn info`: what a checkpoint holds and what it takes."""

from __future__ import annotations

import os
from typing import Any

from halfturn.error import Error

SHAPE = {
    "num_hidden_layers": "layers",
    "hidden_size": "hidden",
    "intermediate_size": "intermediate",
    "num_attention_heads": "heads",
    "num_key_value_heads": "KV heads",
    "head_dim": "head size",
    "vocab_size": "vocabulary",
    "max_position_embeddings": "trained context",
}
# Parts of memory() that depend on the context and the batch, not on the weights.
GROWING = ("kv_cache", "workspace")
BIAS_BYTES = 4  # of one, in float32
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def describe(path: str) -> dict[str, Any]:
    """The facts of a checkpoint folder, after every check that loading makes.

    `weights` are the source's, as the model card counts them: a tied table once, which the checkpoint has twice. Bits
    per weight three ways: `decoder_bpw`, the decoder's linears with all their overhead; `file_bpw`, all tensors over
    `weights`; `memory_bpw`, what the engine keeps of them over `weights`. `memory` holds bytes, with the KV cache of
    one context (the default one, at 8 bits), on the CPU: the same on every machine, and no card needs to be free.
    """
    from halfturn import _C
    from halfturn.model import DEFAULT_CONTEXT, Model

    try:
        found = _C.inspect(os.fsencode(path))
    except UnicodeDecodeError as error:  # the sentence names the path, and that is not UTF-8
        raise Error(error.object.decode(errors="replace")) from None
    config = found["config"]
    context = min(config["max_position_embeddings"], DEFAULT_CONTEXT)
    memory = Model.load(path, "cpu", context, kv_tokens=context, threads=1).native.memory()
    linears = found["linears"]
    decoder = [linear for linear in linears if linear["name"].startswith("model.layers.")]
    norms = config["hidden_size"] * (2 * config["num_hidden_layers"] + 1)
    weights = sum(linear["weights"] + linear["bias_bytes"] // BIAS_BYTES for linear in linears) + norms
    if config["quantization_config"].get("source_tied") is True:
        weights -= config["vocab_size"] * config["hidden_size"]
    measured = config["quantization_config"].get("measured")
    kept = sum(size for name, size in memory.items() if name not in GROWING)
    return {
        "path": path,
        "model_type": config["model_type"],
        **{key: config[key] for key in SHAPE},
        "rotation": config["quantization_config"].get("rotation", "none"),
        "weights": weights,
        "decoder_bpw": 8 * _stored(decoder) / sum(linear["weights"] for linear in decoder),
        "embed_bpw": found["embed"]["bpw"],
        "head_bpw": found["head"]["bpw"],
        "file_bpw": 8 * (_stored(linears) + found["norm_bytes"]) / weights,
        "memory_bpw": 8 * kept / weights,
        "file_bytes": found["total"]["bytes"],
        "memory": memory,
        "memory_context": context,
        "linears": linears,
        "measured": measured if isinstance(measured, dict) else {},
    }


def _stored(linears: list[dict[str, Any]]) -> int:
    """Bytes of matrices with all their overhead."""
    return sum(linear["bytes"] + linear["bias_bytes"] for linear in linears)


def show(facts: dict[str, Any]) -> None:
    """Prints describe() as tables on stdout."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from halfturn.console import megabytes, visible

    console = Console(markup=False, emoji=False, highlight=False)  # names and texts of others are shown as they are
    shape = ", ".join(f"{label} {facts[key]}" for key, label in SHAPE.items())
    described = f"{facts['model_type']}, {facts['weights'] / 1e6:.1f} M weights"
    console.print(Text.assemble((visible(facts["path"]), "bold"), f"  {described}"))
    console.print(f"{shape}; rotation {facts['rotation']}")

    bits = {linear["name"]: linear["bits"] for linear in facts["linears"]}
    table = Table("layer", *[name.removesuffix("_proj") for name in PROJECTIONS], title="bits of each matrix")
    for layer in range(facts["num_hidden_layers"]):
        own = {name.split(".")[-1]: width for name, width in bits.items() if name.startswith(f"model.layers.{layer}.")}
        table.add_row(str(layer), *[str(own[name]) for name in PROJECTIONS])
    console.print(table)
    console.print(f"embedding {bits['model.embed_tokens']} bits, head {bits['lm_head']} bits")

    sizes = Table("", "bits per weight", "bytes")
    sizes.add_row("decoder linears with overhead", f"{facts['decoder_bpw']:.3f}", "")
    sizes.add_row("whole file", f"{facts['file_bpw']:.3f}", megabytes(facts["file_bytes"]))
    sizes.add_row(
        "weights in memory", f"{facts['memory_bpw']:.3f}", megabytes(facts["memory_bpw"] * facts["weights"] / 8)
    )
    console.print(sizes)
    rest = ", ".join(f"{k.replace('_', ' ')} {megabytes(v)}" for k, v in facts["memory"].items() if k in GROWING)
    console.print(f"also in memory for a context of {facts['memory_context']} tokens: {rest}")
    if facts["measured"]:
        console.print("measured by the converter:")
        for key, value in facts["measured"].items():
            text = f"{key.replace('_', ' ')}: {value:.4g}" if isinstance(value, float) else f"{key}: {value}"
            console.print(f"  {visible(text)}")
