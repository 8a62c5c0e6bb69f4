"""Reads the model to convert: a Hugging Face folder, a hub id or a GGUF file, one layer at a time.

`open_source` checks names, shapes and dtypes from the headers alone; tensors are read when asked for and handed over in
float32 under canonical (Llama) names. A source holds no tensor between two calls.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfturn.checks import is_there
from halfturn.converter.architectures import EMBEDDING_WEIGHT, FINAL_NORM, HEAD_WEIGHT, ModelConfig
from halfturn.error import Error

if TYPE_CHECKING:
    import torch

LARGEST = 1e15  # a weight whose products and their squares float32 holds; no model comes near


class Source(ABC):
    """A model to convert. `config`: canonical configuration; `path`: file or folder; `bytes`: size of its weights.

    Its files are opened anew for each call. Every call raises Error where one is no longer the file that was opened:
    two models would be mixed.
    """

    _opened: Mapping[Path, tuple[int, ...]] = {}
    config: ModelConfig
    path: Path
    bytes: int
    kind: str
    name: str

    def layer(self, index: int) -> dict[str, torch.Tensor]:
        """One decoder layer in float32 by short name ("self_attn.q_proj.weight" [out, in], "...bias" [out])."""
        if not 0 <= index < self.config.num_hidden_layers:
            raise Error(f"layer {index} was asked for, the model has {self.config.num_hidden_layers}")
        prefix = f"model.layers.{index}."
        shapes = self.config.layer_shapes()
        read = self._read([prefix + short for short in shapes])
        return {name[len(prefix) :]: tensor for name, tensor in read.items()}

    def embedding(self) -> torch.Tensor:
        """[vocab, hidden] float32."""
        return self._read([EMBEDDING_WEIGHT])[EMBEDDING_WEIGHT]

    def head(self) -> torch.Tensor:
        """[vocab, hidden] float32; the embedding where the two are tied."""
        name = EMBEDDING_WEIGHT if self.config.tie_word_embeddings else HEAD_WEIGHT
        return self._read([name])[name]

    def final_norm(self) -> torch.Tensor:
        """[hidden] float32."""
        return self._read([FINAL_NORM])[FINAL_NORM]

    def fingerprint(self) -> str:
        """sha256 over names, sizes and whole content of the files that the conversion depends on; not over their place.

        Reads every byte once (about 1 GB/s), so ask once.
        """
        total = hashlib.sha256()
        with self._unchanged():
            for file in self._files():
                total.update(f"{file.name}\0{file.stat().st_size}\0{_sha256(file)}\n".encode())
        return total.hexdigest()

    def check_unchanged(self) -> None:
        """Raises Error where a file isn't the one that was opened; what was computed from it must not be kept."""
        now = _identities(self._files())
        for file in {**self._opened, **now}:
            if self._opened.get(file) != now.get(file):
                raise Error(f"{file} changed during the conversion: leave it as it is and run the same command again")

    def _take_note(self) -> None:
        """Of files that it hasn't noted yet: before they are read."""
        self._opened = {**_identities(self._files()), **self._opened}

    @contextlib.contextmanager
    def _unchanged(self) -> Iterator[None]:
        """Checks before and after something is read; whatever else a change led to is not worth telling."""
        self.check_unchanged()
        try:
            yield
        finally:
            self.check_unchanged()

    def describe(self) -> str:
        """One line for people: what it is, how large, its shape."""
        c = self.config
        return (
            f"{self.name} ({self.kind}, {c.parameters() / 1e6:,.1f} M parameters, {self.bytes / 1e6:,.1f} MB): "
            f"{c.num_hidden_layers} layers, hidden {c.hidden_size}, ffn {c.intermediate_size}, "
            f"{c.num_attention_heads}/{c.num_key_value_heads} heads of {c.head_dim}, vocabulary {c.vocab_size}"
        )

    def copy_tokenizer(self, out_folder: str | Path) -> None:
        """Writes tokenizer, chat template and generation_config.json into a folder that exists."""
        with self._unchanged():
            self._copy_tokenizer(Path(out_folder))

    @abstractmethod
    def card_facts(self) -> dict[str, str]:
        """What the source says about itself for the model card: some of "license", "base_model"."""

    def _read(self, names: list[str]) -> dict[str, torch.Tensor]:
        """Canonical full names -> float32 tensors, checked for NaN and infinity."""
        with self._unchanged():
            return self._tensors(names)

    @abstractmethod
    def _copy_tokenizer(self, out_folder: Path) -> None: ...
    @abstractmethod
    def _tensors(self, names: list[str]) -> dict[str, torch.Tensor]: ...

    @abstractmethod
    def _files(self) -> list[Path]:
        """Every file that the conversion depends on, in a fixed order."""


def open_source(source: str | Path) -> Source:
    """Opens a Hugging Face folder, a .gguf file or a hub id ("owner/name", downloaded). Raises Error if unusable."""
    try:
        path = Path(source).expanduser()
    except RuntimeError as error:  # ~somebody
        raise Error(f"{source} does not exist: {error}") from None
    from halfturn.converter.hf_source import HuggingFaceFolder, from_hub

    if path.is_dir():
        return HuggingFaceFolder(path)
    if path.is_file():
        with open(path, "rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise Error(f"{path} is not a GGUF file (it begins with {magic!r}); name one or a Hugging Face folder")
        from halfturn.converter.gguf_source import GgufSource

        return GgufSource(path)
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)) and not str(source).endswith(".gguf"):
        return from_hub(str(source))
    raise Error(f"{source} does not exist; name a Hugging Face folder, a .gguf file or a hub id such as owner/model")


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical full name -> shape, for every tensor that a source of this configuration must have."""
    table = (config.vocab_size, config.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING_WEIGHT: table, FINAL_NORM: (config.hidden_size,)}
    for index in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{index}.{short}": shape for short, shape in config.layer_shapes().items()}
    if not config.tie_word_embeddings:
        shapes[HEAD_WEIGHT] = table
    return shapes


def check_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...], where: str) -> None:
    """Raises Error with both shapes where they differ."""
    if tuple(shape) != expected:
        raise Error(
            f"{name} in {where} is {list(shape)}, the configuration says {list(expected)}: they are of two models"
        )


def check_complete(found: Mapping[str, object], expected: Mapping[str, object], where: Path) -> None:
    """Raises Error with the first missing name and how many are missing."""
    missing = [name for name in expected if name not in found]
    if missing:
        raise Error(
            f"{where} lacks {missing[0]}"
            + (f" and {len(missing) - 1} more tensors" if len(missing) > 1 else "")
            + f" of {len(expected)}; download the model again"
        )


def check_finite(name: str, tensor: torch.Tensor, where: str) -> None:
    """Raises Error that counts the values which are NaN or infinite, or for one whose square float32 can't sum."""
    low, high = tensor.aminmax()  # both carry NaN on; no copy of the tensor is made
    if not bool(low.isfinite() & high.isfinite()):
        bad = tensor.numel() - int(tensor.isfinite().sum())
        raise Error(f"{name} in {where} has {bad} of {tensor.numel()} values NaN or infinite; the file is damaged")
    if (largest := max(-float(low), float(high))) > LARGEST:
        raise Error(f"{name} in {where} has values up to {largest:.3g}, more than {LARGEST:g}; the file is damaged")


def _identities(files: list[Path]) -> dict[Path, tuple[int, ...]]:
    """What tells a file from another of its name and from itself after a change: device, inode, size, time."""
    found: dict[Path, tuple[int, ...]] = {}
    for file in files:
        with contextlib.suppress(OSError):  # it is gone
            status = file.stat()
            found[file] = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    return found


def read_json(path: Path, why: str) -> dict[str, Any]:
    """A JSON object from a file. Raises Error where it is absent, not JSON or not an object."""
    try:
        if not is_there(path):
            raise Error(f"{path} does not exist; {why}")
        value = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise Error(f"{path} can't be read: {error.strerror}; make it readable") from None
    except RecursionError:
        raise Error(f"{path} is nested too deeply to be read; download it again") from None
    except ValueError as error:  # not UTF-8, not JSON, or a number of thousands of digits
        raise Error(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise Error(f"{path} holds a {type(value).__name__}, not an object; {why}")
    return value


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
