"""How everything here is compiled, and how rows are shared among threads."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import config, njit, types
from numba.core import cgutils
from numba.extending import intrinsic


def _cache_folder() -> str:
    """A folder for compiled code, one for each state of the sources, because Numba watches only the file of a
    function and not what it calls. Empty if none can be written."""
    here, digest = Path(__file__).parent, sha256()
    for source in sorted([*here.glob("*.py"), *(here.parent / "arcquant_ref").glob("*.py")]):
        digest.update(source.read_bytes())
    chosen = config.CACHE_DIR or here / "__pycache__"  # type: ignore[attr-defined]
    for base in (chosen, Path.home() / ".cache" / "arcquant_emulator"):
        folder = Path(base) / digest.hexdigest()[:16]
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return str(folder)
    return ""


_CACHE = _cache_folder()

# IEEE arithmetic: without fastmath nothing is contracted, reassociated or flushed; x / 0 is ±inf or NaN.
helper = njit(error_model="numpy")  # inlined into kernels
instruction: Any = intrinsic  # what Python has no word for


def kernel(function: Callable) -> Callable:
    """Compile what is called from Python; the code is kept in `_CACHE`."""
    before = config.CACHE_DIR  # type: ignore[attr-defined]
    config.CACHE_DIR = _CACHE  # type: ignore[attr-defined]
    try:
        return njit(error_model="numpy", nogil=True, cache=bool(_CACHE))(function)
    finally:
        config.CACHE_DIR = before  # type: ignore[attr-defined]


@instruction
def fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a · b + c of float32, rounded once: IEEE 754 fusedMultiplyAdd, one instruction where the CPU has it."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), code


@instruction
def prefetch(typing: Any, row: Any, i: Any) -> Any:
    """Ask for the cache line of row[i], which will be read soon. A hint: it changes nothing but the time."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(row)(context, builder, arguments[0])
        pointer = cgutils.get_item_pointer(context, builder, row, array, arguments[1:])
        address, number = cgutils.voidptr_t, ir.IntType(32)
        function = ir.FunctionType(ir.VoidType(), [address, number, number, number])
        hint = builder.module.declare_intrinsic("llvm.prefetch", [address], function)
        read, keep, data = number(0), number(3), number(1)
        builder.call(hint, [builder.bitcast(pointer, address), read, keep, data])
        return context.get_dummy_value()

    return types.void(row, types.intp), code


def over_rows(task: Callable[[int, int], Any], rows: int) -> list[Any]:
    """What task(start, stop) returns for equal ranges of rows, one for each of NUMBA_NUM_THREADS threads.

    A row is computed by one task from the same inputs whatever the range, so the number of threads cannot
    change a bit.
    """
    threads = max(1, min(config.NUMBA_NUM_THREADS, rows))  # type: ignore[attr-defined]
    first, *others = pairwise(np.linspace(0, rows, threads + 1).astype(int).tolist())
    with ThreadPoolExecutor(threads) as pool:
        started = [pool.submit(task, *bounds) for bounds in others]
        return [task(*first), *(other.result() for other in started)]
