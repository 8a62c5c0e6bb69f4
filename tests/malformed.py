"""Breaks a checkpoint in one of the ways that downloads, disks and attackers do, seeded: a failure can be repeated.

`edit_*` change one thing in place; `break_checkpoint(folder, seed)` picks what to change at random.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

Edit = Callable[[Any], None]

# Values that a field of any type should survive.
JUNK: list[Any] = [
    *(0, -1, 1, 3, 15, 16, 17, 127, 2**16, 2**20, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, -(2**63), 2**64, 10**40),
    *(0.5, -0.0, 1e-300, 1e300, True, False, None, "", "64", "grid", "../x", "\x00", "\u202e", "x" * 5000),
    *([], {}, [0], [[]], [1, 2, 3], [0, 2**62], [2**32, 2**32], {"a": 1}, [None] * 200),
]


def weight_file(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def edit_json(path: Path, edit: Edit) -> None:
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


def edit_config(folder: Path, edit: Edit) -> None:
    edit_json(folder / "config.json", edit)


def split_header(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_header(path: Path, header: bytes, rest: bytes, length: int | None = None) -> None:
    header += b" " * (-len(header) % 8)
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + rest)


def edit_header(path: Path, edit: Edit) -> None:
    header, rest = split_header(path)
    edit(header)
    write_header(path, json.dumps(header).encode(), rest)


def _flip(data: bytes, count: int, begin: int, end: int, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(count):
        changed[rng.randrange(begin, max(end, begin + 1))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _random_place(document: Any, rng: random.Random) -> tuple[Any, Any]:
    """A container inside `document` and one of its keys; deep and shallow ones alike."""
    while True:
        key = rng.choice(list(document) if isinstance(document, dict) else range(len(document)))
        inner = document[key]
        if not isinstance(inner, dict | list) or not inner or rng.random() < 0.15:
            return document, key
        document = inner


def _spoil(document: Any, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        container, key = _random_place(document, rng)
        what = rng.random()
        if what < 0.15:
            del container[key]
        elif what < 0.25 and isinstance(container, dict):
            container[rng.choice(("x", "", key + "x", key.upper()))] = container.pop(key)
        elif what < 0.5 and isinstance(container[key], int):
            container[key] += rng.choice((-16, -1, 1, 2, 16, 2**32, -(2**32), 2**63))
        else:
            container[key] = rng.choice(JUNK)
        if not document:
            return


def break_checkpoint(folder: Path, seed: int) -> str:
    """Changes the checkpoint in `folder` and says how. Some changes leave it valid."""
    rng = random.Random(seed)
    weights = rng.choice(sorted(folder.glob("*.safetensors")))
    texts = [folder / "config.json", *folder.glob("*.index.json")]
    text = rng.choice(texts)
    data = weights.read_bytes()
    length = int.from_bytes(data[:8], "little")
    kind = rng.randrange(13)
    if kind == 0:
        target = rng.choice([weights, text])
        whole = target.read_bytes()
        target.write_bytes(whole[: rng.randrange(len(whole))])
        return f"{target.name} cut"
    if kind == 1:
        weights.write_bytes(_flip(data, rng.choice((1, 2, 8)), 8, 8 + length, rng))
        return f"header of {weights.name} flipped"
    if kind == 2:
        whole = text.read_bytes()
        text.write_bytes(_flip(whole, rng.choice((1, 2, 8)), 0, len(whole), rng))
        return f"{text.name} flipped"
    if kind == 3:
        weights.write_bytes(_flip(data, 64, 8 + length, len(data), rng))
        return f"tensors of {weights.name} flipped"
    if kind == 4:
        weights.write_bytes(_flip(data, 1, 0, 8, rng))
        return f"header length of {weights.name} flipped"
    if kind == 5:
        value = rng.choice((0, 1, 2, 8, len(data) - 9, len(data) - 8, len(data), 2**31, 2**63 - 1, 2**63, 2**64 - 1))
        weights.write_bytes(value.to_bytes(8, "little") + data[8:])
        return f"header length of {weights.name} = {value}"
    if kind in (6, 7):
        edit_header(weights, lambda header: _spoil(header, rng))
        return f"header of {weights.name} edited"
    if kind in (8, 9, 10):
        edit_json(text, lambda document: _spoil(document, rng))
        return f"{text.name} edited"
    if kind == 11:
        target = rng.choice([weights, *texts])
        target.unlink()
        if rng.random() < 0.3:
            target.mkdir()
        elif rng.random() < 0.5:
            target.write_bytes(b"")
        return f"{target.name} gone, empty or a folder"
    begin = rng.randrange(len(data))
    chunk = rng.randbytes(rng.randrange(1, 64))
    weights.write_bytes(data[:begin] + chunk + data[begin + rng.choice((0, len(chunk))) :])
    return f"{weights.name} overwritten or lengthened at {begin}"


def broken_copies(sources: list[Path], folder: Path, count: int, first_seed: int = 0) -> dict[Path, str]:
    """`count` broken copies of the sources, in turn, and what was done to each."""
    made = {}
    for seed in range(first_seed, first_seed + count):
        copy = folder / f"broken-{seed:04}"
        shutil.copytree(sources[seed % len(sources)], copy)
        made[copy] = break_checkpoint(copy, seed)
    return made
