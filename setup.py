"""Builds `halfturn._C` with ninja: one shared library, each instruction set in translation units of its own flags."""

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
X86 = platform.machine().lower() in ("x86_64", "amd64")


def sources() -> list[Path]:
    found = sorted([*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")])
    return found if X86 else [f for f in found if not f.stem.endswith(tuple(ISA_FLAGS))]


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
        macos = "-undefined dynamic_lookup" if sys.platform == "darwin" else ""
        lines = [
            f"cxx = {compiler}",
            f"flags = {flags} {includes} {os.environ.get('CXXFLAGS', '')}",
            "rule compile",
            "  command = $cxx -MMD -MF $out.d $flags $own -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = $in",
            "rule link",
            f"  command = $cxx -shared -pthread -o $out $in {macos} {os.environ.get('LDFLAGS', '')}",
        ]
        objects = []
        for source in sources():
            built = folder / (source.relative_to(ROOT).as_posix().replace("/", "_") + ".o")
            isa = next((f for name, f in ISA_FLAGS.items() if source.stem.endswith("_" + name)), "")
            lines += [f"build {built}: compile {source}", f"  own = {binding if source.stem == 'bind' else isa}"]
            objects.append(str(built))
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
