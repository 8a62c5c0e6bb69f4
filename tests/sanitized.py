"""Builds the programs of tests/cpp with sanitizers, by ninja: a second run compiles only what changed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from compiled import ROOT, isa_flags

BUILD = ROOT / "build" / "sanitized"
LOADER = [ROOT / "csrc" / f"{name}.cpp" for name in ("json", "checkpoint", "config", "model", "inspect")]
ENGINE = [
    *LOADER,
    *(ROOT / "csrc" / f"{name}.cpp" for name in ("engine", "pages", "rope", "sampler")),
    *sorted((ROOT / "csrc" / "cpu").glob("*.cpp")),
    ROOT / "csrc" / "cuda" / "no_cuda.cpp",
]
TESTS = ROOT / "tests" / "cpp"

# heap_files.cpp turns mapped files into heap blocks, so that a read behind a file's end is seen.
WRAP = "-Wl,--wrap=mmap,--wrap=munmap,--wrap=madvise"
FLAGS = (
    "-std=c++20 -g1 -O0 -fno-omit-frame-pointer -fno-sanitize-recover=all -D_GLIBCXX_ASSERTIONS -Wall -Wextra "
    f"-Wno-unknown-pragmas -Wno-psabi -ffp-contract=off -pthread -I{ROOT / 'csrc'}"
)
SANITIZERS = "-fsanitize=address,undefined"

# No block of 256 MiB for files of a few KiB: memory follows the file's size, not its claims.
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=1:max_allocation_size_mb=256:allocator_may_return_null=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


def build(name: str, sources: list[Path], *, compiler: str = "g++", sanitizers: str = SANITIZERS) -> Path:
    """The path of an up-to-date program of that name, built from `sources` and heap_files.cpp."""
    folder = BUILD / f"{Path(compiler).name}-{sanitizers.removeprefix('-fsanitize=').replace(',', '-')}"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        f"flags = {FLAGS} {sanitizers}",
        "rule compile",
        f"  command = {compiler} -MMD -MF $out.d $flags $isa -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler} $flags {WRAP} $in -o $out",
    ]
    objects = []
    for source in [*sources, TESTS / "heap_files.cpp"]:
        objects.append(source.relative_to(ROOT).as_posix().replace("/", "_") + ".o")
        # -O1 since some intrinsics take constants that only the optimizer finds
        isa = next((f"-O1 {flags}" for name, flags in isa_flags().items() if source.stem.endswith("_" + name)), "")
        lines += [f"build {objects[-1]}: compile {source}", f"  isa = {isa}"]
    lines += [f"build {name}: link {' '.join(objects)}", f"default {name}", ""]
    script = folder / f"{name}.ninja"
    script.write_text("\n".join(lines))
    done = subprocess.run([ninja(), "-C", str(folder), "-f", script.name], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} was not built:\n{done.stdout}{done.stderr}")
    return folder / name


def run(program: Path, *arguments: str | Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Runs it and fails with what a sanitizer said."""
    done = subprocess.run(
        [str(program), *map(str, arguments)],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout,
        env=os.environ | ENVIRONMENT,
    )
    assert done.returncode == 0, f"{program.name} ended with {done.returncode}\n{done.stderr[-6000:]}"
    return done


def ninja() -> str:
    found = shutil.which("ninja")
    if found:
        return found
    import ninja as package

    return str(Path(package.BIN_DIR) / "ninja")


def libfuzzer_is_missing(folder: Path) -> str:
    """Why there is no libFuzzer here, or nothing."""
    if not shutil.which("clang++"):
        return "clang++ is not installed, so there is no libFuzzer"
    probe = folder / "probe.cpp"
    probe.write_text(
        "#include <cstddef>\n#include <cstdint>\n"
        'extern "C" int LLVMFuzzerTestOneInput(const uint8_t*, size_t) { return 0; }\n'
    )
    command = ["clang++", "-fsanitize=fuzzer,address", str(probe), "-o", str(folder / "probe")]
    done = subprocess.run(command, capture_output=True, text=True)
    return "" if done.returncode == 0 else "clang++ comes without libFuzzer (Debian: libclang-rt-14-dev)"
