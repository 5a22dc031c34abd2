"""What a result depends on: the GPU as it was found, versions, the state of the sources. And its file."""

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from arcquant_ref.tensor import written_whole

from . import load
from .device import Device

QUERY = (
    "name,compute_cap,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,"
    "temperature.gpu,ecc.mode.current"
)
PACKAGES = ("numpy", "numba", "cupy-cuda13x", "cupy-cuda12x", "torch", "ml_dtypes")


def machine(device: Device) -> dict[str, Any]:
    """Names and versions, as text; None for what does not answer."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": type(device).__name__,
        "arch": device.arch,
        "gpu": _gpu() if type(device).__name__.startswith("Cuda") else None,
        "nvrtc": ".".join(map(str, load.nvrtc()[1])),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "processor": _processor(),
        "cores": os.cpu_count(),
        "commit": _commit(),
    }


def save(path: Path, record: dict[str, Any]) -> None:
    """One JSON file, whole or not at all."""
    with written_whole(path) as file:
        file.write((json.dumps(record, indent=1) + "\n").encode())


def _gpu() -> dict[str, Any]:
    """Of CuPy's current device; clocks and the rest as nvidia-smi finds them at this moment."""
    import cupy

    index = cupy.cuda.Device().id
    properties = cupy.cuda.runtime.getDeviceProperties(index)
    bus = cupy.cuda.runtime.deviceGetPCIBusId(index)
    found = {
        "name": properties["name"].decode(),
        "compute_capability": f"{properties['major']}.{properties['minor']}",
        "multiprocessors": properties["multiProcessorCount"],
        "memory_bytes": properties["totalGlobalMem"],
        "l2_bytes": properties["l2CacheSize"],
        "cuda_driver": cupy.cuda.runtime.driverGetVersion(),
        "cuda_runtime": cupy.cuda.runtime.runtimeGetVersion(),
    }
    answer = _output("nvidia-smi", "-i", bus, f"--query-gpu={QUERY}", "--format=csv,noheader")
    return found | {"nvidia_smi": answer and dict(zip(QUERY.split(","), answer.split(", ")))}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Of the sources that run, with + where they differ from it. ARCQUANT_COMMIT tells it of a bare copy."""
    if "ARCQUANT_COMMIT" in os.environ:
        return os.environ["ARCQUANT_COMMIT"]
    here = Path(__file__).parent
    commit = _output("git", "-C", str(here), "rev-parse", "HEAD")
    changed = _output("git", "-C", str(here), "status", "--porcelain", "--untracked-files=no")
    return commit and commit + ("+" if changed else "")


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
