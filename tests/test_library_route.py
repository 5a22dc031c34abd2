"""Augmented operands are operands of the library call: packed codes and swizzled scales are byte for byte
what torchao makes of the same matrix, torch accepts their shapes, and they mean the same product.

No GPU and no kernel is needed: tests/test_gpu.py holds the kernels' bytes equal to arcquant_ref.layout. torch
2.13 does not multiply NVFP4 on a CPU, so the product is taken of the values that torchao decodes.
"""

import re
from math import prod
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from support import optional
from test_agreement import activations

import arcquant_ref
from arcquant_ref import NVFP4Tensor, gemm, layout, select_top
from arcquant_ref.formats import BLOCK, E2M1
from gpu.device import Array
from gpu.launch import PackedTensor

PAGE = Path(__file__).parent.parent / "docs/kernels.md"
# M, N, K, S: tiles of 128 rows and 4 scales that are full, one short, one over; S = 0 and S = K
SHAPES = [
    (1, 16, 16, 16),
    (3, 32, 48, 0),
    (127, 128, 64, 64),
    (128, 144, 272, 16),
    (129, 257, 1040, 48),
    (260, 384, 576, 64),
]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def operands(shape: tuple[int, int, int, int]) -> tuple[NVFP4Tensor, NVFP4Tensor]:
    """A layer with outlier channels, zero blocks and a negative zero, augmented."""
    m, n, k, s = shape
    rng = np.random.default_rng(prod(shape[:3]) + s)
    x, w = (rng.standard_normal((rows, k)) * np.exp2(rng.integers(-5, 6, k)) for rows in (m, n))
    x[m // 2, :BLOCK], w[n // 2, -BLOCK:], x[0, -1] = 0, 0, -0.0
    selection = select_top(np.abs(x).max(axis=0), s)
    return arcquant_ref.augment_activations(x, selection), arcquant_ref.augment_weights(w, selection)


def theirs(q: NVFP4Tensor, per_tensor_scale=None):
    """q's own bytes, as they would lie in a GPU's memory, taken for a tensor of torchao."""
    torch = optional("torch")
    nvfp4 = optional("torchao.prototype.mx_formats.nvfp4_tensor")
    rows, k = q.shape
    codes = torch.from_numpy(layout.pack(q.codes))
    scales = torch.from_numpy(layout.swizzle_128x4(q.block_scales)).view(torch.float8_e4m3fn)
    shape = nvfp4.hp_data_dims_to_swizzled_scale_dims_nvfp4(rows, k)
    return nvfp4.NVFP4Tensor(
        codes, scales.view(shape), BLOCK, torch.float32, per_tensor_scale, is_swizzled_scales=True
    )


@every_shape
def test_codes_are_packed_as_torchao_packs_them(shape):
    torch, kernels = optional("torch"), optional("torchao.prototype.mx_formats.kernels")
    for q in operands(shape):
        packed = layout.pack(q.codes)
        np.testing.assert_array_equal(packed, kernels.pack_uint4(torch.from_numpy(q.codes)).numpy())
        fp4 = torch.from_numpy(packed).view(torch.float4_e2m1fn_x2)
        assert (fp4.shape, fp4.is_contiguous()) == ((q.shape[0], q.shape[1] // 2), True)


def test_codes_mean_what_they_mean_to_torchao():
    torch, kernels = optional("torch"), optional("torchao.prototype.mx_formats.kernels")
    codes = np.arange(2**E2M1.bits, dtype=np.uint8)
    values = kernels.f4_unpacked_to_f32(torch.from_numpy(codes)).numpy()
    assert values.tobytes() == arcquant_ref.decode_e2m1(codes).tobytes()


@every_shape
def test_scales_are_swizzled_as_torchao_swizzles_them(shape):
    """Zeros where rows and columns are filled up included."""
    torch, utils = optional("torch"), optional("torchao.prototype.mx_formats.utils")
    for q in operands(shape):
        scales = torch.from_numpy(q.block_scales).view(torch.float8_e4m3fn)
        blocked = utils.to_blocked(scales).view(torch.uint8).numpy()
        np.testing.assert_array_equal(layout.swizzle_128x4(q.block_scales), blocked)


@given(layer=activations())
def test_any_layer_is_what_torchao_reads(layer):
    """Ties, floored and saturated scales: decoded by torchao from our bytes, each value is ours."""
    torch = optional("torch")
    q = arcquant_ref.augment_activations(*layer)
    got = theirs(q, torch.tensor(1.0)).dequantize(torch.float32).numpy()
    one = NVFP4Tensor(codes=q.codes, block_scales=q.block_scales, tensor_scale=np.float32(1))
    assert got.tobytes() == arcquant_ref.dequantize(one).tobytes()


@every_shape
def test_the_product_of_what_torchao_reads_is_ours(shape):
    """A number e2m1 · e4m3 is a multiple of 2^-10 and exact in float32; sums of products are multiples of
    2^-20, so exact in float64 in any order while below 2^33. With tensor scales torchao rounds
    scale · tensor_scale and then the value, each by 2^-24 of it at most: four roundings in a product of two,
    one in ours, and K' · 2^-53 in the float64 sum. That is less than 6 · 2^-24 · Σ |a||b|."""
    torch = optional("torch")
    a, b = operands(shape)
    left, right = (theirs(q).dequantize(torch.float32).to(torch.float64).numpy() for q in (a, b))
    assert (np.abs(left) @ np.abs(right).T).max() < 2.0**33
    np.testing.assert_array_equal(left @ right.T, gemm.integer_matmul(a, b) * 2.0**-20)

    left, right = (
        theirs(q, torch.tensor(q.tensor_scale)).dequantize(torch.float32).to(torch.float64).numpy()
        for q in (a, b)
    )
    bound = 6 * 2.0**-24 * (np.abs(left) @ np.abs(right).T)
    assert (np.abs(left @ right.T - arcquant_ref.matmul(a, b)) <= bound).all()


def library_matmul():
    """The function that docs/kernels.md shows."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (block,) = (text for text in blocks if "def library_matmul" in text)
    names: dict = {}
    exec(block, names)
    return names["library_matmul"]


def on_no_device(q: NVFP4Tensor, less: int = 0) -> PackedTensor:
    """Shapes and types of the operand as gpu.arrays makes it, on torch's device `meta`: without memory."""
    torch = optional("torch")

    def held(shape, dtype):
        return Array(0, shape, dtype, torch.empty(shape, dtype=getattr(torch, dtype), device="meta"))

    rows, k = q.shape
    return PackedTensor(
        codes=held((rows, k // 2), "uint8"),
        scales=held((layout.swizzle_128x4(q.block_scales).size - less,), "uint8"),
        tensor_scale=held((1,), "float32"),
        largest=held((1,), "uint32"),
        shape=(rows, k),
    )


@pytest.mark.parametrize("shape", [(1, 16, 16, 16), (127, 128, 64, 64), (129, 272, 992, 64)], ids=str)
def test_torch_accepts_their_shapes(shape):
    optional("torch")
    a, b = (on_no_device(q) for q in operands(shape))
    y = library_matmul()(a, b)
    assert tuple(y.shape) == shape[:2]
    assert str(y.dtype) == "torch.float32"


def test_what_torch_does_not_accept():
    """K' must be a multiple of 32 and N of 16 for it; scales must be whole tiles."""
    optional("torch")
    call = library_matmul()
    for shape in ((3, 16, 64, 16), (3, 17, 64, 0)):
        with pytest.raises(RuntimeError, match="divisible by 16"):
            call(*(on_no_device(q) for q in operands(shape)))
    a, b = operands((3, 16, 64, 0))
    with pytest.raises(RuntimeError, match="scale_a should have 512 elements, got 511"):
        call(on_no_device(a, less=1), on_no_device(b))


def test_no_cpu_multiplies_them():
    """If this fails, compare the products here with torch's own."""
    torch = optional("torch")
    codes = torch.zeros((16, 16), dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    scales = torch.zeros(512, dtype=torch.uint8).view(torch.float8_e4m3fn)
    with pytest.raises((ValueError, RuntimeError)):
        torch._scaled_mm(codes, codes.t(), scales, scales, out_dtype=torch.float32)
