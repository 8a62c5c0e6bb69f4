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

from halfturn.checks import MAX_TOKENIZER_BYTES, is_there, read_file
from halfturn.converter.architectures import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    ModelConfig,
    canonical_config,
    find_family,
)
from halfturn.converter.card import printable
from halfturn.converter.hub import download
from halfturn.error import Error

if TYPE_CHECKING:
    import torch

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "USE_POLICY.md")
COMPARED_ROWS = 8192  # of two tables, in memory together
INDEX = "model.safetensors.index.json"
WANTED = ("config.json", "model*.safetensors", INDEX, "README.md", *TOKENIZER_FILES, *LICENCE_FILES)  # of a hub's files
LARGEST = 1e15  # a weight whose products and their squares float32 holds; no model comes near
HALF_OR_SINGLE = ("BF16", "F16", "F32")


class Source(ABC):
    """A model to convert. `config`: canonical configuration; `path`: file or folder; `bytes`: size of its weights.

    Its files are opened anew for each call. Every call raises Error where one is no longer the file that was opened:
    two models would be mixed.
    """

    _opened: dict[Path, tuple[int, ...]]
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
        return self._read([EMBEDDING])[EMBEDDING]

    def head(self) -> torch.Tensor:
        """[vocab, hidden] float32; the embedding where the two are tied."""
        name = EMBEDDING if self.config.tie_word_embeddings else HEAD
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
        now = identities(self._files())
        for file in {**self._opened, **now}:
            if self._opened.get(file) != now.get(file):
                raise Error(f"{file} changed during the conversion: leave it as it is and run the same command again")

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
        return HuggingFaceFolder(download(str(source), WANTED), name=str(source))
    raise Error(f"{source} does not exist; name a Hugging Face folder, a .gguf file or a hub id such as owner/model")


class HuggingFaceFolder(Source):
    """config.json and safetensors files, in one shard or several."""

    kind = "Hugging Face folder"

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.path = path
        self.name = name or path.resolve().name
        if printable(str(path)) != str(path):
            raise Error(f"the library safetensors can't open {path}, whose name is not UTF-8; rename it")
        config = read_json(path / "config.json", "a Hugging Face folder has one")
        try:
            self._family = find_family(config)
            self.config = canonical_config(config, self._family)
        except Error as error:
            raise Error(f"{path / 'config.json'}: {error}") from None
        self._shards = _find_shards(path)
        self._opened = identities(self._files())
        self.bytes = sum(shard.stat().st_size for shard in self._shards)
        self._home, stored_head = self._check_headers()
        if stored_head:
            self._check_tied(stored_head)

    def _check_headers(self) -> tuple[dict[str, Path], Path | None]:
        """Canonical name -> shard, after comparing every header entry with the configuration; a tied head's shard."""
        expected = expected_shapes(self.config)
        home: dict[str, Path] = {}
        stored_head = None
        for shard in self._shards:
            for name, (dtype, shape) in _read_header(shard).items():
                if name == HEAD and self.config.tie_word_embeddings:
                    check_shape(name, shape, expected[EMBEDDING], shard.name)
                    stored_head = shard
                    continue
                if self._family.ignored.fullmatch(name):
                    continue
                if name not in expected:
                    raise Error(f"{name} in {shard.name} has no place in a {self._family.model_type} model")
                if name in home:
                    raise Error(f"{name} is in both {home[name].name} and {shard.name}: the folder mixes two models")
                if dtype not in HALF_OR_SINGLE:
                    raise Error(
                        f"{name} in {shard.name} is {dtype}; weights must be one of {', '.join(HALF_OR_SINGLE)}"
                    )
                check_shape(name, shape, expected[name], shard.name)
                home[name] = shard
        check_complete(home, expected, self.path)
        return home, stored_head

    def _check_tied(self, shard: Path) -> None:
        """Refuses a stored head that isn't the embedding: some versions of transformers tie it, others don't."""
        import torch
        from safetensors import safe_open

        def rows(home: Path, name: str, start: int) -> torch.Tensor:
            with safe_open(str(home), framework="pt") as file:  # anew, so that rows that were read don't stay resident
                return file.get_slice(name)[start : start + COMPARED_ROWS].float()

        same = all(
            torch.allclose(rows(self._home[EMBEDDING], EMBEDDING, k), rows(shard, HEAD, k), 0, 0, equal_nan=True)
            for k in range(0, self.config.vocab_size, COMPARED_ROWS)
        )
        if not same:
            raise Error(
                f"{HEAD} in {shard.name} is not {EMBEDDING}, although tie_word_embeddings is true in config.json: set "
                f"that to false if the head is right, or remove {HEAD}"
            )

    def _tensors(self, names: list[str]) -> dict[str, torch.Tensor]:
        import torch
        from safetensors import safe_open

        tensors: dict[str, torch.Tensor] = {}
        # A shard is mapped anew for each call: pages that were read don't stay resident. Also float32 is copied, since
        # a mapped file that is cut short meanwhile would kill the process.
        for shard in sorted({self._home[name] for name in names}):
            with safe_open(str(shard), framework="pt") as file:
                for name in names:
                    if self._home[name] == shard:
                        tensors[name] = file.get_tensor(name).to(torch.float32, copy=True)
                        check_finite(name, tensors[name], shard.name)
        return {name: tensors[name] for name in names}

    def _copy_tokenizer(self, out_folder: Path) -> None:
        if not any(is_there(self.path / name) for name in ("tokenizer.json", "tokenizer.model")):
            raise Error(f"{self.path} has neither tokenizer.json nor tokenizer.model; copy the model's tokenizer there")
        for name in (*TOKENIZER_FILES, *LICENCE_FILES):
            content = read_file(self.path / name, MAX_TOKENIZER_BYTES)
            if content is not None:
                (out_folder / name).write_bytes(content)

    def card_facts(self) -> dict[str, str]:
        facts: dict[str, str] = {}
        readme = self.path / "README.md"
        if readme.is_file():
            front = re.match(r"---\n(.*?)\n---", readme.read_text("utf-8", "replace"), re.DOTALL)
            found = re.search(r"^license:[ \t]*([\w.-]+)[ \t]*$", front.group(1), re.MULTILINE) if front else None
            if found:
                facts["license"] = found.group(1)
        if re.fullmatch(r"[\w.-]+/[\w.-]+", self.name):
            facts["base_model"] = self.name
        return facts

    def _files(self) -> list[Path]:
        names = ("config.json", *TOKENIZER_FILES)
        return [self.path / n for n in names if is_there(self.path / n)] + self._shards


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical full name -> shape, for every tensor that a source of this configuration must have."""
    table = (config.vocab_size, config.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: table, FINAL_NORM: (config.hidden_size,)}
    for index in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{index}.{short}": shape for short, shape in config.layer_shapes().items()}
    if not config.tie_word_embeddings:
        shapes[HEAD] = table
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


def identities(files: list[Path]) -> dict[Path, tuple[int, ...]]:
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
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise Error(f"{path} does not exist; {why}") from None
    except OSError as error:
        raise Error(f"{path} can't be read: {error.strerror}; make it readable") from None
    except RecursionError:
        raise Error(f"{path} is nested too deeply to be read; download it again") from None
    except ValueError as error:  # not UTF-8, not JSON, or a number of thousands of digits
        raise Error(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise Error(f"{path} holds a {type(value).__name__}, not an object; {why}")
    return value


def _find_shards(folder: Path) -> list[Path]:
    """The safetensors files of a folder in name order: those of the index, or the only one."""
    index, single = folder / INDEX, folder / "model.safetensors"
    if is_there(index):
        weight_map = read_json(index, "it lists the shards").get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise Error(f"{index} has no weight_map; download the model again")
        shards = [folder / str(name) for name in sorted(set(map(str, weight_map.values())))]
        for shard in shards:
            if shard.parent != folder or shard.name in ("", "..", "."):
                raise Error(f"{index} names {shard}, which is outside the folder")
            if not shard.is_file():
                raise Error(f"{index.name} names {shard.name}, which is not in {folder}; download the model again")
        if single.is_file() and shards != [single]:  # transformers reads the one, others the others
            raise Error(f"{folder} has both {single.name} and {index.name}: it mixes two models, remove one")
        return shards
    shards = sorted(folder.glob("*.safetensors"))
    if len(shards) == 1:
        return shards
    if shards:
        if single in shards:
            return [single]
        raise Error(f"{folder} has {len(shards)} safetensors files and no {INDEX} that lists them")
    other = next((f.name for p in ("*.bin", "*.pth", "*.gguf") for f in sorted(folder.glob(p))), None)
    hint = f"; {other} is there: " if other else "; "
    if other and other.endswith(".gguf"):
        raise Error(f"{folder} has no safetensors file{hint}name that GGUF file itself")
    raise Error(f"{folder} has no safetensors file{hint}Halfturn reads safetensors and GGUF only")


def _read_header(shard: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape) of a safetensors file; safetensors itself checks offsets and lengths."""
    from safetensors import SafetensorError, safe_open

    try:
        open(shard, "rb").close()  # the library says "no such file" of one that may not be read
        with safe_open(str(shard), framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            return {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except SafetensorError as error:
        raise Error(f"{shard} is not a readable safetensors file ({error}); download it again") from None
    except OSError as error:
        raise Error(
            f"{shard} can't be read ({error.strerror or error}); make it readable or download it again"
        ) from None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
