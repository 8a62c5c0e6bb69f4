"""The work folder: what a conversion computed and may need again, after a kill -9 or for another bitrate.

An entry is a safetensors file named by a hash of everything that it depends on; it appears at once or not at all, and
one that fails its checksum is computed anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from halfturn.converter.card import printable
from halfturn.converter.out_folder import check_disk, lock, sync
from halfturn.error import Error

if TYPE_CHECKING:
    import torch

Key = str | Mapping[str, Any]
STAGES = ("text", "sensitivities", "hessians", "costs", "embeddings", "layers", "heads", "reference")
_PARTIAL = re.compile(r"[0-9a-f]{32}\.partial|\.tmp[A-Za-z0-9]{6}")


class WorkFolder:
    """A folder of cached results, held by one conversion at a time; close it or use it in a with statement."""

    def __init__(self, path: str | Path, check: Callable[[], None] = lambda: None) -> None:
        """check: raises Error where what is about to be stored must not be."""
        self.path, self._check = Path(path).absolute(), check
        if self.path.is_file():
            raise Error(f"{self.path} is a file; name a folder to work in")
        if printable(str(self.path)) != str(self.path):
            raise Error(f"the library safetensors can't open {self.path}, whose name is not UTF-8; name another --work")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = lock(
                self.path / ".lock",
                f"{self.path} is in use by another conversion; wait for it or name another work folder with --work",
            )
        except OSError as error:
            raise Error(f"nothing can be kept in {self.path} ({error}); name another work folder with --work") from None
        # Only names that `put` and save_file() give: the user may have named a folder that holds other things too.
        for left_over in (file for stage in STAGES for file in self.path.glob(f"{stage}/*")):
            if _PARTIAL.fullmatch(left_over.name) and left_over.is_file() and not left_over.is_symlink():
                left_over.unlink()

    def get(self, stage: str, key: Key) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """(tensors, meta) as put, or None: never computed, or damaged since (then it is removed).

        Raises Error for a folder in its place, which may hold anything.
        """
        from safetensors import SafetensorError, safe_open

        path = self._file(stage, key)
        if path.is_dir():
            raise Error(f"{path} is a folder, not a result; remove it or name another work folder with --work")
        if not path.is_file():
            return None
        try:
            with safe_open(str(path), framework="pt") as file:
                note = json.loads(file.metadata()["halfturn"])
                tensors = {name: file.get_tensor(name) for name in note["names"]}
            meta = note["meta"]
            good = note["key"] == _canonical(key) and note["checksum"] == _checksum(note["key"], meta, tensors)
            if good and isinstance(meta, dict):
                return tensors, meta
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError):
            pass
        self.discard(stage, key)
        return None

    def size(self, entries: Iterable[tuple[str, Key]]) -> int:
        """Bytes of these (stage, key), as far as they are here."""
        files = [self._file(*entry) for entry in entries]
        return sum(file.lstat().st_size for file in files if file.is_file())

    def discard(self, stage: str, key: Key) -> None:
        """Removes an entry that can't be used."""
        self._file(stage, key).unlink(missing_ok=True)

    def put(
        self, stage: str, key: Key, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any] | None = None
    ) -> None:
        """Stores tensors and JSON-able meta under (stage, key), durably. Raises Error where the disk is too full."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        path = self._file(stage, key)
        size = sum(t.numel() * t.element_size() for t in plain.values())
        check_disk(path.parent, size + 1_000_000)
        note = {"key": _canonical(key), "names": list(plain), "meta": json.loads(json.dumps(dict(meta or {})))}
        note["checksum"] = _checksum(note["key"], note["meta"], plain)
        partial = path.with_suffix(".partial")
        try:
            path.parent.mkdir(exist_ok=True)
            save_file(plain, str(partial), metadata={"halfturn": json.dumps(note)})
            sync(partial)
            self._check()
            partial.rename(path)
            sync(path.parent)
        except (SafetensorError, OSError) as error:  # the disk filled up in between, or the file may not be so large
            raise Error(
                f"{size:,} bytes could not be written to {path.parent} ({error}); make room there or name another "
                "work folder with --work, then run the same command again"
            ) from None
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()

    def close(self) -> None:
        self._lock.close()

    def __enter__(self) -> WorkFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _file(self, stage: str, key: Key) -> Path:
        if stage not in STAGES:
            raise Error(f"{stage!r} is no stage of the work folder; it has {', '.join(STAGES)}")
        return self.path / stage / f"{hashlib.sha256(_canonical(key).encode()).hexdigest()[:32]}.safetensors"


def _canonical(key: Key) -> str:
    return key if isinstance(key, str) else json.dumps(key, sort_keys=True)


def _checksum(key: str, meta: Any, tensors: Mapping[str, torch.Tensor]) -> int:
    """crc32 over the key, the meta, and the tensors' names, dtypes, shapes and bytes."""
    import torch

    total = zlib.crc32(f"{key}\n{_canonical(meta)}".encode())
    for name, tensor in tensors.items():
        total = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), total)
        total = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, total)
    return total
