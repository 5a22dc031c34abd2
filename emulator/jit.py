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
from numba import config, njit


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


def kernel(function: Callable) -> Callable:
    """Compile what is called from Python; the code is kept in `_CACHE`."""
    before = config.CACHE_DIR  # type: ignore[attr-defined]
    config.CACHE_DIR = _CACHE  # type: ignore[attr-defined]
    try:
        return njit(error_model="numpy", nogil=True, cache=bool(_CACHE))(function)
    finally:
        config.CACHE_DIR = before  # type: ignore[attr-defined]


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
