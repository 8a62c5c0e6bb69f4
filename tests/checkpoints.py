"""Writes small valid Halfturn checkpoints with random codes, for the tests of everything that reads one (numpy only).

folder = write_checkpoint(tmp_path / "tiny", hidden=64, intermediate=96, layers=2, heads=4, kv_heads=2, head_dim=16,
                          vocab=300, bits=4)
weights = dense_weights(folder)["model.layers.0.self_attn.q_proj"]      # float32 [out, in]
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

TILE = 16
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
DTYPES: dict[str, np.dtype[Any]] = {
    "U32": np.dtype("<u4"),
    "F16": np.dtype("<f2"),
    "I8": np.dtype("i1"),
    "F32": np.dtype("<f4"),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

TEMPLATE = (
    r"{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    r"{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL_TOKENS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")  # ids 0..3

Tensors = dict[str, np.ndarray]
PerLinear = int | Callable[[str], int]


def padded(size: int) -> int:
    return -(-size // TILE) * TILE


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 codes [out_padded, in_padded] -> uint32 tiles [in_padded/16, out_padded/16, 8*bits]."""
    outs, ins = codes.shape[0] // TILE, codes.shape[1] // TILE
    # output-in-tile = q + 8h, input-in-tile = 2c + b + 8kh, place in the tile = (((q*4 + c)*2 + h)*2 + kh)*2 + b
    axes = codes.reshape(outs, 2, 8, ins, 2, 4, 2)  # out tile, h, q, in tile, kh, c, b
    values = axes.transpose(3, 0, 2, 5, 1, 4, 6).reshape(ins, outs, 256).astype(np.uint8)
    planes = []
    shift = 0
    for plane in PLANES[bits]:
        part = (values >> shift) & ((1 << plane) - 1)
        fields = part.reshape(ins, outs, 32 * plane, 8 // plane).astype(np.uint32)
        planes.append((fields << (np.arange(8 // plane) * plane).astype(np.uint32)).sum(-1).astype(np.uint8))
        shift += plane
    return np.ascontiguousarray(np.concatenate(planes, -1)).view("<u4")


def unpack_codes(tiles: np.ndarray, bits: int) -> np.ndarray:
    """uint32 tiles [in_padded/16, out_padded/16, 8*bits] -> uint8 codes [out_padded, in_padded]."""
    ins, outs = tiles.shape[:2]
    stream = np.ascontiguousarray(tiles.astype("<u4")).view(np.uint8)
    values = np.zeros((ins, outs, 256), np.uint8)
    start = shift = 0
    for plane in PLANES[bits]:
        part = stream[..., start : start + 32 * plane, None] >> (np.arange(8 // plane) * plane).astype(np.uint8)
        values |= (part & ((1 << plane) - 1)).reshape(ins, outs, 256) << shift
        start += 32 * plane
        shift += plane
    axes = values.reshape(ins, outs, 8, 4, 2, 2, 2)  # in tile, out tile, q, c, h, kh, b
    return np.ascontiguousarray(axes.transpose(1, 4, 2, 0, 5, 3, 6)).reshape(outs * TILE, ins * TILE)


def dequantize(codes: np.ndarray, scales: np.ndarray, levels: np.ndarray, bits: int) -> np.ndarray:
    """The weights of one linear as float32 [out_padded, in_padded]."""
    values = levels.astype(np.float32)[unpack_codes(codes, bits)]
    return values * np.repeat(scales.astype(np.float32).T, values.shape[1] // scales.shape[0], axis=1)


def make_levels(bits: int, rng: np.random.Generator) -> np.ndarray:
    """2^bits increasing levels that are neither evenly spaced nor symmetric (8 bits: -127..127, 127 twice)."""
    count = 1 << bits
    if bits == 8:
        return np.minimum(np.arange(count) - 127, 127).astype(np.int8)
    step = 254 / (count - 1)
    jitter = rng.uniform(-0.4, 0.4, count) * max(step - 2, 0)
    return np.clip(np.round(np.linspace(-127, 127, count) + jitter), -127, 127).astype(np.int8)


def make_linear(
    name: str, ins: int, outs: int, bits: int, groups: int, rng: np.random.Generator, *, std: float, bias: bool = False
) -> Tensors:
    """Random codes whose weights have a standard deviation near `std` (outputs and groups differ by up to 2x)."""
    in_padded, out_padded = padded(ins), padded(outs)
    levels = make_levels(bits, rng)
    tiles = rng.integers(0, 1 << 32, (in_padded // TILE, out_padded // TILE, 8 * bits), dtype=np.uint32)
    scales = rng.uniform(0.7, 1.4, (groups, out_padded)) * std / levels.astype(np.float64).std()
    scales[:, outs:] = 0
    tensors: Tensors = {
        f"{name}.codes": tiles.astype("<u4"),  # random words are random codes
        f"{name}.scales": scales.astype("<f2"),
        f"{name}.levels": levels,
    }
    if bias:
        tensors[f"{name}.bias"] = (rng.standard_normal(outs) * 0.2).astype("<f4")
    return tensors


def linear_shapes(config: Mapping[str, Any]) -> Iterator[tuple[str, int, int, bool]]:
    """Name, inputs, outputs and whether there is a bias, of every linear, in the model's order."""
    hidden, middle = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    attention, mlp = config["attention_bias"], config["mlp_bias"]
    yield "model.embed_tokens", hidden, config["vocab_size"], False
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        yield prefix + "self_attn.q_proj", hidden, queries, attention
        yield prefix + "self_attn.k_proj", hidden, keys, attention
        yield prefix + "self_attn.v_proj", hidden, keys, attention
        yield prefix + "self_attn.o_proj", queries, hidden, attention
        yield prefix + "mlp.gate_proj", hidden, middle, mlp
        yield prefix + "mlp.up_proj", hidden, middle, mlp
        yield prefix + "mlp.down_proj", middle, hidden, mlp
    yield "lm_head", hidden, config["vocab_size"], False


def write_checkpoint(
    folder: str | Path,
    *,
    hidden: int = 64,
    intermediate: int = 96,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    vocab: int = 300,
    bits: PerLinear = 4,
    groups: PerLinear = 1,
    r4_block: int = 1,
    biases: bool = False,
    rope_scaling: Mapping[str, Any] | None = None,
    rope_theta: float = 10000.0,
    rotation: str = "none",
    shards: int = 1,
    seed: int = 0,
    max_position_embeddings: int = 512,
    rms_norm_eps: float = 1e-5,
    random_norms: bool = False,
    means: bool = False,
    tokenizer: bool = False,
    config_changes: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a checkpoint and returns its folder.

    bits and groups are numbers or functions of the linear's name; a number of groups that a linear's input can't be
    divided into is lowered to one that it can. random_norms writes norms around 1 instead of ones; means gives them
    random means, which change no product of floats. config_changes is merged into config.json last, right or wrong.
    """
    rng = np.random.default_rng(seed)
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "max_position_embeddings": max_position_embeddings,
        "rms_norm_eps": rms_norm_eps,
        "rope_theta": rope_theta,
        "rope_scaling": dict(rope_scaling) if rope_scaling else None,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": biases,
        "mlp_bias": biases,
        "bos_token_id": 0,
        "eos_token_id": [1, 3] if tokenizer else 1,
        "torch_dtype": "float16",
    }
    linears: dict[str, Any] = {}
    tensors: Tensors = {}
    for name, ins, outs, bias in linear_shapes(config):
        width = bits(name) if callable(bits) else bits
        wanted = groups(name) if callable(groups) else groups
        std = 1.0 if name == "model.embed_tokens" else (2.0 if name == "lm_head" else 1.0) / math.sqrt(ins)
        tensors |= make_linear(name, ins, outs, width, math.gcd(wanted, padded(ins) // TILE), rng, std=std, bias=bias)
        linears[name] = {"segments": [{"codec": "grid", "bits": width, "rows": padded(ins)}]}
        if name.endswith("down_proj") and r4_block > 1:
            linears[name]["r4_block"] = r4_block
    norms = [f"model.layers.{n}.{which}_layernorm" for n in range(layers) for which in ("input", "post_attention")]
    for name in [*norms, "model.norm"]:
        weight = rng.uniform(0.5, 1.5, hidden) if random_norms else np.ones(hidden)
        tensors[f"{name}.weight"] = weight.astype("<f2")
    if means:
        others = np.random.default_rng(seed + 1)  # the rest stays as it is without them
        tensors |= {f"{name}.mean": others.normal(0, 0.5, hidden).astype("<f2") for name in [*norms, "model.norm"]}
    config["quantization_config"] = {
        "quant_method": "halfturn",
        "format": 1,
        "rotation": rotation,
        **({"means": True} if means else {}),
        "linears": linears,
        "measured": {},
    }
    config |= dict(config_changes or {})

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    write_shards(folder, tensors, shards)
    if tokenizer:
        write_tokenizer(folder, vocab)
    return folder


def write_overflowing(folder: Path, **shape: Any) -> Path:
    """A checkpoint of valid numbers whose hidden states get an infinite element, which every norm makes NaN."""
    write_checkpoint(folder, **shape, layers=1, biases=True)
    tensors = read_tensors(folder)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        bias = tensors[f"model.layers.0.{name}.bias"] = tensors[f"model.layers.0.{name}.bias"].copy()
        bias[3] = 3e38
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Widest elements first, as the library safetensors does: so every tensor is aligned to its own element."""
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].itemsize))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, value in tensors.items():
        header[name] = {
            "dtype": NAMES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [position, position + value.nbytes],
        }
        position += value.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for value in tensors.values():
            file.write(np.ascontiguousarray(value).tobytes())


def write_shards(folder: Path, tensors: Tensors, shards: int = 1) -> None:
    """model.safetensors, or `shards` numbered files and their index."""
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        part = names[len(names) * shard // shards : len(names) * (shard + 1) // shards]
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        write_safetensors(folder / file, {name: tensors[name] for name in part})
        weight_map |= {name: file for name in part}
    total = sum(value.nbytes for value in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def read_tensors(folder: str | Path) -> Tensors:
    """Every tensor of the folder's safetensors files."""
    tensors: Tensors = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__":
                start, stop = entry["data_offsets"]
                view = np.frombuffer(data[8 + length + start : 8 + length + stop], DTYPES[entry["dtype"]])
                tensors[name] = view.reshape(entry["shape"])
    return tensors


def dense_weights(folder: str | Path) -> Tensors:
    """Every linear by name as float32 [out, in], without padding (as stored: with R4 still multiplied in)."""
    config = json.loads((Path(folder) / "config.json").read_text())
    tensors = read_tensors(folder)
    linears = config["quantization_config"]["linears"]
    dense: Tensors = {}
    for name, ins, outs, _ in linear_shapes(config):
        bits = linears[name]["segments"][0]["bits"]
        codes, scales, levels = (tensors[f"{name}.{part}"] for part in ("codes", "scales", "levels"))
        dense[name] = dequantize(codes, scales, levels, bits)[:outs, :ins]
    return dense


def write_tokenizer(folder: Path, vocab: int) -> None:
    """A byte-level BPE tokenizer of exactly `vocab` tokens (at least 260) with a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab < len(SPECIAL_TOKENS) + len(alphabet):
        raise ValueError(f"a byte-level tokenizer needs {len(SPECIAL_TOKENS) + len(alphabet)} tokens, vocab is {vocab}")
    tokens = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    merges: list[tuple[str, str]] = []
    words = "Ġ t|Ġ a|h e|i n|Ġt he|e r|o n|r e|Ġ s|a t|Ġ o|n d|Ġa nd|e s|Ġ in"
    for pair in words.split("|"):
        left, right = pair.split()
        if len(tokens) < vocab:
            tokens[left + right] = len(tokens)
            merges.append((left, right))
    letters = alphabet[:]
    while len(tokens) < vocab:  # pairs of rare bytes: valid tokens that ordinary text never meets
        left, right = letters[-1 - len(tokens) % 64], letters[-1 - len(tokens) // 64 % 128]
        text = left + right if left + right not in tokens else f"<unused{len(tokens)}>"
        if text == left + right:
            merges.append((left, right))
        tokens[text] = len(tokens)
    built = Tokenizer(models.BPE(vocab=tokens, merges=merges))
    built.add_special_tokens(list(SPECIAL_TOKENS))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "<|im_end|>",
        "add_bos_token": False,
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    generation = {"bos_token_id": 0, "eos_token_id": [1, 3]}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2))
