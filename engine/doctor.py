"""`halfturn doctor`: what this machine has, what is installed, and what would run."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import sys
from importlib import metadata, util
from typing import Any

from halfturn.command import CONVERT_MODULES
from halfturn.machine import memory

RUNTIME_PACKAGES = ("numpy", "tokenizers", "sentencepiece", "jinja2", "click", "rich", "fastapi", "uvicorn", "pydantic")
CUDA_LIBRARY = {"win32": "nvcuda.dll"}.get(sys.platform, "libcuda.so.1")

# cuDeviceGetAttribute's numbers, from cuda.h.
COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR = 75, 76


def examine() -> dict[str, Any]:
    """The facts as one dict; nothing is imported that would be slow to import."""
    cpu, cuda_problem, engine_error = _engine()
    gpus, gpu_note = cuda_devices()
    versions = {name: _version(name) for name in RUNTIME_PACKAGES}
    convert = {name: _version(name) for name in CONVERT_MODULES}
    problems = [f"{name} is not installed: pip install halfturn" for name, version in versions.items() if not version]
    if engine_error:
        problems.append(engine_error)
    return {
        "halfturn": _version("halfturn"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu,
        "threads": usable_cores(),
        "memory": memory(),
        "gpus": gpus,
        "gpu_note": gpu_note,
        "nvidia_smi": shutil.which("nvidia-smi"),
        "packages": versions,
        "convert_extra": convert,
        "can_convert": all(convert.values()),
        "cuda_problem": cuda_problem,
        "would_run": _verdict(cpu, gpus, cuda_problem),
        "problems": problems,
    }


def _engine() -> tuple[dict[str, Any], str, str | None]:
    """What the processor can run, why CUDA can't be used, and what is wrong with the engine."""
    try:
        from halfturn import _C
    except ImportError as error:
        return {}, "", f"the compiled engine can't be loaded ({error}): install halfturn again"
    return dict(_C.cpu_features()), _C.cuda_problem(), None


def _verdict(cpu: dict[str, Any], gpus: list[dict[str, Any]], cuda_problem: str) -> str:
    if not cpu:
        return "nothing: the compiled engine is missing"
    if not cuda_problem:
        return f"CUDA on {gpus[0]['name'] if gpus else 'the card'}, 8-bit activations"
    cards = f" (the GPU stays idle: {cuda_problem})" if gpus else ""
    return f"CPU, {cpu['isa']} kernels, 8-bit activations, {usable_cores()} threads{cards}"


def usable_cores() -> int:
    """Cores that this process may run on, which a container may have limited."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cuda_devices() -> tuple[list[dict[str, Any]], str]:
    """NVIDIA cards as the driver lists them, and a sentence on the driver. Needs only the driver's own library."""
    try:
        cuda = ctypes.CDLL(CUDA_LIBRARY)
    except OSError:
        return [], f"no NVIDIA driver ({CUDA_LIBRARY} not found)"
    failure = cuda.cuInit(0)
    if failure:
        return [], f"the NVIDIA driver is installed, but cuInit fails with code {failure}"
    version, count = ctypes.c_int(), ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    cuda.cuDeviceGetCount(ctypes.byref(count))
    devices = []
    for index in range(count.value):
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        name, size = ctypes.create_string_buffer(128), ctypes.c_size_t()
        cuda.cuDeviceGet(ctypes.byref(device), index)
        cuda.cuDeviceGetName(name, len(name), device)
        cuda.cuDeviceTotalMem_v2(ctypes.byref(size), device)
        cuda.cuDeviceGetAttribute(ctypes.byref(major), COMPUTE_CAPABILITY_MAJOR, device)
        cuda.cuDeviceGetAttribute(ctypes.byref(minor), COMPUTE_CAPABILITY_MINOR, device)
        devices.append(
            {
                "name": name.value.decode(errors="replace"),
                "memory_bytes": size.value,
                "compute_capability": f"{major.value}.{minor.value}",
            }
        )
    return devices, f"the NVIDIA driver supports CUDA {version.value // 1000}.{version.value % 1000 // 10}"


def _version(package: str) -> str | None:
    """The installed version, or None; a module that is found without its metadata counts as installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown" if util.find_spec(package) else None


def show(facts: dict[str, Any]) -> None:
    """Prints examine() on stdout."""
    from halfturn.console import megabytes

    cpu, sizes = facts["cpu"], facts["memory"]
    limit = f", limited to {megabytes(sizes['limit'])}" if sizes["limit"] else ""
    rows = [
        ("halfturn", f"{facts['halfturn']}, Python {facts['python']}, {facts['system']}"),
        ("CPU", cpu.get("model", "unknown")),
        ("kernels", f"{cpu.get('isa')} of {', '.join(cpu.get('available', []))}" if cpu else "none"),
        ("threads", str(facts["threads"])),
        ("memory", f"{megabytes(sizes['available'] or 0)} free of {megabytes(sizes['total'] or 0)}{limit}"),
        ("GPU driver", facts["gpu_note"]),
        *[
            ("GPU", f"{gpu['name']}, {megabytes(gpu['memory_bytes'])}, compute capability {gpu['compute_capability']}")
            for gpu in facts["gpus"]
        ],
        ("packages", ", ".join(f"{name} {version}" for name, version in facts["packages"].items())),
        (
            "converting",
            "possible: " + ", ".join(f"{name} {version}" for name, version in facts["convert_extra"].items())
            if facts["can_convert"]
            else "needs pip install 'halfturn[convert]', for "
            + ", ".join(name for name, version in facts["convert_extra"].items() if not version),
        ),
        ("would run", facts["would_run"]),
        *[("problem", problem) for problem in facts["problems"]],
    ]
    for label, text in rows:
        print(f"{label:<11} {text}")
