"""Builds `halfturn._C` with ninja: one shared library, each instruction set in translation units of its own flags.

Where nvcc is found the CUDA backend is built in. HALFTURN_CUDA=0 leaves it out, HALFTURN_CUDA=1 refuses to build
without it. HALFTURN_CUDA_ARCHS names the architectures, as in "80;90"; by default that of this machine's card, or all
of DEFAULT_ARCHS. NVCC names the compiler.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent

# Files named *_avx2.cpp and *_avx512.cpp are compiled for that instruction set, and called after a check at run time.
ISA_FLAGS = {
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vbmi -mavx512vnni "
    "-mprefer-vector-width=512",
}
# Code for 8.0 also runs on 8.6 and 8.9 (RTX 30 and 40), and the PTX of the last one on whatever is newer.
DEFAULT_ARCHS = ("80", "90")
# Products of compute capability 9.0 in csrc/cuda/hopper: those instructions belong to this architecture alone.
HOPPER_TARGETS = "-gencode arch=compute_90a,code=sm_90a"
X86 = platform.machine().lower() in ("x86_64", "amd64")


def sources(cuda: bool) -> list[Path]:
    found = sorted([*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")])
    if ROOT / "csrc/bind.cpp" not in found:
        raise SystemExit(f"{ROOT} has no csrc/bind.cpp, so the engine can't be compiled: get the whole source tree")
    if not X86:
        found = [f for f in found if not f.stem.endswith(tuple(ISA_FLAGS))]
    without = ROOT / "csrc/cuda/no_cuda.cpp"
    if not cuda:
        return [*found, without]
    plain = [f for f in sorted(ROOT.glob("csrc/cuda/*.cpp")) if f != without]
    hopper = sorted(ROOT.glob("csrc/cuda/hopper/*.cu")) if "90" in cuda_archs() else []
    # The slowest files first, so that the build ends evenly.
    others = sorted(ROOT.glob("csrc/cuda/*.cu"))
    return [*sorted(ROOT.glob("csrc/cuda/instances/*.cu")), *hopper, *others, *plain, *found]


def find_nvcc() -> Path | None:
    """nvcc, unless HALFTURN_CUDA=0."""
    wanted = os.environ.get("HALFTURN_CUDA", "")
    if wanted == "0":
        return None
    found = os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if not found and wanted == "1":
        raise SystemExit("HALFTURN_CUDA=1, but nvcc is not on PATH: install CUDA's compiler, or set NVCC to it")
    return Path(found) if found else None


def cuda_root(nvcc: Path) -> Path:
    """The toolkit that nvcc belongs to, which may be called through a link or a script."""
    told = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    for line in told.splitlines():
        if line.startswith("#$ TOP="):
            return Path(line.removeprefix("#$ TOP=")).resolve()
    return nvcc.resolve().parent.parent


def cuda_archs() -> list[str]:
    given = os.environ.get("HALFTURN_CUDA_ARCHS")
    if given:
        archs = [arch.strip().replace(".", "") for arch in given.replace(",", ";").split(";") if arch.strip()]
        if not archs or not all(arch.isdigit() and int(arch) >= 80 for arch in archs):
            raise SystemExit(f"HALFTURN_CUDA_ARCHS is {given!r}: numbers from 80 on are expected, as in 80;90")
        return archs
    try:
        told = subprocess.run(
            ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=60,
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        told = ""
    cards = {line.strip().replace(".", "") for line in told.splitlines()}
    return sorted(card for card in cards if card.isdigit() and int(card) >= 80) or list(DEFAULT_ARCHS)


class NinjaBuild(build_ext):
    """Writes build.ninja and runs ninja, so that a second build compiles only what changed."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # An editable install gets a new build_temp each time; in the usual one it finds the objects of other builds.
        usual = ROOT / "build" / f"temp.{self.plat_name}-{sys.implementation.cache_tag}"
        folder = (usual if self.editable_mode else Path(self.build_temp).resolve()) / "ninja"
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        compiler = os.environ.get("CXX", "c++")
        includes = f"-I{ROOT / 'csrc'}"
        # Only bind.cpp sees Python: an isolated build has pybind11 in another folder each time.
        binding = f"-isystem {pybind11.get_include()} -isystem {sysconfig.get_path('include')}"
        flags = (
            "-O3 -g1 -std=c++20 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall -Wextra "
            "-Wno-unknown-pragmas -Wno-psabi -Wno-maybe-uninitialized -ffp-contract=fast"
        )
        # Symbols of static libraries stay inside: where libstdc++ is one, its locale must not meet another copy's.
        own_symbols = "-undefined dynamic_lookup" if sys.platform == "darwin" else "-Wl,--exclude-libs,ALL"
        lines = [
            f"cxx = {compiler}",
            f"flags = {flags} {includes} {os.environ.get('CXXFLAGS', '')}",
            "rule compile",
            "  command = $cxx -MMD -MF $out.d $flags $own -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = $in",
            "rule link",
            f"  command = $cxx -shared -pthread -o $out $in {own_symbols} $libraries {os.environ.get('LDFLAGS', '')}",
        ]
        nvcc, libraries = find_nvcc(), ""
        if nvcc:
            root, archs = cuda_root(nvcc), cuda_archs()
            targets = " ".join(f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in archs)
            targets += f" -gencode arch=compute_{archs[-1]},code=compute_{archs[-1]}"
            no_hopper = "" if "90" in archs else "-DHALFTURN_NO_HOPPER"
            headers = next(d for d in (root / "targets/x86_64-linux/include", root / "include") if d.is_dir())
            libraries = " ".join(f"-L{d}" for d in (root / "targets/x86_64-linux/lib", root / "lib64") if d.is_dir())
            libraries += " -lcudart_static -ldl -lrt"
            lines += [
                "rule compile_cuda",
                f"  command = {nvcc} -MD -MF $out.d -O3 -std=c++20 -ccbin $cxx -Xcompiler -fPIC,-fvisibility=hidden "
                f"$targets {no_hopper} {includes} -c $in -o $out",
                "  depfile = $out.d",
                "  deps = gcc",
                "  description = $in",
            ]
        objects = []
        for source in sources(nvcc is not None):
            built = folder / (source.relative_to(ROOT).as_posix().replace("/", "_") + ".o")
            objects.append(str(built))
            if source.suffix == ".cu":
                own = HOPPER_TARGETS if source.parent.name == "hopper" else targets
                lines += [f"build {built}: compile_cuda {source}", f"  targets = {own}"]
                continue
            own = next((f for name, f in ISA_FLAGS.items() if source.stem.endswith("_" + name)), "")
            if source.stem == "bind":
                own = binding
            if source.parent.name == "cuda" and nvcc:
                own = f"-isystem {headers}"
            lines += [f"build {built}: compile {source}", f"  own = {own}"]
        lines += [f"libraries = {libraries}"]
        lines += [f"build {target}: link {' '.join(objects)}", f"default {target}", ""]
        (folder / "build.ninja").write_text("\n".join(lines))
        subprocess.run([self.ninja(), "-C", str(folder), "--quiet"], check=True)

    @staticmethod
    def ninja() -> str:
        """The ninja of the build environment, or the one on PATH."""
        try:
            import ninja

            return str(Path(ninja.BIN_DIR) / "ninja")
        except ImportError:
            found = shutil.which("ninja")
            if not found:
                raise SystemExit("ninja is not installed: pip install ninja") from None
            return found


setup(ext_modules=[Extension("halfturn._C", sources=[])], cmdclass={"build_ext": NinjaBuild})
