"""Libraries for tests, of C++ and CUDA sources: compiled when needed, and kept by what they are made of.

Kernels of csrc/cuda are compiled for this machine's card, or to run on the CPU, thread by thread (tests/cpp/emulated).
"""

from __future__ import annotations

import ast
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EMULATOR = ROOT / "tests/cpp/emulated"
CARD = "-std=c++20 -O3 -Xcompiler -fPIC"
EMULATED = "-x c++ -std=c++20 -O1 -Xcompiler -fPIC,-ffp-contract=off,-w -DHALFTURN_NO_HOPPER"


def isa_flags() -> dict[str, str]:
    """The compiler's flags for each instruction set that has some: setup.py's, which can't be imported."""
    statements = ast.parse((ROOT / "setup.py").read_text()).body
    return next(ast.literal_eval(s.value) for s in statements if ast.unparse(s).startswith("ISA_FLAGS ="))


class Unavailable(Exception):
    """Why there is no library: no compiler, or no card."""


def library(
    name: str,
    command: list[str],
    sources: list[Path],
    link: list[str],
    *,
    depends: bytes = b"",
    targets: Callable[[Path], list[str]] = lambda source: [],
) -> Path:
    """The library that `link` makes of what `command` and a source's targets() make of each source, unless one of the
    same text is there; `depends`: what else it depends on."""
    text = " ".join([*command, *link, *(t for source in sources for t in targets(source))]).encode() + depends
    headers = [*ROOT.glob("csrc/**/*.h"), *ROOT.glob("csrc/**/*.cuh"), *ROOT.glob("csrc/**/*.inl")]
    for path in sorted({*sources, *headers, *EMULATOR.glob("**/*.*h")}):
        text += path.read_bytes()
    folder = Path(tempfile.gettempdir()) / f"halfturn-test-kernels-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    made = folder / f"{name}-{hashlib.sha256(text).hexdigest()[:16]}.so"
    if made.exists():
        return made
    with tempfile.TemporaryDirectory(dir=folder) as objects:

        def compiled(source: Path) -> str:
            to = str(Path(objects) / f"{source.stem}.{source.suffix[1:]}.o")
            subprocess.run([*command, *targets(source), "-c", str(source), "-o", to], check=True)
            return to

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            parts = list(pool.map(compiled, sources))
        whole = Path(objects) / made.name
        subprocess.run([*link, *parts, "-o", str(whole)], check=True)
        whole.replace(made)
    return made


def find_nvcc() -> str:
    found = os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if not found:
        raise Unavailable("there is no nvcc")
    return found


def card() -> bytes:
    """What tells this machine's cards from others; raises Unavailable where there is none."""
    listing = shutil.which("nvidia-smi")
    told = subprocess.run([listing, "-L"], capture_output=True, check=False).stdout if listing else b""
    if not told.startswith(b"GPU ") and not Path("/dev/nvidiactl").exists():
        raise Unavailable("there is no CUDA card")
    return told


def for_card(
    name: str, sources: list[Path], flags: str = "", targets: Callable[[Path], list[str]] | None = None
) -> Path:
    nvcc, cards = find_nvcc(), card()
    version = subprocess.run([nvcc, "--version"], capture_output=True, check=True).stdout
    command = [nvcc, *CARD.split(), *flags.split(), "-I", str(ROOT / "csrc")]
    return library(name, command, sources, [nvcc, "-shared", "-arch=native", "-cudart", "static"],
                   depends=version + cards, targets=targets or (lambda source: ["-arch=native"]))  # fmt: skip


def emulated(name: str, sources: list[Path]) -> Path:
    """Of the same sources; only nvcc knows where CUDA's headers are."""
    nvcc = find_nvcc()
    version = subprocess.run([nvcc, "--version"], capture_output=True, check=True).stdout
    command = [nvcc, *EMULATED.split(), "-I", str(EMULATOR), "-I", str(ROOT / "csrc"), "-include",
               str(EMULATOR / "emulator.h")]  # fmt: skip
    return library(name, command, [EMULATOR / "emulator.cpp", *sources], [nvcc, "-shared", "-cudart", "none"],
                   depends=version)  # fmt: skip
