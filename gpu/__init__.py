"""The face of arcquant_ref on NVIDIA GPUs: kernels of our own, compiled by NVRTC, launched through CuPy.

`gpu.quantize`, `gpu.matmul`, … take and give NumPy as in the other packages; for arrays that are on the GPU
already see `gpu.arrays`. Importing works anywhere; `gpu.why_not()` says in one sentence what is missing.
"""

from functools import cache
from typing import Any

from .face import Face
from .load import why_not

__all__ = ["Face", "why_not"]


@cache
def _face_of(device: int) -> Face:
    from .device import Cuda

    return Face(Cuda())


def __getattr__(name: str) -> Any:
    """The functions of `Face`, on CuPy's current GPU."""
    if name.startswith("_") or not hasattr(Face, name):
        raise AttributeError(f"module 'gpu' has no attribute {name!r}")
    reason = why_not()
    if reason:
        raise ImportError(f"gpu.{name} needs a GPU: {reason}.")
    import cupy

    return getattr(_face_of(cupy.cuda.Device().id), name)
