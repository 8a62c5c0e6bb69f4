"""OUT while it is being made, and what files and disks need for it: room, a lock, durability."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import IO

from halfturn.console import megabytes
from halfturn.error import Error


def check_disk(path: str | Path, needed_bytes: int) -> None:
    """Raises Error, with both numbers, where the disk that `path` is or will be on has less than needed_bytes free."""
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise Error(
            f"{megabytes(needed_bytes)} are needed in {folder}, {megabytes(free)} are free; make room or choose "
            "another place"
        )


def lock(path: Path, message: str) -> IO[str]:
    """A file locked for this process until it is closed or the process ends. Raises Error(message) if it is held."""
    file = open(path, "a+")  # noqa: SIM115 - held open on purpose
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise Error(message) from None
    return file


class OutFolder:
    """OUT as it is being made: its hidden sibling `folder`, empty and locked until `publish` or `abort`.

    Refuses an OUT that exists, unless overwrite is set and it is a Halfturn checkpoint. OUT may be a link to a folder:
    then that folder is replaced and the link stays. What is replaced is `.OUT.old` until the new one is in its place,
    then `.OUT.trash` until it is gone: only the former is ever put back.
    """

    def __init__(self, out: str | Path, overwrite: bool = False) -> None:
        self._overwrite = overwrite
        self.out = find_place(out, overwrite)
        self.folder, self._old, self._trash = siblings(self.out)
        try:
            _check_replaceable(self.out)
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._lock = self._take()
        except OSError as error:
            raise Error(f"{out} can't be written ({error.strerror}); choose another place for OUT") from None

    def publish(self) -> None:
        """Makes everything durable and renames the folder to OUT."""
        for path in sorted(self.folder.iterdir()):
            sync(path)
        sync(self.folder)
        _check_writable(self.out, self._overwrite)  # again: it may have appeared since
        try:
            if self.out.exists():
                self.out.rename(self._old)
            self.folder.rename(self.out)
        finally:
            self._settle()
        (self.out / ".lock").unlink()  # only now: until the rename, the lock keeps others from clearing the folder
        self._lock.close()
        sync(self.out.parent)
        shutil.rmtree(self._trash, ignore_errors=True)

    def abort(self) -> None:
        """Removes the folder, unless it was published."""
        if not self._lock.closed:
            shutil.rmtree(self.folder, ignore_errors=True)
            self._lock.close()

    def __enter__(self) -> OutFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def _take(self) -> IO[str]:
        """An empty partial folder, locked; what a killed conversion left there or replaced is removed."""
        if self.folder.is_symlink():
            self.folder.unlink()
        for path in (self._old, self._trash):
            if path.exists() and not path.is_dir():
                raise Error(f"{path} is in the way of what a conversion replaces; remove or rename it")
        if self._old.is_dir() and not self._old.is_symlink() and not self.folder.exists() and _is_free(self.out):
            # Not killed between the renames: the new one was in its place, and somebody moved it away since.
            raise Error(f"{self._old} is what an earlier conversion replaced; rename it to keep it, or remove it")
        self.folder.mkdir(exist_ok=True)
        message = f"another conversion is writing {self.out}; wait for it or name another folder"
        held = lock(self.folder / ".lock", message)
        for path in self.folder.iterdir():
            if path.name != ".lock":
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        self._settle()
        shutil.rmtree(self._trash, ignore_errors=True)
        try:
            _check_writable(self.out, self._overwrite)  # again: it may have been put back
        except Error:
            shutil.rmtree(self.folder)
            held.close()
            raise
        return held

    def _settle(self) -> None:
        """Ends what the renames of `publish` began: what was OUT goes back where nothing took its place."""
        if self._old.is_symlink():  # earlier versions moved away the link itself
            self._old.unlink()
        elif self._old.exists() and _is_free(self.out):
            self._old.rename(self.out)
        elif self._old.exists():
            with contextlib.suppress(OSError):  # the next conversion tries again
                shutil.rmtree(self._trash, ignore_errors=True)
                self._old.rename(self._trash)


def siblings(out: Path) -> tuple[Path, Path, Path]:
    """The hidden folders beside OUT: as it is being made, and what it replaces before and after the exchange."""
    partial, old, trash = (out.parent / f".{out.name}.{suffix}" for suffix in ("partial", "old", "trash"))
    return partial, old, trash


def find_place(out: str | Path, overwrite: bool) -> Path:
    """OUT's absolute path, links followed. Raises Error where no checkpoint may be written; asked before the work."""
    try:
        place = resolve(out)
        left_over = place / ".lock"
        if left_over.is_file() and _is_ours(place):  # killed when the folder was complete
            with contextlib.suppress(Error, OSError), lock(left_over, "it is being published"):
                left_over.unlink()
        _check_writable(place, overwrite)
    except OSError as error:
        raise Error(f"{out} can't be written ({error.strerror}); choose another place for OUT") from None
    return place


def resolve(out: str | Path) -> Path:
    """OUT's absolute path, links followed. Raises Error for a link that leads nowhere."""
    out = Path(out)
    if out.is_symlink() and not out.exists():
        raise Error(f"{out} is a link to {os.readlink(out)}, which does not exist; remove it or choose another OUT")
    try:
        return out.resolve()
    except RuntimeError:
        raise Error(f"{out} leads through links that form a loop; choose another OUT") from None


def _check_replaceable(out: Path) -> None:
    """Raises Error for a folder in whose place no other can be put."""
    if out.is_mount():
        raise Error(f"{out} is a mount point, which can't be replaced by a finished folder; name a folder inside it")
    here = Path.cwd()
    if out == here or out in here.parents:
        raise Error(f"{out} is the folder you are in, and would be replaced; name another one, or run this elsewhere")


def _check_writable(out: Path, overwrite: bool) -> None:
    """Raises Error for an OUT that exists and may not be replaced."""
    if _is_free(out):
        return
    if not overwrite:
        raise Error(f"{out} exists; choose another folder, or replace it with --overwrite")
    if not _is_ours(out):
        raise Error(f"{out} exists and is not a Halfturn checkpoint, so it is not replaced; choose another folder")


def _is_free(out: Path) -> bool:
    return not out.exists() or (out.is_dir() and not any(out.iterdir()))


def _is_ours(out: Path) -> bool:
    """Whether a folder is a Halfturn checkpoint."""
    try:
        config = json.loads((out / "config.json").read_text("utf-8"))
        return bool(config["quantization_config"]["quant_method"] == "halfturn")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def sync(path: Path) -> None:
    """Makes a file or folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
