"""CUDA source → machine code for one explicit architecture, with NVRTC and without a GPU; kept on disk."""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from arcquant_ref.formats import BLOCK, E2M1, E4M3

SOURCES = Path(__file__).parent / "cuda"
LEAST_CAPABILITY = (8, 0)  # mma.m16n8k16 and cp.async
# IEEE arithmetic: nothing is flushed to zero, nothing contracted
OPTIONS = ("-ftz=false", "-fmad=false", "-lineinfo", "-std=c++17", "--ptxas-options=-v")
INSTALL = 'pip install "arcquant-ref[gpu]"'


@dataclass(frozen=True)
class Compiled:
    """One source file for one architecture: `arch` is 80, 90a, 120a, …"""

    name: str
    arch: str
    ptx: str
    cubin: bytes
    log: str  # of NVRTC and ptxas: registers, shared memory, spills

    @property
    def kernels(self) -> dict[str, "Resources"]:
        """What each kernel takes, from the log. RuntimeError for a log without kernels that the PTX has: code
        from a cache of NVRTC's own, which a GPU's driver keeps, comes without one."""
        found = {}
        for part in re.split(r"ptxas info\s*: Compiling entry function '", self.log)[1:]:
            numbers = [
                re.search(rf"(\d+) {what}", part)
                for what in ("registers", "bytes smem", "bytes spill stores", "bytes stack frame")
            ]
            found[part.split("'")[0]] = Resources(*(int(n[1]) if n else 0 for n in numbers))
        if ".entry" in self.ptx and not found:
            raise RuntimeError(
                f"the log of {self.name}.cu for sm_{self.arch} says nothing of its kernels: NVRTC took them "
                f"from its own cache. Empty ~/.nv/ComputeCache and {_home()}, and compile again."
            )
        return found


@dataclass(frozen=True)
class Resources:
    """Of one kernel: registers a thread, static shared bytes a block, bytes that did not fit registers."""

    registers: int
    shared_bytes: int
    spilled_bytes: int
    stack_bytes: int


def is_native(arch: str) -> bool:
    """RTX Blackwell (compute capability 12.x) multiplies NVFP4 itself, with warp-level instructions."""
    return arch.startswith("12")


def arch_of(capability: tuple[int, int]) -> str:
    """The target for a compute capability, with the suffix `a` where only that has all instructions."""
    major, minor = capability
    return f"{major}{minor}" + ("a" if major >= 9 else "")


def compiled(name: str, arch: str) -> Compiled:
    """`gpu/cuda/{name}.cu` for `arch`: from the cache, else compiled and put there.

    The cache is a folder, ~/.cache/arcquant_gpu or the variable ARCQUANT_GPU_CACHE; without one that can be
    written every process compiles anew. Raises ImportError if NVRTC cannot be used, RuntimeError with
    NVRTC's log for a source that does not compile.
    """
    return _compiled(name, arch, os.environ.get("ARCQUANT_GPU_CACHE", ""), _sources())


@cache
def _compiled(name: str, arch: str, folder: str, sources: tuple[tuple[str, str], ...]) -> Compiled:
    return compile_text(name, dict(sources), arch, Path(folder) if folder else _home())


def compile_text(name: str, sources: dict[str, str], arch: str, folder: Path) -> Compiled:
    """`{name}.cu` of `sources`, {file name: text}, for `arch`; *.cuh among them are its headers. What is made
    is kept in `folder`. Errors as in `compiled`."""
    compiler, version = nvrtc()
    options = [f"-arch=sm_{arch}", *OPTIONS, *_defines(arch)]
    text = sources[f"{name}.cu"]
    headers = {file: body for file, body in sorted(sources.items()) if file.endswith(".cuh")}
    key = sha256(repr((name, text, headers, options, version)).encode()).hexdigest()[:32]
    kept = [folder / f"{name}.{arch}.{key}.{kind}" for kind in ("ptx", "cubin", "log")]
    with suppress(OSError):
        ptx, cubin, log = (path.read_bytes() for path in kept)
        return Compiled(name, arch, ptx.decode(), cubin, log.decode())
    bodies, files = [body.encode() for body in headers.values()], [file.encode() for file in headers]
    program = compiler.createProgram(text, f"{name}.cu", bodies, files)
    try:
        compiler.compileProgram(program, options)
        ptx_text = compiler.getPTX(program).decode()
        made = Compiled(
            name, arch, ptx_text, _whole(compiler.getCUBIN(program)), compiler.getProgramLog(program)
        )
    except compiler.NVRTCError as error:
        log_text = compiler.getProgramLog(program)
        raise RuntimeError(f"{name}.cu does not compile for sm_{arch}:\n{log_text}") from error
    finally:
        compiler.destroyProgram(program)
    for path, body in zip(kept, (made.ptx.encode(), made.cubin, made.log.encode())):
        with suppress(OSError):  # a cache that cannot be written is no error
            _write_whole(path, body)
    return made


def nvrtc() -> tuple[Any, tuple[int, int]]:
    """CuPy's door to NVRTC, and NVRTC's version. Raises ImportError with the reason if there is none."""
    try:
        from cupy.cuda import nvrtc as compiler
    except ImportError as error:
        raise ImportError(f"CuPy cannot be imported ({error}); {INSTALL} brings it") from error
    try:
        return compiler, compiler.getVersion()
    except Exception as error:  # CuPy looks for the library at the first call
        raise ImportError(
            f"NVRTC, the CUDA compiler, is missing ({_first_line(error)}); {INSTALL} brings it"
        ) from error


def why_not() -> str | None:
    """Why no GPU can be used here, in one sentence without a full stop, or None."""
    try:
        nvrtc()
    except ImportError as error:
        return str(error)
    import cupy

    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"no NVIDIA driver with a GPU answers ({_first_line(error)})"
    if count == 0:
        return "the NVIDIA driver finds no GPU"
    return too_old(_capability(cupy.cuda.Device()))


def too_old(capability: tuple[int, int]) -> str | None:
    if capability >= LEAST_CAPABILITY:
        return None
    (major, minor), (least, _) = capability, LEAST_CAPABILITY
    return f"the GPU has compute capability {major}.{minor}, and the kernels need {least}.0 (A100) or higher"


def current_arch() -> str:
    """Of CuPy's current device. Raises ImportError with the reason if it cannot be used."""
    reason = why_not()
    if reason:
        raise ImportError(f"no GPU can be used here: {reason}.")
    import cupy

    return arch_of(_capability(cupy.cuda.Device()))


def _capability(device: Any) -> tuple[int, int]:
    digits = device.compute_capability  # "90", "120"
    return int(digits[:-1]), int(digits[-1])


def _sources() -> tuple[tuple[str, str], ...]:
    return tuple((path.name, path.read_text()) for path in sorted(SOURCES.glob("*.cu*")))


def _defines(arch: str) -> Iterator[str]:
    yield f"-DBLOCK={BLOCK}"
    for fmt in (E2M1, E4M3):
        yield f"-D{fmt.name}_EXPONENT_BITS={fmt.exponent_bits}"
        yield f"-D{fmt.name}_MANTISSA_BITS={fmt.mantissa_bits}"
        yield f"-D{fmt.name}_NAN_CODES={fmt.nan_codes}"
    if is_native(arch):
        yield "-DNATIVE"


def _whole(cubin: bytes) -> bytes:
    """CuPy 14 drops the last byte of a cubin. An ELF file ends with its table of sections."""
    table, size, count = (
        int.from_bytes(cubin[at : at + width], "little") for at, width in ((40, 8), (58, 2), (60, 2))
    )
    programs, program_size, program_count = (
        int.from_bytes(cubin[at : at + width], "little") for at, width in ((32, 8), (54, 2), (56, 2))
    )
    end = max(table + size * count, programs + program_size * program_count)
    return cubin + b"\0" * max(0, end - len(cubin))


def _write_whole(path: Path, body: bytes) -> None:
    """The file appears at `path` with all its bytes or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(body)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _home() -> Path:
    return Path.home() / ".cache" / "arcquant_gpu"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
