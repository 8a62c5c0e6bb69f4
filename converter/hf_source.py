"""A Hugging Face folder, here or from the hub: config.json and safetensors files, in one shard or several."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from halfturn.checks import MAX_TOKENIZER_BYTES, is_there, read_file
from halfturn.converter.architectures import EMBEDDING_WEIGHT, HEAD_WEIGHT, canonical_config, find_family
from halfturn.converter.card import printable
from halfturn.converter.checkpoint import (
    Source,
    check_complete,
    check_finite,
    check_shape,
    expected_shapes,
    read_json,
)
from halfturn.error import Error
from halfturn.tokenizer import end_ids

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
ADAPTER = "adapter_config.json"
# Of a hub's files.
WANTED = ("config.json", ADAPTER, "model*.safetensors", INDEX, "README.md", *TOKENIZER_FILES, *LICENCE_FILES)
HALF_OR_SINGLE = ("BF16", "F16", "F32")


class HuggingFaceFolder(Source):
    """config.json and safetensors files, in one shard or several."""

    kind = "Hugging Face folder"

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.path = path
        self.name = name or path.resolve().name
        if printable(str(path)) != str(path):
            raise Error(f"the library safetensors can't open {path}, whose name is not UTF-8; rename it")
        if is_there(path / ADAPTER):  # transformers applies it
            raise Error(
                f"{path} has {ADAPTER}: adapters are not applied; merge it into its model and name that folder, or "
                "remove the file if the weights here are merged already"
            )
        self._shards: list[Path] = []
        self._take_note()
        config = read_json(path / "config.json", "a Hugging Face folder has one")
        if ends := end_ids(path / "generation_config.json"):  # or else the family's default would end texts too
            config.setdefault("eos_token_id", ends[0] if len(ends) == 1 else ends)
        try:
            self._family = find_family(config)
            self.config = canonical_config(config, self._family)
        except Error as error:
            raise Error(f"{path / 'config.json'}: {error}") from None
        self._shards = _find_shards(path)
        self._take_note()
        self.bytes = sum(shard.stat().st_size for shard in self._shards)
        self._home, stored_head = self._check_headers()
        if stored_head:
            self._check_tied(stored_head)
        self.check_unchanged()

    def _check_headers(self) -> tuple[dict[str, Path], Path | None]:
        """Canonical name -> shard, after comparing every header entry with the configuration; a tied head's shard."""
        expected = expected_shapes(self.config)
        home: dict[str, Path] = {}
        stored_head = None
        for shard in self._shards:
            for name, (dtype, shape) in _read_header(shard).items():
                tied = name == HEAD_WEIGHT and self.config.tie_word_embeddings
                if self._family.ignored.fullmatch(name):
                    continue
                if name not in expected and not tied:
                    raise Error(f"{name} in {shard.name} has no place in a {self._family.model_type} model")
                if other := stored_head if tied else home.get(name):
                    raise Error(f"{name} is in both {other.name} and {shard.name}: the folder mixes two models")
                if dtype not in HALF_OR_SINGLE:
                    raise Error(
                        f"{name} in {shard.name} is {dtype}; weights must be one of {', '.join(HALF_OR_SINGLE)}"
                    )
                check_shape(name, shape, expected[EMBEDDING_WEIGHT if tied else name], shard.name)
                if tied:
                    stored_head = shard
                else:
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

        home = self._home[EMBEDDING_WEIGHT]
        same = all(
            torch.allclose(rows(home, EMBEDDING_WEIGHT, k), rows(shard, HEAD_WEIGHT, k), 0, 0, equal_nan=True)
            for k in range(0, self.config.vocab_size, COMPARED_ROWS)
        )
        if not same:
            raise Error(
                f"{HEAD_WEIGHT} in {shard.name} is not {EMBEDDING_WEIGHT}, although tie_word_embeddings is true in "
                f"config.json: set that to false if the head is right, or remove {HEAD_WEIGHT}"
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
        licences = (name for name in LICENCE_FILES if not (self.path / name).is_dir())  # a folder may have such a name
        for name in (*TOKENIZER_FILES, *licences):
            content = read_file(self.path / name, MAX_TOKENIZER_BYTES)
            if content is not None:
                (out_folder / name).write_bytes(content)

    def card_facts(self) -> dict[str, str]:
        facts: dict[str, str] = {}
        readme = self.path / "README.md"
        if readme.is_file() and os.access(readme, os.R_OK):
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


def from_hub(repo: str) -> HuggingFaceFolder:
    """The model "owner/name" of the Hugging Face hub, downloaded into its own cache. Raises Error."""
    return HuggingFaceFolder(_download(repo), name=repo)


def _download(repo: str) -> Path:
    """The folder in the hub's own cache that the model's files are in."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(repo, allow_patterns=list(WANTED)))
    except HFValidationError:
        raise Error(f"{repo} does not exist as a folder or file here, and it can't be a hub id (owner/model)") from None
    except GatedRepoError:
        raise Error(f"{repo} is gated: accept its licence on huggingface.co and log in with `hf auth login`") from None
    except RepositoryNotFoundError:
        raise Error(f"{repo} is neither a folder here nor on the Hugging Face hub; check the spelling") from None
    except LocalEntryNotFoundError:
        raise Error(f"{repo} is not a folder here, and the Hugging Face hub can't be reached to download it") from None
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Error(f"{repo} could not be downloaded from the Hugging Face hub: {reason}") from None


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
            if not is_there(shard):
                raise Error(f"{index.name} names {shard.name}, which is not in {folder}; download the model again")
        if single.is_file() and shards != [single]:  # transformers reads the one, others the others
            raise Error(f"{folder} has both {single.name} and {index.name}: it mixes two models, remove one")
        return shards
    shards = [file for file in sorted(folder.glob("*.safetensors")) if is_there(file)]
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
