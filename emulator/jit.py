"""How everything here is compiled, and how rows are shared among threads."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numba import config, njit

# IEEE arithmetic: without fastmath nothing is contracted, reassociated or flushed; x / 0 is ±inf or NaN.
helper = njit(error_model="numpy")  # inlined into kernels
kernel = njit(error_model="numpy", nogil=True, cache=True)  # called from Python, kept on disk once compiled


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


def forget_stale_code() -> None:
    """Remove compiled code older than any source: Numba watches a function's own file, not what it calls."""
    here = Path(__file__).parent
    sources = [*here.glob("*.py"), *(here.parent / "arcquant_ref").glob("*.py")]
    newest = max(source.stat().st_mtime for source in sources)
    for index in (here / "__pycache__").glob("*.nbi"):
        if index.stat().st_mtime <= newest:
            index.unlink(missing_ok=True)
