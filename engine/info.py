"""`halfturn info`: what a checkpoint holds and what it takes."""

from __future__ import annotations

from typing import Any

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
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def describe(path: str) -> dict[str, Any]:
    """The facts of a checkpoint folder, after every check that loading makes.

    Bits per weight three ways: `decoder_bpw`, the decoder's linears with all their overhead; `file_bpw`, all weight
    files over the weights of all matrices; `memory_bpw`, the weights as the engine keeps them. `memory` holds bytes,
    with the KV cache of one context (the default one, at 8 bits).
    """
    from halfturn import _C
    from halfturn.model import DEFAULT_CONTEXT, Model

    found = _C.inspect(path)
    config = found["config"]
    context = min(config["max_position_embeddings"], DEFAULT_CONTEXT)
    memory = Model.load(path, context=context, kv_tokens=context, threads=1).native.memory()
    weights = found["total"]["weights"]
    kept = sum(size for name, size in memory.items() if name not in GROWING)
    return {
        "path": path,
        "model_type": config["model_type"],
        **{key: config[key] for key in SHAPE},
        "rotation": config["quantization_config"].get("rotation", "none"),
        "weights": weights,
        "decoder_bpw": found["decoder"]["bpw"],
        "embed_bpw": found["embed"]["bpw"],
        "head_bpw": found["head"]["bpw"],
        "file_bpw": found["total"]["bpw"],
        "memory_bpw": 8 * kept / weights,
        "file_bytes": found["total"]["bytes"],
        "memory": memory,
        "memory_context": context,
        "linears": found["linears"],
        "measured": config["quantization_config"].get("measured", {}),
    }


def show(facts: dict[str, Any]) -> None:
    """Prints describe() as tables on stdout."""
    from rich.console import Console
    from rich.table import Table

    from halfturn.console import megabytes

    console = Console()
    shape = ", ".join(f"{label} {facts[key]}" for key, label in SHAPE.items())
    console.print(
        f"[bold]{facts['path']}[/]  {facts['model_type']}, {facts['weights'] / 1e6:.1f} M weights", highlight=False
    )
    console.print(f"{shape}; rotation {facts['rotation']}", highlight=False)

    bits = {linear["name"]: linear["bits"] for linear in facts["linears"]}
    table = Table("layer", *[name.removesuffix("_proj") for name in PROJECTIONS], title="bits of each matrix")
    for layer in range(facts["num_hidden_layers"]):
        own = {name.split(".")[-1]: width for name, width in bits.items() if name.startswith(f"model.layers.{layer}.")}
        table.add_row(str(layer), *[str(own[name]) for name in PROJECTIONS])
    console.print(table)
    console.print(f"embedding {bits['model.embed_tokens']} bits, head {bits['lm_head']} bits", highlight=False)

    sizes = Table("", "bits per weight", "bytes")
    sizes.add_row("decoder linears with overhead", f"{facts['decoder_bpw']:.3f}", "")
    sizes.add_row("whole file", f"{facts['file_bpw']:.3f}", megabytes(facts["file_bytes"]))
    sizes.add_row(
        "weights in memory", f"{facts['memory_bpw']:.3f}", megabytes(facts["memory_bpw"] * facts["weights"] / 8)
    )
    console.print(sizes)
    rest = ", ".join(f"{k.replace('_', ' ')} {megabytes(v)}" for k, v in facts["memory"].items() if k in GROWING)
    console.print(f"also in memory for a context of {facts['memory_context']} tokens: {rest}", highlight=False)
    if facts["measured"]:
        console.print("measured by the converter:", highlight=False)
        for key, value in facts["measured"].items():
            console.print(
                f"  {key.replace('_', ' ')}: {value:.4g}" if isinstance(value, float) else f"  {key}: {value}"
            )
