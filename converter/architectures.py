"""One table: model family -> the canonical (Llama) configuration and tensor names.

Every quirk of a family is folded here or refused by name here; neither the rest of the converter nor the runtime asks
which family a model came from. Two kinds of rows: Hugging Face architectures and GGUF architectures.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from halfturn.checks import is_number, is_whole
from halfturn.error import Error, quoted

EMBEDDING_WEIGHT = "model.embed_tokens.weight"
HEAD_WEIGHT = "lm_head.weight"
FINAL_NORM = "model.norm.weight"
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
LINEARS = ATTENTION + MLP
NORMS = ("input_layernorm", "post_attention_layernorm")
MAX_INPUTS, MAX_POSITIONS = 131072, 1 << 30
# What the engine runs, see csrc/config.cpp: nobody should wait for a conversion that it refuses.
COUNTS = {
    "hidden_size": MAX_INPUTS,
    "intermediate_size": MAX_INPUTS,
    "num_hidden_layers": 1024,
    "num_attention_heads": MAX_INPUTS,
    "num_key_value_heads": MAX_INPUTS,
    "head_dim": 1024,
    "vocab_size": 1 << 24,
    "max_position_embeddings": MAX_POSITIONS,
}
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")  # null says that there is none
NUMBERS = {"rms_norm_eps": (1e-12, 1.0), "rope_theta": (1.0, 1e15)}
ROPE_NUMBERS = {
    "factor": (1.0, 1e6),
    "low_freq_factor": (1e-3, 1e6),
    "high_freq_factor": (1e-3, 1e6),
    "original_max_position_embeddings": (1, MAX_POSITIONS),
}
ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": tuple(ROPE_NUMBERS),
}


@dataclass(frozen=True)
class ModelConfig:
    """A Llama-shaped model under Hugging Face's names. `rope_scaling` is None or holds "rope_type" and its numbers."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name, most in COUNTS.items():
            value = getattr(self, name)
            if not is_whole(value, 1, most):
                raise Error(
                    f"{name} is {quoted(value)} in the model's configuration; it must be a positive whole number, at "
                    f"most {most}"
                )
        if self.num_attention_heads % self.num_key_value_heads:
            raise Error(
                f"num_attention_heads is {self.num_attention_heads}, which num_key_value_heads = "
                f"{self.num_key_value_heads} does not divide: the configuration contradicts itself"
            )
        if self.head_dim % 2:
            raise Error(f"head_dim is {self.head_dim}; rotary positions need an even one")
        if self.num_attention_heads * self.head_dim > MAX_INPUTS:
            raise Error(
                f"{self.num_attention_heads} heads of {self.head_dim} are {self.num_attention_heads * self.head_dim} "
                f"values; at most {MAX_INPUTS} can be run"
            )
        for name, (low, high) in NUMBERS.items():
            value = getattr(self, name)
            if not is_number(value, low, high):
                raise Error(
                    f"{name} is {quoted(value)} in the model's configuration; it must be a positive number, from "
                    f"{low:g} to {high:g}"
                )
        if self.bos_token_id is not None and not is_whole(self.bos_token_id, 0, self.vocab_size - 1):
            raise Error(
                f"bos_token_id is {quoted(self.bos_token_id)} in the model's configuration; it must be a token id "
                f"below {self.vocab_size} or null"
            )
        ends = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        if self.eos_token_id is not None and not all(is_whole(end, 0, MAX_POSITIONS) for end in ends):
            raise Error(
                f"eos_token_id is {quoted(self.eos_token_id)} in the model's configuration; it must be a token id, a "
                "list of them or null"
            )
        if self.pad_token_id is not None and not is_whole(self.pad_token_id, -1, MAX_POSITIONS):
            raise Error(
                f"pad_token_id is {quoted(self.pad_token_id)} in the model's configuration; it must be a token id or "
                "null"
            )

    def to_dict(self) -> dict[str, Any]:
        """config.json as transformers would write it for a LlamaForCausalLM in half precision."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "torch_dtype": "float16",
            **asdict(self),
        }

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """[out, in] of the seven linears of a layer, by canonical short name without ".weight"."""
        queries = self.num_attention_heads * self.head_dim
        keys = self.num_key_value_heads * self.head_dim
        hidden, ffn = self.hidden_size, self.intermediate_size
        shapes = ((queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries))
        return dict(zip(LINEARS, (*shapes, (ffn, hidden), (ffn, hidden), (hidden, ffn))))

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of one layer by canonical short name, as `Source.layer` returns them."""
        shapes: dict[str, tuple[int, ...]] = {f"{norm}.weight": (self.hidden_size,) for norm in NORMS}
        for name, shape in self.linear_shapes().items():
            shapes[f"{name}.weight"] = shape
            if self.attention_bias if name in ATTENTION else self.mlp_bias:
                shapes[f"{name}.bias"] = shape[:1]
        return shapes

    def parameters(self) -> int:
        """Number of weights, a tied embedding counted once."""
        layer = sum(math.prod(shape) for shape in self.layer_shapes().values())
        table = self.vocab_size * self.hidden_size
        return layer * self.num_hidden_layers + table * (1 if self.tie_word_embeddings else 2) + self.hidden_size


@dataclass(frozen=True)
class Family:
    """A Hugging Face architecture whose tensors carry canonical names.

    defaults: what transformers assumes for keys that config.json leaves out.
    refuse: raises Error for a configuration whose mathematics the runtime does not have.
    ignored: tensor names that hold no weights and are skipped.
    """

    model_type: str
    defaults: Mapping[str, Any]
    refuse: Callable[[Mapping[str, Any]], None]
    ignored: re.Pattern[str] = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq|rotary_emb\.inv_freq")


@dataclass(frozen=True)
class GgufFamily:
    """A GGUF architecture: file names -> canonical names.

    layer: the part between "blk.N." and ".weight" -> canonical short name.
    interleaved: canonical linears whose rows are stored with the two rotary halves of each head interleaved.
    """

    names: Mapping[str, str]
    layer: Mapping[str, str]
    interleaved: tuple[str, ...]


def _refuse_llama(config: Mapping[str, Any]) -> None:
    if config.get("rope_interleaved"):
        raise Error("rope_interleaved is true; only rotary positions that rotate halves are supported")


def _refuse_mistral(config: Mapping[str, Any]) -> None:
    # Early configurations leave the key out and mean 4096 (transformers' default); MLC writes sliding_window_size.
    window = config.get("sliding_window", config.get("sliding_window_size", 4096))
    longest = config.get("max_position_embeddings")
    longest = 131072 if longest is None else longest
    for name, value in (("sliding_window", window), ("max_position_embeddings", longest)):
        if value is not None and not is_number(value, 0, math.inf):
            raise Error(f"{name} is {quoted(value)}; it must be a whole number")
    if window is not None and window < longest:
        raise Error(
            f"MistralForCausalLM with a sliding window of {window} tokens (context {longest}) is not supported: "
            "only Mistral models with full attention (sliding_window null, as v0.2 and later) can be converted"
        )


_LLAMA_DEFAULTS = {
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family("llama", _LLAMA_DEFAULTS, _refuse_llama),
    "MistralForCausalLM": Family(
        "mistral",
        {**_LLAMA_DEFAULTS, "max_position_embeddings": 131072, "num_key_value_heads": 8},
        _refuse_mistral,
    ),
}

GGUF_FAMILIES: dict[str, GgufFamily] = {
    "llama": GgufFamily(
        names={"token_embd.weight": EMBEDDING_WEIGHT, "output_norm.weight": FINAL_NORM, "output.weight": HEAD_WEIGHT},
        layer={
            "attn_norm": "input_layernorm",
            "attn_q": "self_attn.q_proj",
            "attn_k": "self_attn.k_proj",
            "attn_v": "self_attn.v_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_norm": "post_attention_layernorm",
            "ffn_gate": "mlp.gate_proj",
            "ffn_up": "mlp.up_proj",
            "ffn_down": "mlp.down_proj",
        },
        interleaved=("self_attn.q_proj", "self_attn.k_proj"),
    ),
}


def find_family(config: Mapping[str, Any]) -> Family:
    """The table's row for a config.json. Raises Error that names what was found and what is supported."""
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(each, str) for each in architectures):
        raise Error(f"architectures is {quoted(architectures)}; it must be a list of names")
    name = architectures[0] if architectures else None
    if name is None:
        name = next((n for n, family in FAMILIES.items() if family.model_type == config.get("model_type")), None)
    if name not in FAMILIES:
        found = name or config.get("model_type") or "a model of no stated family"
        found = found if isinstance(found, str) else f"model_type {quoted(found)}"
        raise Error(f"{found} is not supported: Halfturn converts {', '.join(FAMILIES)}")
    stated = config.get("model_type")
    if stated not in (None, *(family.model_type for family in FAMILIES.values())):
        raise Error(f"architectures says {name} and model_type {quoted(stated)}; correct the one that is wrong")
    return FAMILIES[name]


def _special(token: Any, vocabulary: Any) -> Any:
    """A special token's id, or a list of them, without those that stand for none: null, and numbers that are no id."""
    if isinstance(token, list):
        ids = (_special(one, vocabulary) for one in token)
        return [one for one in ids if one is not None]
    # Anything else is refused by ModelConfig.
    outside = is_whole(token, -(2**63), 2**63) and is_whole(vocabulary, 1, 2**63) and not 0 <= token < vocabulary
    return None if outside else token


def canonical_config(config: Mapping[str, Any], family: Family) -> ModelConfig:
    """A family's config.json as a ModelConfig. Raises Error for anything the runtime would compute differently."""
    quantized = config.get("quantization_config") or config.get("compression_config")
    if quantized:
        method = quantized.get("quant_method", "unknown") if isinstance(quantized, Mapping) else "unknown"
        if method == "halfturn":
            raise Error("the source is a Halfturn checkpoint; convert the half-precision model that it came from")
        raise Error(f"the source is already quantized ({method}); Halfturn converts bf16, fp16 or fp32 weights")
    for each in FAMILIES.values():  # transformers goes by model_type, other programs by architectures
        if each is family or each.model_type == config.get("model_type"):
            each.refuse(config)
    keys = {**family.defaults, **{k: v for k, v in config.items() if v is not None or k in SPECIAL}}
    if keys["hidden_act"] != "silu":
        raise Error(f"hidden_act is {quoted(keys['hidden_act'])}; only 'silu' is supported")
    if keys.get("is_causal", True) is not True:
        raise Error(f"is_causal is {quoted(keys['is_causal'])}; only models that see no later tokens are supported")
    missing = [
        k
        for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        if k not in keys
    ]
    if missing:
        raise Error(f"it has no {', '.join(missing)}; the model can't be read without")
    for k in ("hidden_size", "num_attention_heads"):
        if not is_whole(keys[k], 1, MAX_INPUTS):
            raise Error(f"{k} is {quoted(keys[k])}; it must be a positive whole number, at most {MAX_INPUTS}")
    for k in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
        if keys[k] not in (False, True):  # also 0 and 1
            raise Error(f"{k} is {quoted(keys[k])}; it must be true or false")
    if "head_dim" not in keys and keys["hidden_size"] % keys["num_attention_heads"]:
        raise Error(
            f"hidden_size {keys['hidden_size']} is not a multiple of num_attention_heads {keys['num_attention_heads']} "
            "and there is no head_dim"
        )
    rope_theta, rope_scaling = canonical_rope(keys)
    return ModelConfig(
        hidden_size=keys["hidden_size"],
        intermediate_size=keys["intermediate_size"],
        num_hidden_layers=keys["num_hidden_layers"],
        num_attention_heads=keys["num_attention_heads"],
        num_key_value_heads=keys.get("num_key_value_heads", keys["num_attention_heads"]),
        head_dim=keys.get("head_dim", keys["hidden_size"] // keys["num_attention_heads"]),
        vocab_size=keys["vocab_size"],
        max_position_embeddings=keys["max_position_embeddings"],
        rms_norm_eps=keys["rms_norm_eps"],
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        attention_bias=bool(keys["attention_bias"]),
        mlp_bias=bool(keys["mlp_bias"]),
        tie_word_embeddings=bool(keys["tie_word_embeddings"]),
        **{name: _special(keys.get(name), keys["vocab_size"]) for name in SPECIAL},
    )


def canonical_rope(keys: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """(rope_theta, rope_scaling) from rope_theta + rope_scaling, or from transformers v5's rope_parameters.

    rope_scaling is None or {"rope_type": "linear" | "dynamic" | "llama3", ...numbers}. Raises Error for other types,
    and where both spellings are there and differ: transformers would take rope_scaling without the other's theta.
    """
    old, new = keys.get("rope_scaling"), keys.get("rope_parameters")
    if old and new:
        one, other = canonical_rope({**keys, "rope_scaling": None}), canonical_rope({**keys, "rope_parameters": None})
        if one != other:
            raise Error(
                f"rope_parameters is {quoted(new)} and rope_scaling {quoted(old)}: two settings that differ; keep the "
                "one that the model was trained with in config.json"
            )
    given = new or old or {}
    if not isinstance(given, Mapping) or any(isinstance(v, Mapping) for v in given.values()):
        raise Error(f"rope_parameters is {quoted(given)}; only one setting for all layers is supported")
    theta = given.get("rope_theta", keys["rope_theta"])
    if not is_number(theta, *NUMBERS["rope_theta"]):
        low, high = NUMBERS["rope_theta"]
        raise Error(f"rope_theta is {quoted(theta)}; it must be a number from {low:g} to {high:g}")
    theta = float(theta)
    partial = given.get("partial_rotary_factor", keys.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise Error(f"partial_rotary_factor is {quoted(partial)}; only full rotary positions (1.0) are supported")
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return theta, None
    if not isinstance(kind, str) or kind not in ROPE_FIELDS:
        raise Error(f"rope scaling {quoted(kind)} is not supported: Halfturn knows {', '.join(ROPE_FIELDS)}")
    scaling: dict[str, Any] = {"rope_type": kind}
    for field in ROPE_FIELDS[kind]:
        value, (low, high) = given.get(field), ROPE_NUMBERS[field]
        if not is_number(value, low, high):
            raise Error(
                f"rope scaling {kind!r} has {field} = {quoted(value)}; it must be a positive number from {low:.10g} to "
                f"{high:.10g}"
            )
        scaling[field] = int(value) if field == "original_max_position_embeddings" else float(value)
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise Error(
            f"rope scaling 'llama3' has high_freq_factor {scaling['high_freq_factor']} not above low_freq_factor "
            f"{scaling['low_freq_factor']}"
        )
    return theta, scaling
