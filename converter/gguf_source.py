"""A GGUF file as a source: weights dequantized by the library `gguf`, rows of Q and K put back in Hugging Face's order.

Only the header is kept after opening; a tensor's bytes are read from the file when it is asked for.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from halfturn.converter.architectures import (
    EMBEDDING_WEIGHT,
    GGUF_FAMILIES,
    HEAD_WEIGHT,
    GgufFamily,
    ModelConfig,
    canonical_rope,
)
from halfturn.converter.checkpoint import (
    Source,
    check_complete,
    check_finite,
    check_shape,
    expected_shapes,
)
from halfturn.converter.gguf_tokenizer import special_ids, tokenizer_files
from halfturn.error import Error, quoted

if TYPE_CHECKING:
    import numpy as np
    import torch

ROPE_FREQUENCIES = "rope_freqs.weight"
# The one setting of llama3 scaling that models were published with; GGUF stores only the factors that follow from it.
LLAMA3_LOW, LLAMA3_HIGH, LLAMA3_ORIGINAL = 1.0, 4.0, 8192


class Entry(NamedTuple):
    """Where a tensor lies: its name in the file, GGML type, shape in [out, in] order, byte offset and length."""

    stored: str
    type: Any
    shape: tuple[int, ...]
    offset: int
    bytes: int


class GgufSource(Source):
    """A GGUF file of an architecture in GGUF_FAMILIES, of any tensor types that gguf can dequantize."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.stem
        self._take_note()
        self.bytes = path.stat().st_size
        self._metadata, stored = _read_header(path)
        architecture = str(self._metadata.get("general.architecture"))
        if architecture not in GGUF_FAMILIES:
            raise Error(
                f"{path.name} holds a {architecture!r} model; GGUF files are read of {', '.join(GGUF_FAMILIES)}"
            )
        self._family = GGUF_FAMILIES[architecture]
        self._entries = _canonical_names(stored, self._family, path)
        frequencies = next((e for e in stored if e.stored == ROPE_FREQUENCIES), None)
        factors = None if frequencies is None else read_tensor(path, frequencies)
        try:
            self.config = gguf_config(self._metadata, architecture, self._entries, factors, "it")
        except Error as error:
            raise Error(f"{path}: {error}") from None
        expected = expected_shapes(self.config)
        for name, entry in self._entries.items():
            if name not in expected:
                raise Error(f"{entry.stored} in {path.name} has no place in a {architecture} model of this header")
            check_shape(entry.stored, entry.shape, expected[name], path.name)
        # A projection without a bias beside others that have one (Qwen-style attention) has a bias of zeros.
        check_complete(self._entries, {n: s for n, s in expected.items() if not n.endswith(".bias")}, path)
        types = Counter[str]()
        for entry in self._entries.values():
            types[entry.type.name] += math.prod(entry.shape)
        self.kind = f"GGUF, mostly {types.most_common(1)[0][0]}"

    def _tensors(self, names: list[str]) -> dict[str, torch.Tensor]:
        import torch

        shapes = expected_shapes(self.config)
        tensors: dict[str, torch.Tensor] = {}
        for name in names:
            if name not in self._entries:
                tensors[name] = torch.zeros(shapes[name])
                continue
            tensor = torch.from_numpy(read_tensor(self.path, self._entries[name]))
            check_finite(name, tensor, self.path.name)
            linear = name.split(".", 3)[-1].rpartition(".")[0]
            if linear in self._family.interleaved:
                tensor = undo_interleave(tensor, self.config.head_dim)
            tensors[name] = tensor
        return tensors

    def _copy_tokenizer(self, out_folder: Path) -> None:
        for name, content in tokenizer_files(self._metadata, self.config.max_position_embeddings, self.path).items():
            text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
            (out_folder / name).write_text(text, encoding="utf-8")

    def card_facts(self) -> dict[str, str]:
        facts: dict[str, str] = {}
        licence = self._metadata.get("general.license")
        if isinstance(licence, str) and licence.replace("-", "").replace(".", "").isalnum():
            facts["license"] = licence
        repo = self._metadata.get("general.base_model.0.repo_url") or self._metadata.get("general.source.url")
        if isinstance(repo, str) and repo.startswith("https://huggingface.co/"):
            facts["base_model"] = repo.removeprefix("https://huggingface.co/")
        return facts

    def _files(self) -> list[Path]:
        return [self.path]


def gguf_config(
    metadata: Mapping[str, Any],
    architecture: str,
    entries: Mapping[str, Entry],
    rope_factors: np.ndarray | None,
    where: str,
) -> ModelConfig:
    """ModelConfig from GGUF metadata, the tensors that exist and rope_freqs.weight ([head_dim/2] or None).

    where: the file, as messages name it.
    """

    def key(name: str, default: int | None = None) -> int:
        value = metadata.get(f"{architecture}.{name}", default)
        if isinstance(value, list):
            if not value or any(other != value[0] for other in value):
                raise Error(
                    f"{where} has {architecture}.{name} = {quoted(value)}: layers of different shapes are not supported"
                )
            value = value[0]
        if value is None:
            raise Error(f"{where} has no {architecture}.{name}; the model can't be read without")
        return _whole(value, f"{architecture}.{name}", where)

    if key("expert_count", 0):
        raise Error(f"{where} is a mixture of {key('expert_count')} experts, which is not supported")
    window, longest = key("attention.sliding_window", 0), key("context_length")
    if 0 < window < longest:
        raise Error(f"{where} has a sliding window of {window} tokens (context {longest}), which is not supported")
    if metadata.get(f"{architecture}.attention.causal", True) is not True:
        raise Error(f"{where} has attention.causal false; only models that see no later tokens are supported")
    hidden, heads = key("embedding_length"), key("attention.head_count")
    if heads < 1:
        raise Error(f"{where} has {architecture}.attention.head_count = {heads}; a model has at least one head")
    head_dim = key("attention.key_length", hidden // heads)
    for other in ("attention.value_length", "rope.dimension_count"):
        if key(other, head_dim) != head_dim:
            raise Error(f"{where} has {other} {key(other)} and heads of {head_dim}; only equal sizes are supported")
    theta, scaling = _rope(metadata, architecture, head_dim, rope_factors, where)
    bos, eos, pad = special_ids(metadata)
    # float32 in the file: 1e-5 reads as 9.99999974e-06
    eps = float(f"{_number(metadata, f'{architecture}.attention.layer_norm_rms_epsilon', None, where):.6g}")
    table = entries[EMBEDDING_WEIGHT].shape if EMBEDDING_WEIGHT in entries else ()
    vocabulary = table[0] if table else key("vocab_size")
    return ModelConfig(
        hidden_size=hidden,
        intermediate_size=key("feed_forward_length"),
        num_hidden_layers=key("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=key("attention.head_count_kv", heads),
        head_dim=head_dim,
        vocab_size=vocabulary,
        max_position_embeddings=longest,
        rms_norm_eps=eps,
        rope_theta=theta,
        rope_scaling=scaling,
        attention_bias=any(".self_attn." in n and n.endswith(".bias") for n in entries),
        mlp_bias=any(".mlp." in n and n.endswith(".bias") for n in entries),
        tie_word_embeddings=HEAD_WEIGHT not in entries,
        bos_token_id=bos,
        eos_token_id=eos[0] if len(eos) == 1 else (eos or None),
        pad_token_id=pad,
    )


def _whole(value: object, name: str, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise Error(f"{where} has {name} = {quoted(value)}; it must be a whole number: download the file again")
    return value


def _number(metadata: Mapping[str, Any], name: str, default: float | None, where: str) -> float:
    value = metadata.get(name, default)
    if value is None:
        raise Error(f"{where} has no {name}; the model can't be read without")
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise Error(f"{where} has {name} = {quoted(value)}; it must be a number: download the file again")
    return value


def llama3_factors(factor: float, theta: float, head_dim: int) -> np.ndarray:
    """What llama3 scaling divides each rotary frequency by, float64 [head_dim/2] (Llama 3.1's reference code)."""
    import numpy as np

    frequency = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    turns = LLAMA3_ORIGINAL * frequency / (2 * math.pi)  # full turns within the original context
    smooth = np.clip((turns - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW), 0.0, 1.0)
    return 1.0 / ((1 - smooth) / factor + smooth)


def undo_interleave(tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of Q or K, [heads * head_dim, ...], from GGUF's order (halves of a head interleaved) to rotate-half."""
    rest = tensor.shape[1:]
    return tensor.reshape(-1, head_dim // 2, 2, *rest).transpose(1, 2).reshape(tensor.shape)


def _rope(
    metadata: Mapping[str, Any], architecture: str, head_dim: int, factors: np.ndarray | None, where: str
) -> tuple[float, dict[str, Any] | None]:
    """(rope_theta, rope_scaling), see canonical_rope."""
    theta = float(f"{_number(metadata, f'{architecture}.rope.freq_base', 10000.0, where):.7g}")
    # As llama.cpp reads them: a factor without a type is linear, 0 is none, and scale_linear is how files of 2023
    # spelled it.
    kind = metadata.get(f"{architecture}.rope.scaling.type", "linear")
    linear = _number(metadata, f"{architecture}.rope.scale_linear", 1.0, where)
    factor = _number(metadata, f"{architecture}.rope.scaling.factor", linear, where)
    attention = _number(metadata, f"{architecture}.rope.scaling.attn_factor", 1.0, where)
    if attention != 1.0:
        raise Error(f"{where} has rope.scaling.attn_factor = {attention:g}; only 1 is supported")
    scaling: dict[str, Any] = {"rope_type": "default"}
    if kind != "none" and not (kind == "linear" and factor in (0.0, 1.0)):
        scaling = {"rope_type": kind, "factor": float(f"{factor:.6g}")}
    if factors is None or bool((abs(factors - 1) < 1e-6).all()):
        return canonical_rope({"rope_theta": theta, "rope_scaling": scaling})
    largest = float(f"{factors.max():.5g}")
    if scaling["rope_type"] != "default" or factors.shape != (head_dim // 2,):
        raise Error(
            f"{where} has {ROPE_FREQUENCIES} {list(factors.shape)} beside rope scaling "
            f"{scaling['rope_type']!r}; not supported"
        )
    if abs(llama3_factors(largest, theta, head_dim) / factors - 1).max() > 1e-3:
        raise Error(
            f"{where} has {ROPE_FREQUENCIES} that don't follow from llama3 scaling (largest factor {largest:g}, low 1, "
            "high 4, original context 8192); convert from the Hugging Face folder"
        )
    llama3 = {
        "rope_type": "llama3",
        "factor": largest,
        "low_freq_factor": LLAMA3_LOW,
        "high_freq_factor": LLAMA3_HIGH,
        "original_max_position_embeddings": LLAMA3_ORIGINAL,
    }
    return canonical_rope({"rope_theta": theta, "rope_scaling": llama3})


def _read_header(path: Path) -> tuple[dict[str, Any], list[Entry]]:
    """Metadata and tensor entries. Raises Error for a file that is truncated, unreadable or one part of several."""
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        entries = [
            Entry(t.name, t.tensor_type, tuple(int(n) for n in reversed(t.shape)), int(t.data_offset), int(t.n_bytes))
            for t in reader.tensors
        ]
    except Exception as error:  # gguf raises whatever numpy makes of damaged bytes
        raise Error(f"{path} is damaged or not a GGUF file that can be read ({error}); download it again") from None
    if reader.byte_order != "I":
        raise Error(f"{path} is big-endian, which is not supported; download the little-endian file")
    if (parts := _whole(metadata.get("split.count", 1), "split.count", path.name)) > 1:
        raise Error(f"{path} is one of {parts} parts; join them with llama-gguf-split --merge first")
    supported = {gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16, *gguf.quants._type_traits}
    for entry in entries:
        if entry.type not in supported:
            raise Error(f"{entry.stored} in {path.name} is {entry.type.name}, which can't be dequantized")
    return metadata, entries


def _canonical_names(stored: list[Entry], family: GgufFamily, path: Path) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for entry in stored:
        if entry.stored == ROPE_FREQUENCIES:
            continue
        name = family.names.get(entry.stored)
        parts = entry.stored.split(".")
        if name is None and len(parts) == 4 and parts[0] == "blk" and parts[2] in family.layer:
            name = f"model.layers.{parts[1]}.{family.layer[parts[2]]}.{parts[3]}"
        if name is None:
            raise Error(
                f"{entry.stored} in {path.name} is not a tensor of a llama model; this variant is not supported"
            )
        entries[name] = entry
    return entries


def read_tensor(path: Path, entry: Entry) -> np.ndarray:
    """One tensor as float32 in [out, in] order."""
    import numpy as np
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    raw = np.fromfile(path, dtype=np.uint8, count=entry.bytes, offset=entry.offset)
    if raw.size != entry.bytes:
        raise Error(f"{entry.stored} in {path} has {raw.size} of its {entry.bytes} bytes; download the file again")
    if entry.type == GGMLQuantizationType.F32:
        values = raw.view(np.float32)
    elif entry.type == GGMLQuantizationType.F16:
        values = raw.view(np.float16).astype(np.float32)
    else:
        values = dequantize(raw.reshape(*entry.shape[:-1], -1), entry.type)
    return np.ascontiguousarray(values, dtype=np.float32).reshape(entry.shape)
