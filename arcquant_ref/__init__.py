"""ARCQuant (arXiv 2601.07475) on NVFP4: the reference, in NumPy. Read formats.py first."""

from . import bounds, layout
from .augment import augment_activations, augment_weights, rmsnorm, rmsnorm_augment_activations
from .formats import decode_e2m1, decode_e4m3, encode_e2m1, encode_e4m3
from .gemm import linear, matmul
from .quantize import dequantize, quantize, quantize_weighted
from .select import Selection, calibrate, select, select_top
from .tensor import NVFP4Tensor

__all__ = [
    "NVFP4Tensor",
    "Selection",
    "augment_activations",
    "augment_weights",
    "bounds",
    "calibrate",
    "decode_e2m1",
    "decode_e4m3",
    "dequantize",
    "encode_e2m1",
    "encode_e4m3",
    "layout",
    "linear",
    "matmul",
    "quantize",
    "quantize_weighted",
    "rmsnorm",
    "rmsnorm_augment_activations",
    "select",
    "select_top",
]
__version__ = "0.4.0"
