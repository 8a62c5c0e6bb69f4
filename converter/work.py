"""The work folder: what a conversion computed and may need again, after a kill -9 or for another bitrate.

An entry is a safetensors file named by a hash of everything that it depends on; it appears at once or not at all, and
one that fails its checksum is computed anew.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from halfturn.converter.write import check_disk, lock, sync
from halfturn.error import Error

if TYPE_CHECKING:
    import torch

Key = str | Mapping[str, Any]


class WorkFolder:
    """A folder of cached results, held by one conversion at a time; close it or use it in a with statement."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        if self.path.exists() and not self.path.is_dir():
            raise Error(f"{self.path} is a file; name a folder to work in")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = lock(
            self.path / ".lock",
            f"{self.path} is in use by another conversion; wait for it or name another work folder with --work",
        )
        for left_over in self.path.glob("*/*.partial"):
            left_over.unlink()

    def get(self, stage: str, key: Key) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """(tensors, meta) as put, or None: never computed, or damaged since (then it is removed)."""
        from safetensors import SafetensorError, safe_open

        path = self._file(stage, key)
        if not path.is_file():
            return None
        try:
            with safe_open(str(path), framework="pt") as file:
                note = json.loads(file.metadata()["halfturn"])
                tensors = {name: file.get_tensor(name) for name in note["names"]}
            if note["checksum"] == _checksum(tensors) and note["key"] == _canonical(key):
                return tensors, note["meta"]
        except (SafetensorError, ValueError, KeyError, TypeError):
            pass
        path.unlink()
        return None

    def put(
        self, stage: str, key: Key, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any] | None = None
    ) -> None:
        """Stores tensors and JSON-able meta under (stage, key), durably. Raises Error where the disk is too full."""
        from safetensors.torch import save_file

        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        path = self._file(stage, key)
        path.parent.mkdir(exist_ok=True)
        check_disk(path.parent, sum(t.numel() * t.element_size() for t in plain.values()) + 1_000_000)
        note = {
            "key": _canonical(key),
            "names": list(plain),
            "meta": dict(meta or {}),
            "checksum": _checksum(plain),
        }
        partial = path.with_suffix(".partial")
        save_file(plain, str(partial), metadata={"halfturn": json.dumps(note)})
        sync(partial)
        partial.rename(path)
        sync(path.parent)

    def close(self) -> None:
        self._lock.close()

    def __enter__(self) -> WorkFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _file(self, stage: str, key: Key) -> Path:
        if not stage.replace("-", "").replace("_", "").isalnum():
            raise Error(f"{stage!r} can't name a stage of the work folder: letters, digits, - and _ only")
        return self.path / stage / f"{hashlib.sha256(_canonical(key).encode()).hexdigest()[:32]}.safetensors"


def _canonical(key: Key) -> str:
    return key if isinstance(key, str) else json.dumps(key, sort_keys=True)


def _checksum(tensors: Mapping[str, torch.Tensor]) -> int:
    """crc32 over names, dtypes, shapes and bytes."""
    import torch

    total = 0
    for name, tensor in tensors.items():
        total = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), total)
        total = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, total)
    return total
