"""The emulator: the hardware's bits on any CPU. The face of arcquant_ref in Numba, on float32 bits."""

from . import jit

jit.forget_stale_code()  # before the modules below look for theirs

from .augment import augment_activations, augment_weights  # noqa: E402
from .formats import decode_e2m1, decode_e4m3, encode_e2m1, encode_e4m3  # noqa: E402
from .gemm import matmul  # noqa: E402
from .quantize import dequantize, pack, quantize  # noqa: E402
from .tensor_core import mma_m16n8k16, mma_m16n8k64  # noqa: E402

__all__ = [
    "augment_activations",
    "augment_weights",
    "decode_e2m1",
    "decode_e4m3",
    "dequantize",
    "encode_e2m1",
    "encode_e4m3",
    "matmul",
    "mma_m16n8k16",
    "mma_m16n8k64",
    "pack",
    "quantize",
]
