"""The operations on arrays that are on the GPU already, CuPy's or torch's: nothing is copied, nothing waits.

Memory comes from the library of the first argument, and kernels run on its current stream. What comes out has
the arrays in `owner`: `q.codes.owner` is a CuPy array or a torch tensor. NaN and infinity are
quantized as hardware does; `refuse_non_finite(q)` waits for the GPU and raises if there were any.
"""

from functools import cache
from typing import Any

import numpy as np

from arcquant_ref import checks
from arcquant_ref.select import Selection

from . import launch
from .device import ITEMSIZE, Array, Cuda, CudaTorch
from .launch import PackedTensor


def quantize(x: Any, tensor_scale: Any = None) -> PackedTensor:
    """(M, K) float32, float16 or bfloat16 → packed codes and swizzled scales.

    `tensor_scale`: None, or a float32 array of one element on the GPU. Raises TypeError for something that
    is not a CuPy array or CUDA tensor, ValueError for one that is not contiguous or on another GPU.
    """
    return launch.quantize(_device(x), as_array("x", x), _scale(tensor_scale))


def dequantize(q: PackedTensor) -> Any:
    """(M, K) float32."""
    return launch.dequantize(_device(q.codes.owner), q).owner


def augment_activations(x: Any, order: Any, num_residual: int, tensor_scale: Any = None) -> PackedTensor:
    """(M, K) → (M, K + S); `order` is (K,) uint16, see `order_of`. Errors as in `quantize`."""
    held = as_array("x", x), as_array("order", order)
    return launch.augment_activations(_device(x), *held, num_residual, _scale(tensor_scale))


def rmsnorm_augment_activations(
    x: Any, weight: Any, epsilon: float, order: Any, num_residual: int, tensor_scale: Any
) -> PackedTensor:
    """RMSNorm and `augment_activations` in one pass; `weight` is (K,) float32. A row that leaves float32 gets
    codes of infinity or NaN."""
    held = as_array("x", x), as_array("weight", weight), np.float32(epsilon), as_array("order", order)
    scale = as_array("tensor_scale", tensor_scale)
    return launch.rmsnorm_augment_activations(_device(x), *held, num_residual, scale)[0]


def augment_weights(w: Any, order: Any, num_residual: int) -> PackedTensor:
    """(N, K) → (N, K + S)."""
    return launch.augment_weights(_device(w), as_array("w", w), as_array("order", order), num_residual)


def matmul(a: PackedTensor, b: PackedTensor, exact: bool = True) -> Any:
    """a bᵀ, (M, K) and (N, K) → (M, N) float32; `exact` as in `Face.matmul`."""
    return launch.matmul(_device(a.codes.owner), a, b, exact).owner


def order_of(selection: Selection, like: Any) -> Any:
    """The channel order of a selection on the GPU, (K,) uint16, in the library of `like`.

    Raises TypeError for another type, ValueError for a selection with weight channels.
    """
    checks.is_a("selection", selection, Selection, "select(calibrate([x])) makes one.")
    checks.no_weight_channels("gpu", len(selection.weight_channels))
    return _device(like).upload(selection.order.astype(np.uint16), "uint16").owner


def refuse_non_finite(q: PackedTensor) -> None:
    """Wait for the GPU; ValueError if what was quantized held NaN or infinity."""
    bits = _device(q.codes.owner).download(q.largest)
    if bits[0] >= np.float32(np.inf).view(np.uint32):
        raise ValueError(
            f"what was quantized to {q.shape} held {bits.view(np.float32)[0]}; NVFP4 has no such value."
        )


def as_array(name: str, x: Any) -> Array:
    """A CuPy array or torch tensor as an Array, without a copy."""
    if _is_torch(x):
        contiguous, address, index = x.is_contiguous(), x.data_ptr(), x.device.index
        dtype = str(x.dtype).removeprefix("torch.")
    elif hasattr(x, "__cuda_array_interface__"):
        contiguous, address, index = x.flags.c_contiguous, x.data.ptr, x.device.id
        dtype = x.dtype.name
    else:
        raise TypeError(
            f"{name} is a {type(x).__name__} that is not on a GPU; pass a CuPy array or a CUDA tensor."
        )
    if not contiguous:
        raise ValueError(
            f"{name} is not contiguous. Copy it first: {name}.contiguous() or cupy.ascontiguousarray."
        )
    if dtype not in ITEMSIZE:
        raise TypeError(f"{name} has dtype {dtype}; it must be one of {', '.join(ITEMSIZE)}.")
    current = _current_device()
    if index != current:
        raise ValueError(
            f"{name} is on GPU {index}, CuPy's current one is {current}: use cupy.cuda.Device({index})."
        )
    return Array(address, tuple(x.shape), dtype, x)


def _is_torch(x: Any) -> bool:
    return type(x).__module__.split(".")[0] == "torch" and getattr(x, "is_cuda", False)


def _scale(tensor_scale: Any) -> Array | None:
    return None if tensor_scale is None else as_array("tensor_scale", tensor_scale)


def _device(x: Any) -> Cuda:
    return _device_of(_is_torch(x), _current_device())


@cache
def _device_of(torch: bool, index: int) -> Cuda:
    return CudaTorch() if torch else Cuda()


def _current_device() -> int:
    import cupy

    return int(cupy.cuda.Device().id)
