"""What is handed out: the source archive, and the package as it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from importlib import resources
from pathlib import Path

import pytest

import halfturn

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("csrc", "engine", "server", "converter", "scripts", "tests")
SUFFIXES = (".py", ".sh", ".cpp", ".cu", ".cuh", ".h", ".inl", ".typed")


def setup(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "setup.py", "--quiet", *arguments]
    return subprocess.run(argv, cwd=folder, env={**os.environ, "HALFTURN_CUDA": "0"}, capture_output=True, text=True)


def test_the_source_archive_is_whole(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")  # as pyproject.toml asks
    made = setup(ROOT, "egg_info", "--egg-base", str(tmp_path), "sdist", "--dist-dir", str(tmp_path))
    assert made.returncode == 0, made.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    files = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*") if file.suffix in SUFFIXES]
    wanted = {"FORMAT.md", "LICENSE", "constraints.txt", "setup.py", *(f.relative_to(ROOT).as_posix() for f in files)}
    assert wanted <= held, wanted - held
    assert not [name for name in held if name.endswith((".so", ".pyc"))]
    assert [file.name for file in tmp_path.glob("*.tar.gz")] == [f"halfturn-{halfturn.__version__}.tar.gz"]


def test_a_tree_without_the_engine_s_sources_says_so(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    pytest.importorskip("pybind11")
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "engine").mkdir()
    shutil.copy(ROOT / "engine" / "__init__.py", tmp_path / "engine")
    built = setup(tmp_path, "build_ext", "--build-lib", "lib", "--build-temp", "temp")
    assert built.returncode == 1
    sentence = f"{tmp_path} has no csrc/bind.cpp, so the engine can't be compiled: get the whole source tree\n"
    assert built.stderr.endswith(sentence) and "Traceback" not in built.stderr


def test_the_package_runs_as_a_module_and_is_typed(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "halfturn", "--version"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("halfturn, version ")
    assert resources.files("halfturn").joinpath("py.typed").is_file()
