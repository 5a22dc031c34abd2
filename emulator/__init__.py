"""The emulator: a tensor core's bits on any CPU. The face of arcquant_ref in Numba, on float32 bits."""

from .augment import augment_activations, augment_weights, rmsnorm_augment_activations
from .baselines import four_over_six, int4, mxfp4, mxfp8
from .formats import decode_e2m1, decode_e4m3, encode_e2m1, encode_e4m3
from .gemm import matmul, matmul_fp16, matmul_fp16_split_k
from .quantize import dequantize, pack, quantize, quantize_weighted
from .tensor_core import mma_m16n8k16, mma_m16n8k64

__all__ = [
    "augment_activations",
    "augment_weights",
    "decode_e2m1",
    "decode_e4m3",
    "dequantize",
    "encode_e2m1",
    "encode_e4m3",
    "four_over_six",
    "int4",
    "matmul",
    "matmul_fp16",
    "matmul_fp16_split_k",
    "mma_m16n8k16",
    "mma_m16n8k64",
    "mxfp4",
    "mxfp8",
    "pack",
    "quantize",
    "quantize_weighted",
    "rmsnorm_augment_activations",
]
