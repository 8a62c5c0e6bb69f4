"""The work folder: what is put is got, damage and other keys are not, one conversion at a time."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from halfturn.converter import out_folder
from halfturn.converter.work import WorkFolder
from halfturn.error import Error

torch = pytest.importorskip("torch", reason="the converter needs the extra [convert]")
KEY = {"source": "abc", "layer": 3, "tokens": 4096}


def tensors() -> dict[str, Any]:
    random = torch.Generator().manual_seed(0)
    hessian = torch.randn(40, 40, generator=random)
    return {
        "hessian": hessian,
        "turned": hessian.T,
        "half": hessian.bfloat16(),
        "count": torch.tensor(7),
        "none": hessian[:0],
    }


def entry(folder: Path) -> Path:
    found = list(folder.glob("hessians/*"))
    assert len(found) == 1
    return found[0]


def test_what_is_put_is_got_by_another_process_too(tmp_path: Path) -> None:
    with WorkFolder(tmp_path / "work") as work:
        assert work.get("hessians", KEY) is None
        work.put("hessians", KEY, tensors(), {"seconds": 1.5, "names": ["a"]})
    with WorkFolder(tmp_path / "work") as work:
        found = work.get("hessians", dict(reversed(KEY.items())))
        assert found is not None
        got, meta = found
        assert meta == {"seconds": 1.5, "names": ["a"]}
        expected = tensors()
        assert list(got) == list(expected)
        for name, tensor in got.items():
            assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name
        got["hessian"].zero_()  # the caller's copy
        again = work.get("hessians", KEY)
        assert again is not None and torch.equal(again[0]["hessian"], expected["hessian"])


def test_other_keys_and_stages_are_other_entries(tmp_path: Path) -> None:
    with WorkFolder(tmp_path) as work:
        work.put("hessians", KEY, tensors())
        assert work.get("hessians", {**KEY, "layer": 4}) is None
        assert work.get("costs", KEY) is None
        work.put("hessians", {**KEY, "layer": 4}, {"x": torch.ones(1)})
        found = work.get("hessians", KEY)
        assert found is not None and "hessian" in found[0]
        with pytest.raises(Error, match=r"'../x' is no stage"):
            work.put("../x", KEY, {})


@pytest.mark.parametrize("damage", ["truncated", "a bit", "a digit of meta", "empty", "another key's", "no note"])
def test_damage_is_computed_anew(tmp_path: Path, damage: str) -> None:
    from safetensors.torch import save_file

    with WorkFolder(tmp_path) as work:
        work.put("hessians", KEY, tensors(), {"cost": 1.5})
        path = entry(tmp_path)
        data = bytearray(path.read_bytes())
        if damage == "truncated":
            path.write_bytes(data[:-1])
        elif damage == "a bit":
            data[-1000] ^= 1
            path.write_bytes(data)
        elif damage == "a digit of meta":
            assert data.count(b"1.5") == 1
            path.write_bytes(data.replace(b"1.5", b"1.4"))
        elif damage == "empty":
            path.write_bytes(b"")
        elif damage == "another key's":
            work.put("text", "key", {"x": torch.ones(3)})
            next(tmp_path.glob("text/*")).rename(path)
        else:
            save_file({"x": torch.ones(3)}, path)
        assert work.get("hessians", KEY) is None
        assert not path.exists()
        work.put("hessians", KEY, tensors())
        assert work.get("hessians", KEY) is not None


@pytest.mark.parametrize("change", [{"checksum": 0}, {"meta": "1.5"}, {"meta": None}, {"key": 5}, {"names": 3}, None])
def test_notes_of_other_versions_are_computed_anew(tmp_path: Path, change: dict[str, Any] | None) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    with WorkFolder(tmp_path) as work:
        work.put("costs", KEY, {}, {"cost": 1.5})
        path = next(tmp_path.glob("costs/*"))
        with safe_open(str(path), framework="pt") as file:
            note = json.loads(file.metadata()["halfturn"])
        text = "[" * 5000 if change is None else json.dumps({**note, **change})
        save_file({}, path, metadata={"halfturn": text})
        assert work.get("costs", KEY) is None and not path.exists()


def test_one_conversion_at_a_time(tmp_path: Path) -> None:
    with WorkFolder(tmp_path), pytest.raises(Error, match="is in use by another conversion"):
        WorkFolder(tmp_path)
    WorkFolder(tmp_path).close()
    (tmp_path / "file").write_text("")
    with pytest.raises(Error, match="file is a file"):
        WorkFolder(tmp_path / "file")


def test_what_a_kill_left_half_written_is_removed(tmp_path: Path) -> None:
    with WorkFolder(tmp_path) as work:
        work.put("hessians", KEY, tensors())
    halves = [entry(tmp_path).with_suffix(".partial"), tmp_path / "hessians" / ".tmpM21cUX"]  # put's, and safetensors'
    for half in halves:
        half.write_bytes(b"half")
    with WorkFolder(tmp_path) as work:
        assert not any(half.exists() for half in halves)
        assert work.get("hessians", KEY) is not None


def test_what_it_did_not_write_stays(tmp_path: Path) -> None:
    WorkFolder(tmp_path).close()
    entry_name = "0123456789abcdef0123456789abcdef.partial"
    kept = [tmp_path / name for name in ("papers/thesis.partial", f"papers/{entry_name}", "layers/mine.partial")]
    for file in kept:
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    (tmp_path / "heads" / entry_name).mkdir(parents=True)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / entry_name).symlink_to(kept[0])
    (tmp_path / "layers" / entry_name).write_text("left over")
    WorkFolder(tmp_path).close()
    assert all(file.read_text() == "mine" for file in kept)
    assert (tmp_path / "heads" / entry_name).is_dir() and (tmp_path / "text" / entry_name).is_symlink()
    assert not (tmp_path / "layers" / entry_name).exists()


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with WorkFolder(tmp_path) as work:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        try:
            with pytest.raises(Error, match=r"bytes could not be written to .*hessians .*File too large.* --work"):
                work.put("hessians", KEY, tensors())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert list((tmp_path / "hessians").iterdir()) == []


def test_a_folder_that_safetensors_cannot_open(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"w\xff")
    with pytest.raises(Error, match="whose name is not UTF-8; name another --work"):
        WorkFolder(folder)
    assert not folder.exists()


def test_a_folder_in_place_of_an_entry_is_named(tmp_path: Path) -> None:
    with WorkFolder(tmp_path) as work:
        work.put("hessians", KEY, tensors())
        path = entry(tmp_path)
        path.unlink()
        path.mkdir()
        (path / "mine.txt").write_text("mine")
        with pytest.raises(Error, match=f"{path.name} is a folder, not a result; remove it or name another work"):
            work.get("hessians", KEY)
        assert (path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("target", ["nowhere", None, "/dev/null"])
def test_links_in_place_of_entries_are_replaced(tmp_path: Path, target: str | None) -> None:
    with WorkFolder(tmp_path) as work:
        work.put("hessians", KEY, tensors())
        path = entry(tmp_path)
        assert work.size([("hessians", KEY), ("costs", KEY)]) == path.stat().st_size
        path.unlink()
        path.symlink_to(target or path.name)
        assert work.size([("hessians", KEY)]) == 0
        assert work.get("hessians", KEY) is None
        work.put("hessians", KEY, tensors())
        assert work.get("hessians", KEY) is not None and not path.is_symlink()


@pytest.mark.parametrize("odd", ["work", "work/.lock", "work/hessians", "work/hessians "])
def test_places_where_nothing_can_be_kept(tmp_path: Path, odd: str) -> None:
    (tmp_path / odd).parent.mkdir(exist_ok=True)
    if odd == "work/.lock":
        (tmp_path / odd).mkdir()
    elif odd.endswith(" "):
        (tmp_path / odd.strip()).write_text("a file")
    else:
        (tmp_path / odd).symlink_to("nowhere")
    with pytest.raises(Error, match=r" (kept in|written to) .*/work.* another work folder with --work"):
        WorkFolder(tmp_path / "work").put("hessians", KEY, tensors())


def test_what_must_not_be_stored(tmp_path: Path) -> None:
    def refuse() -> None:
        raise Error("the source changed")

    with WorkFolder(tmp_path, refuse) as work, pytest.raises(Error, match="the source changed"):
        work.put("hessians", KEY, tensors())
    assert list((tmp_path / "hessians").iterdir()) == []


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with WorkFolder(tmp_path) as work:
        monkeypatch.setattr(out_folder.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**5))
        with pytest.raises(Error, match=r"1.0 MB are needed in .*, 100 kB are free"):
            work.put("hessians", KEY, tensors())
        assert work.get("hessians", KEY) is None
