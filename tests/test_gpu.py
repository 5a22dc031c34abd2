"""The whole face of gpu on its own PTX, interpreted, for a GPU with and one without the NVFP4 instruction;
and on the GPU itself where there is one. Bytes equal those of reference and emulator."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import matrices, tensor_scales
from support import REQUIRED, assert_same_tensor, cuda_compiler, neighbours, optional
from test_agreement import activations
from test_emulator_gemm import SCALES, cancelling_pair, lone_pair, tensor_with_scales

import arcquant_ref
import emulator
import gpu
from arcquant_ref import NVFP4Tensor, Selection, layout, select_top
from arcquant_ref.formats import BLOCK, E2M1, E4M3
from arcquant_ref.quantize import exact_values
from emulator.formats import bits_of, f32, float_of, nearest_e2m1, nearest_e4m3, u32
from emulator.jit import fma, kernel, over_rows
from gpu import arrays, launch
from gpu.device import WORDS, Array, Cuda, Interpreted
from gpu.face import Face
from gpu.verify import adds_as_hopper, fast_product

cuda_compiler()
DEVICES = ["interpreted sm_80", "interpreted sm_90a", "interpreted sm_120a"]
if gpu.why_not() is None or "gpu" in REQUIRED:
    DEVICES.append("cuda")
on_every_device = pytest.mark.parametrize("face", DEVICES, indirect=True)
some = settings(max_examples=max(10, settings().max_examples // 4))
few = settings(max_examples=max(5, settings().max_examples // 10))


@pytest.fixture(scope="module")
def face(request) -> Face:
    if request.param == "cuda":
        return Face(Cuda())  # raises, with the reason, where ARCQUANT_REQUIRE=gpu asks for a GPU in vain
    return Face(Interpreted(request.param.removeprefix("interpreted sm_")))


def assert_fast_product(face: Face, a: NVFP4Tensor, b: NVFP4Tensor) -> None:
    """Of every kernel that multiplies so many rows."""
    if not adds_as_hopper(face.device):
        pytest.skip(f"how sm_{face.device.arch} adds fp16 products is not modelled")
    (m, k), packed = a.shape, (face.pack(a), face.pack(b))
    for plan in launch.products(face.device.arch, m, k, exact=False):
        y = face.device.download(launch.multiply(face.device, plan, *packed))
        assert_same_bits(y, fast_product(a, b, m))


def assert_same_bits(got: np.ndarray, expected: np.ndarray) -> None:
    different = np.argwhere(got.view(np.uint32) != expected.view(np.uint32))
    if len(different):
        i = tuple(different[0])
        pytest.fail(
            f"{len(different)} of {got.size} differ, first at {i}: got {got.view(np.uint32)[i]:#010x}, "
            f"expected {expected.view(np.uint32)[i]:#010x}"
        )


@on_every_device
@pytest.mark.parametrize("name", ["e2m1", "e4m3"])
def test_every_bf16_and_fp16_and_what_lies_beside_a_boundary(face, name):
    fmt = {"e2m1": E2M1, "e4m3": E4M3}[name]
    ours, theirs = getattr(face, f"encode_{name}"), getattr(emulator, f"encode_{name}")
    bits = np.arange(2**16, dtype=np.uint16)
    boundaries = neighbours(np.concatenate([fmt.midpoints, -fmt.midpoints, np.float32([0, -0.0, fmt.max])]))
    nans = np.uint32([0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF]).view(np.float32)
    float64 = np.float64([[1e39, -0.1]])
    for x in (bits.view(ml_dtypes.bfloat16), bits.view(np.float16), boundaries, nans, float64):
        np.testing.assert_array_equal(ours(x), theirs(x))


@on_every_device
def test_every_code_decodes(face):
    codes = np.arange(256, dtype=np.uint8)
    assert_same_bits(face.decode_e4m3(codes), emulator.decode_e4m3(codes))
    assert_same_bits(face.decode_e2m1(codes[:16]), emulator.decode_e2m1(codes[:16]))


@on_every_device
@some
@given(layer=activations(), tensor_scale=tensor_scales)
@example((np.zeros((1, 16), np.float32), select_top(np.zeros(16, np.float32), 16)), None)
@example((np.full((3, 16), -2688 * 3, np.float32), select_top(np.ones(16, np.float32), 16)), 1.0)
@example((np.ones((130, 80), np.float32), select_top(np.ones(80, np.float32), 0)), None)
@example((np.ones((2, 80), np.float32), select_top(np.ones(80, np.float32), 80)), None)
def test_same_bytes(face, layer, tensor_scale):
    x, selection = layer
    for function, *arguments in [
        ("quantize", x, tensor_scale),
        ("augment_activations", x, selection, tensor_scale),
        ("augment_weights", x, selection),
    ]:
        q = getattr(face, function)(*arguments)
        assert_same_tensor(q, getattr(arcquant_ref, function)(*arguments))
        assert_same_bits(face.dequantize(q), emulator.dequantize(q))


@on_every_device
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
@few
@given(layer=activations(), tensor_scale=tensor_scales)
def test_same_bytes_from_other_dtypes(face, dtype, layer, tensor_scale):
    x, selection = layer
    with np.errstate(all="ignore"):
        x = x.astype(dtype)
    x[~np.isfinite(x.astype(np.float64))] = 1
    for function, *arguments in [
        ("quantize", x, tensor_scale),
        ("augment_activations", x, selection, tensor_scale),
        ("augment_weights", x, selection),
    ]:
        assert_same_tensor(getattr(face, function)(*arguments), getattr(arcquant_ref, function)(*arguments))


@on_every_device
@pytest.mark.parametrize(("rows", "k", "s"), [(launch.MANY_ROWS + 3, 48, 16), (launch.MANY_ROWS, 544, 32)])
def test_same_bytes_where_a_row_has_a_thread_block(face, rows, k, s):
    rng = np.random.default_rng(rows)
    x = (rng.standard_normal((rows, k)) * np.exp2(rng.integers(-6, 6, k))).astype(np.float32)
    selection = select_top(np.abs(x).max(axis=0), s)
    for function in ("augment_activations", "augment_weights"):
        assert_same_tensor(getattr(face, function)(x, selection), getattr(emulator, function)(x, selection))


def residuals_on_ties(tensor_scale: np.float32) -> np.ndarray:
    """Blocks whose residuals, exactly, lie within an ulp of a midpoint of their own scale: the direction in
    which one of them is rounded decides its code."""
    rows = []
    for scale, second in ((1.625, 0.28125), (1.25, 0.203125), (1.875, 0.3125), (1.0, 0.171875)):
        x = [code * scale + midpoint * second for code in (0, 2, 4, 6) for midpoint in E2M1.midpoints]
        near = neighbours((np.float64(x) * np.float64(tensor_scale)).astype(np.float32))
        near = np.append(near, np.zeros(-len(near) % 14, np.float32)).reshape(-1, 14)
        sets = np.float32([6 * scale, 4 * scale + 5.9 * second]) * tensor_scale  # both scales
        rows.append(np.hstack([np.tile(sets, (len(near), 1)), near]))
    return np.vstack(rows)


@on_every_device
def test_a_residual_is_rounded_to_nearest(face):
    everything, told_apart = select_top(np.ones(BLOCK, np.float32), BLOCK), 0
    for tensor_scale in np.random.default_rng(0).uniform(1, 2, 40).astype(np.float32):
        x = residuals_on_ties(tensor_scale)
        expected = arcquant_ref.augment_activations(x, everything, tensor_scale)
        assert_same_tensor(face.augment_activations(x, everything, tensor_scale), expected)
        r = x - exact_values(arcquant_ref.quantize(x[:, everything.order], tensor_scale))
        cut = np.where(np.abs(r.astype(np.float32)) > np.abs(r), np.nextafter(r.astype(np.float32), 0), r)
        other = arcquant_ref.quantize(cut.astype(np.float32), tensor_scale)
        told_apart += int((other.codes != expected.codes[:, BLOCK:]).sum())
    assert told_apart > 10  # codes that a residual rounded toward zero would get


def _decided_differently(nearest):
    @kernel
    def tried_and_different(first: int, last: int, midpoints: np.ndarray) -> tuple[int, int]:
        tried, different = 0, 0
        for significand in range(first, last):
            step = f32(significand) * f32(2.0**-23)
            reciprocal, before = bits_of(f32(f32(1) / step)), f32(0)
            for ulps in range(-2, 3):
                guess = float_of(u32(reciprocal + ulps))
                high = fma(guess, fma(-step, guess, f32(1)), guess)
                if high == before:
                    continue
                before, e = high, fma(-step, high, f32(1))
                low = f32(high * fma(e, f32(e * f32(1.125)), e))
                for midpoint in midpoints:
                    middle = bits_of(f32(midpoint * step))
                    for away in range(-4, 5):
                        x = float_of(u32(middle + away))
                        q = fma(x, high, f32(x * low))
                        tried += 1
                        different += nearest(bits_of(q)) != nearest(bits_of(f32(x / step)))
        return tried, different

    return tried_and_different


@pytest.mark.parametrize(
    ("nearest", "midpoints"), [(nearest_e2m1, E2M1.midpoints), (nearest_e4m3, E4M3.midpoints[:16])]
)
def test_the_short_division_decides_every_code_alike(nearest, midpoints):
    """gpu/cuda/blocks.cuh, quotient_of: every significand of a step, every guess of its reciprocal that is at
    most two floats from the rounded one, every x around each midpoint times the step.
    Further away the quotients, less than an ulp apart, lie on the same side of the midpoint. Of E4M3 the
    subnormal codes and one binade; the others are the same, times a power of two."""
    count = _decided_differently(nearest)
    found = over_rows(lambda i, j: count(2**23 + i, 2**23 + j, midpoints), 2**23)
    tried, different = np.sum(found, axis=0)
    assert tried >= 2**23 * len(midpoints) * 9
    assert different == 0


@on_every_device
@pytest.mark.parametrize("significand", [16777213, 16777214, 16777215, 9437183, 10485759, 13631487, 15728637])
def test_a_guess_of_a_reciprocal_is_corrected(face, significand):
    """Steps whose reciprocal, an ulp off, would make another code of a number beside a midpoint."""
    step = np.float32(significand * 2.0**-23)
    near = neighbours(np.concatenate([E2M1.midpoints, E4M3.midpoints[:16]]) * step)
    x = np.zeros((len(near), BLOCK), np.float32)
    x[:, 0], x[:, 1] = E2M1.max * step, near
    assert_same_tensor(face.quantize(x, step), arcquant_ref.quantize(x, step))


def test_the_short_division_by_6_is_the_division():
    """Every significand."""

    @kernel
    def different(first: int, last: int) -> int:
        count = 0
        for significand in range(first, last):
            a, sixth = f32(significand), f32(f32(1) / f32(6))
            count += fma(a, sixth, f32(a * f32(1 / 6 - sixth))) != f32(a / f32(6))
        return count

    assert np.sum(over_rows(lambda i, j: different(2**23 + i, 2**23 + j), 2**23)) == 0


weights_of_a_norm = st.sampled_from(["ones", "gaussian", "wide"])


@st.composite
def norms(draw):
    """A layer and the weight of its RMSNorm; x so far below float32's limit that nothing overflows."""
    x, selection = draw(activations())
    repeated = draw(st.sampled_from([1, 1, 1, 17]))  # K beyond the 256 lanes
    x = np.tile(x, repeated)
    order = (selection.order[:, None] + selection.K * np.arange(repeated)).T.reshape(-1)
    selection = Selection(
        order=order, num_residual=selection.num_residual, channel_amax=np.abs(x).max(axis=0)
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    weight = {
        "ones": np.ones(len(order)),
        "gaussian": rng.standard_normal(len(order)),
        "wide": rng.standard_normal(len(order)) * np.exp2(rng.integers(-40, 40, len(order))),
    }[draw(weights_of_a_norm)]
    return np.clip(x, -1e15, 1e15), weight.astype(np.float32), selection


@on_every_device
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@few
@given(
    layer=norms(),
    epsilon=st.sampled_from([1e-5, 1e-6, 1.0]),
    tensor_scale=st.sampled_from([1.0, 0.0007, 1 / 3]),
)
def test_rmsnorm_gives_the_same_bytes(face, dtype, layer, epsilon, tensor_scale):
    x, weight, selection = layer
    x = np.clip(x, -6e4, 6e4).astype(dtype) if dtype == np.float16 else x.astype(dtype)
    arguments = x, weight, epsilon, selection, tensor_scale
    expected = arcquant_ref.rmsnorm_augment_activations(*arguments)
    assert_same_tensor(emulator.rmsnorm_augment_activations(*arguments), expected)
    assert_same_tensor(face.rmsnorm_augment_activations(*arguments), expected)


def packed_and_swizzled(face: Face, q: launch.PackedTensor) -> tuple[np.ndarray, np.ndarray]:
    return face.device.download(q.codes), face.device.download(q.scales)


@on_every_device
@few
@given(layer=activations(), more_rows=st.sampled_from([0, 0, 127]))
def test_bytes_in_memory_are_those_of_the_layout(face, layer, more_rows):
    """Packed pairs, swizzled scales, and zeros where rows and columns are filled up, from every kernel."""
    x, selection = layer
    x = np.concatenate([x, np.zeros((more_rows, x.shape[1]), np.float32)])
    device, order = face.device, selection.order.astype(np.uint16)
    held, order = device.upload(x, "float32"), device.upload(order, "uint16")
    weight = np.ones(selection.K, np.float32)
    scale = device.upload(np.float32([1]), "float32")
    norm = launch.rmsnorm_augment_activations(
        device, held, device.upload(weight, "float32"), np.float32(1), order, selection.num_residual, scale
    )[0]
    quantized = arcquant_ref.quantize(x)
    for q, expected in [
        (launch.quantize(device, held), quantized),
        (face.pack(quantized), quantized),
        (
            launch.augment_activations(device, held, order, selection.num_residual),
            arcquant_ref.augment_activations(x, selection),
        ),
        (
            launch.augment_weights(device, held, order, selection.num_residual),
            arcquant_ref.augment_weights(x, selection),
        ),
        (norm, face.unpack(norm)),
    ]:
        codes, scales = packed_and_swizzled(face, q)
        np.testing.assert_array_equal(codes, layout.pack(expected.codes))
        np.testing.assert_array_equal(scales, layout.swizzle_128x4(expected.block_scales))


sizes = st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 20))


@on_every_device
@pytest.mark.parametrize("kind", SCALES)
@few
@given(size=sizes, seed=st.integers(0, 2**32 - 1))
def test_exact_product_is_the_one_of_blackwell(face, kind, size, seed):
    (m, n, blocks), rng = size, np.random.default_rng(seed)
    a, b = (tensor_with_scales(kind, rng, (rows, blocks * BLOCK)) for rows in (m, n))
    assert_same_bits(face.matmul(a, b), emulator.matmul(a, b))


@on_every_device
@pytest.mark.parametrize("pair", [cancelling_pair, lone_pair])
@few
@given(m=st.integers(1, 40), n=st.integers(1, 3), steps=st.integers(2, 6), seed=st.integers(0, 2**32 - 1))
def test_exact_product_where_one_bit_decides(face, pair, m, n, steps, seed):
    a, b = pair(np.random.default_rng(seed), m, n, steps)
    assert_same_bits(face.matmul(a, b), emulator.matmul(a, b))


@on_every_device
@pytest.mark.parametrize("shape", [(129, 1616), (128, 8208), (3, 4112)])
def test_blocks_of_a_row_are_shared_out_among_warps_and_thread_blocks(face, shape):
    """Of many rows each has a thread block, whose warps come round again, and again; of few, several."""
    rng = np.random.default_rng(0)
    x, s = rng.standard_normal(shape).astype(np.float16), 48
    selection = select_top(rng.random(shape[1]).astype(np.float32), s)
    for name, *arguments in (
        ("augment_activations", x, selection, np.float32(0.001)),
        ("augment_weights", x, selection),
        ("rmsnorm_augment_activations", x, np.ones(shape[1]), 0.0, selection, np.float32(0.001)),
    ):
        assert_same_tensor(getattr(face, name)(*arguments), getattr(arcquant_ref, name)(*arguments))


@on_every_device
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("shape", [(130, 259, 80), (128, 128, 64), (1, 257, 48), (257, 2, 16)])
def test_products_across_tiles(face, shape, exact):
    m, n, k = shape
    rng = np.random.default_rng(m)
    x, w = (rng.standard_normal((rows, k)) * np.exp2(rng.integers(-6, 6, k)) for rows in (m, n))
    a, b = arcquant_ref.quantize(x), arcquant_ref.quantize(w)
    if exact:
        assert_same_bits(face.matmul(a, b), emulator.matmul(a, b))
    else:
        assert_fast_product(face, a, b)


@on_every_device
@pytest.mark.parametrize("kind", SCALES)
@few
@given(size=sizes, seed=st.integers(0, 2**32 - 1))
def test_fp16_product_is_the_one_of_hopper(face, kind, size, seed):
    """m is shifted so that half the examples are more than the small kernel takes."""
    (m, n, blocks), rng = size, np.random.default_rng(seed)
    a, b = (tensor_with_scales(kind, rng, (rows, blocks * BLOCK)) for rows in (m, n))
    assert_fast_product(face, a, b)


@on_every_device
@pytest.mark.parametrize("m", [1, 8, 9, 16])
@few
@given(n=st.integers(1, 140), blocks=st.integers(1, 140), seed=st.integers(0, 2**32 - 1))
def test_few_rows(face, m, n, blocks, seed):
    """K up to 2240: every warp has pieces of K, or some have none."""
    rng = np.random.default_rng(seed)
    a, b = (tensor_with_scales("spread", rng, (rows, blocks * BLOCK)) for rows in (m, n))
    assert_fast_product(face, a, b)


@on_every_device
@pytest.mark.parametrize("m", [5, 12])
@few
@given(n=st.integers(1, 270), blocks=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
def test_few_rows_of_thread_blocks_that_stay(face, m, n, blocks, seed):
    """Three of them for up to twelve tiles of columns; K up to 640, so that some warps have nothing to do."""
    rng = np.random.default_rng(seed)
    a, b = (tensor_with_scales("spread", rng, (rows, blocks * BLOCK)) for rows in (m, n))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "AT_ONCE", 3)
        assert_fast_product(face, a, b)


@on_every_device
def test_a_subnormal_number_has_the_exponent_of_the_least_normal_one(face):
    """2688 · 2^-10 + 2^-10 · 2^-10: with exponents 11 + 0 the second product is below 2^(11 − 25) and is cut
    off; with 11 − 10, as in the product of many rows, where no number is subnormal, it is kept."""
    codes, scales = np.zeros((2, 1, 32), np.uint8), np.array([[[0x7E, 1]], [[1, 1]]], np.uint8)
    codes[0, 0, 0], codes[1, 0, 0], codes[:, 0, 16] = 7, 1, 1  # 6, and ½ three times
    a, b = (NVFP4Tensor(codes=c, block_scales=s, tensor_scale=1.0) for c, s in zip(codes, scales))
    assert emulator.matmul_fp16_split_k(a, b) == 2.625
    assert emulator.matmul_fp16(a, b) == 2.625 + 2.0**-20
    assert_fast_product(face, a, b)


@on_every_device
@pytest.mark.parametrize("count", [1, 127, 128, 1001])
def test_every_word_is_added(face, count):
    """By 128 threads, 16 bytes at a time; the part of each warp is apart."""
    device, words = (
        face.device,
        np.random.default_rng(count).integers(2**32, size=(count, 4), dtype=np.uint32),
    )
    sums = device.empty((4,), "uint32")
    device.launch(
        "probe", "add_words", (2, 1, 1), 64, [device.upload(words, "uint32"), np.int64(count), sums]
    )
    assert sum(map(int, device.download(sums))) % 2**32 == int(words.sum()) % 2**32


@on_every_device
@few
@given(layer=activations(), rows=st.integers(1, 20), seed=st.integers(0, 2**32 - 1))
def test_a_whole_layer(face, layer, rows, seed):
    """Augmented operands in, one plain product: S = 0, S = K and what lies between."""
    x, selection = layer
    w = np.random.default_rng(seed).standard_normal((rows, selection.K)).astype(np.float32)
    a, b = face.augment_activations(x, selection), face.augment_weights(w, selection)
    assert_same_bits(face.matmul(a, b), emulator.matmul(a, b))


def refused(function, *arguments) -> str:
    with pytest.raises((TypeError, ValueError)) as caught:
        function(*arguments)
    return f"{caught.type.__name__}: {caught.value}"


@on_every_device
def test_refuses_in_the_words_of_the_reference(face):
    x, selection = np.ones((3, 32), np.float32), select_top(np.ones(32, np.float32), 16)
    calls = [
        ("quantize", np.ones((3, 17))),
        ("quantize", np.ones(16)),
        ("quantize", np.zeros((0, 16))),
        ("quantize", np.ones((3, 16), int)),
        ("quantize", x, 0.0),
        ("quantize", x, "1"),
        ("augment_activations", np.ones((3, 48)), selection),
        ("augment_activations", x, None),
        ("augment_weights", np.ones((3, 48)), selection),
        ("decode_e2m1", np.uint8([16])),
        ("decode_e4m3", np.ones(3)),
        ("dequantize", x),
        ("rmsnorm_augment_activations", x, np.ones(16), 1e-5, selection, 1.0),
        ("rmsnorm_augment_activations", x, np.full(32, np.nan), 1e-5, selection, 1.0),
        ("rmsnorm_augment_activations", x, np.ones(32), -1.0, selection, 1.0),
        ("rmsnorm_augment_activations", x, np.ones(32), 1e-5, selection, None),
    ]
    for value in (np.nan, -np.inf):
        for channel in (7, 23):
            bad = x.copy()
            bad[1, channel] = value
            for dtype in (np.float32, np.float16, ml_dtypes.bfloat16, np.float64):
                calls += [("quantize", bad.astype(dtype)), ("quantize", bad.astype(dtype), 1.0)]
                calls += [("augment_activations", bad.astype(dtype), selection, s) for s in (None, 1.0)]
                calls += [("augment_weights", bad.astype(dtype), selection)]
                calls += [("rmsnorm_augment_activations", bad.astype(dtype), x[0], 0.1, selection, 1.0)]
    large, weight = x.copy(), np.ones(32, np.float32)
    large[2, 3], weight[5] = 1e20, 3e38
    calls += [
        ("rmsnorm_augment_activations", large, np.ones(32), 0.1, selection, 1.0),
        ("rmsnorm_augment_activations", 2 * np.eye(32, dtype=np.float32), weight, 0.0, selection, 1.0),
        ("rmsnorm_augment_activations", np.diag(np.arange(32.0)), np.ones(32), 0.0, selection, 1.0),
    ]
    for name, *arguments in calls:
        expected = refused(getattr(arcquant_ref, name), *arguments)
        assert refused(getattr(face, name), *arguments) == expected
        if name.startswith("rmsnorm"):
            assert refused(getattr(emulator, name), *arguments) == expected


@on_every_device
def test_residuals_of_weights_are_refused(face):
    x, channels = np.ones((2, 32), np.float32), np.arange(32)
    selection = Selection(order=channels, num_residual=16, channel_amax=x[0], weight_channels=channels[:16])
    message = (
        r"selection has 16 weight_channels, but gpu knows residuals of activations only\. Use arcquant_ref "
        r"or emulator, or leave them out: dataclasses\.replace\(selection, weight_channels=\[\]\)\."
    )
    for call in (
        lambda: face.augment_activations(x, selection),
        lambda: face.augment_weights(x, selection),
        lambda: face.rmsnorm_augment_activations(x, x[0], 0.1, selection, 1.0),
        lambda: arrays.order_of(selection, x),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="selection is a ndarray, not Selection"):
        arrays.order_of(channels, x)
    out = replace(selection, weight_channels=[])  # the way out works as printed
    assert_same_tensor(face.augment_weights(x, out), arcquant_ref.augment_weights(x, out))


@on_every_device
def test_products_refuse_what_is_no_product(face):
    q = arcquant_ref.quantize(np.ones((2, 32)))
    for a, b in ((q, np.ones((2, 32))), (q, arcquant_ref.quantize(np.ones((2, 16))))):
        assert refused(face.matmul, a, b) == refused(emulator.matmul, a, b)
    bad = NVFP4Tensor(codes=q.codes, block_scales=q.block_scales | 0x80, tensor_scale=1)
    assert refused(face.dequantize, bad) == refused(arcquant_ref.dequantize, bad)


@on_every_device
def test_launchers_look_at_what_they_get(face):
    device = face.device
    x, order = (
        device.upload(np.ones((2, 32), np.float32), "float32"),
        device.upload(np.arange(32, dtype=np.uint16), "uint16"),
    )
    wide = device.upload(np.zeros((1, 65536 - 64 + 32), np.float32), "float32")
    wider, channels = device.upload(np.zeros((1, 65552), np.float16), "float16"), np.arange(65552)
    off = device.upload(np.arange(48, dtype=np.uint16), "uint16")
    off = replace(off, address=off.address + 2, shape=(32,))
    q = face.pack(arcquant_ref.quantize(np.ones((2, 32))))
    for message, function, *arguments in [
        ("order has shape .32,. and dtype uint8; it must be .32,. and uint16", launch.augment_weights, x,
         device.upload(np.arange(32, dtype=np.uint8), "uint8"), 16),
        ("num_residual=8 must be a multiple of 16 from 0 to 32", launch.augment_weights, x, order, 8),
        ("tensor_scale has shape", launch.quantize, x, x),
        ("x has dtype uint16; the kernels read float32, float16, bfloat16", launch.quantize, order),
        ("x has shape .32,.", launch.quantize, device.upload(np.ones(32, np.float32), "float32")),
        ("a has K=32 and b has K=16", launch.matmul, q, face.pack(arcquant_ref.quantize(np.ones((2, 16))))),
        ("a row takes 262016 bytes of shared memory", launch.augment_weights, wide,
         device.upload(np.arange(65504, dtype=np.uint16), "uint16"), 16),
        ("x has K=65552; an order has 16 bits for a channel, up to K=65536. Split K", launch.augment_weights,
         wider, device.upload(channels.astype(np.uint16), "uint16"), 16),
        ("order lies at address 0x7f.*2; kernels read 16 bytes at a time. Copy it", launch.augment_weights, x,
         off, 16),
    ]:  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=message):
            function(device, *arguments)


def test_arrays_that_are_not_on_a_gpu_are_refused():
    for x in (np.ones((2, 16), np.float32), [[1.0] * 16]):
        with pytest.raises(TypeError, match=r"x is a .* that is not on a GPU; pass a CuPy array or a CUDA"):
            arrays.as_array("x", x)


class Pretended(Cuda):
    """Notes what is cleared, and on which stream; there is no GPU."""

    def __init__(self) -> None:
        self._words, self.stream, self.capturing, self.cleared = {}, 1, False, []

    def _stream(self):
        return SimpleNamespace(ptr=self.stream, is_capturing=lambda: self.capturing)

    def zeros(self, shape, dtype):
        self.cleared.append((self.stream, *shape))
        return Array(len(self.cleared) << 20, shape, dtype, np.zeros(shape, dtype))


def test_a_word_is_cleared_by_the_stream_and_for_the_thread_that_takes_it():
    device = Pretended()
    words = [device.word() for _ in range(WORDS + 1)]
    device.stream = 2
    words.append(device.word())
    device.stream = 1
    words.append(device.word())
    assert device.cleared == [(1, WORDS), (1, WORDS), (2, WORDS)]
    with ThreadPoolExecutor(1) as other:
        words.append(other.submit(device.word).result())
    device.capturing = True  # a graph: what was cleared before is not when it runs again
    words += [device.word(), device.word()]
    assert device.cleared[3:] == [(1, WORDS), (1, 1), (1, 1)]
    device.capturing = False
    words.append(device.word())
    assert len(device.cleared) == 6
    assert len({word.address for word in words}) == len(words)
    assert {(word.shape, word.dtype, word.owner.shape) for word in words} == {((1,), "uint32", (1,))}


@pytest.mark.skipif("cuda" not in DEVICES, reason="no GPU")
@pytest.mark.parametrize("library", ["cupy", "torch"])
def test_arrays_on_the_gpu_are_not_copied(library):
    """In and out in the caller's library, on a stream of its own."""
    lib = optional(library)
    if library == "cupy":
        put, get, stream = lib.asarray, lib.asnumpy, lib.cuda.Stream(non_blocking=True)
    else:
        if not lib.cuda.is_available():
            pytest.skip("this torch has no CUDA")
        put, get = (lambda x: lib.from_numpy(x).cuda()), (lambda x: x.cpu().numpy())
        stream = lib.cuda.stream(lib.cuda.Stream())
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal((rows, 320)).astype(np.float32) for rows in (70, 200))
    selection = select_top(np.abs(x).max(axis=0), 64)
    expected = [arcquant_ref.augment_activations(x, selection), arcquant_ref.augment_weights(w, selection)]
    with stream:
        held = put(x)
        assert arrays.as_array("x", held).owner is held
        order = arrays.order_of(selection, held)
        a = arrays.augment_activations(held, order, 64)
        b = arrays.augment_weights(put(w), order, 64)
        y = arrays.matmul(a, b)
        arrays.refuse_non_finite(a)
        for q, tensor in zip((a, b), expected):
            assert type(q.codes.owner) is type(held)
            np.testing.assert_array_equal(get(q.codes.owner), layout.pack(tensor.codes))
            np.testing.assert_array_equal(get(q.scales.owner), layout.swizzle_128x4(tensor.block_scales))
        assert_same_bits(get(y), emulator.matmul(*expected))
        with pytest.raises(ValueError, match=r"x is not contiguous. Copy it first"):
            arrays.quantize(held.T)
        held[3, 5] = np.nan
        with pytest.raises(ValueError, match=r"what was quantized to \(70, 320\) held nan"):
            arrays.refuse_non_finite(arrays.quantize(held))


@few
@given(x=matrices(max_rows=5), w=matrices(max_rows=5))
def test_the_emulator_repeats_a_chain_of_half_mmas(x, w):
    k = min(x.shape[1], w.shape[1])
    a, b = (arcquant_ref.quantize(np.tile(m[:, :k], 5), 1.0) for m in (x, w))
    left, right = (
        np.pad(arcquant_ref.dequantize(q), ((0, rows - len(q.codes)), (0, 0))).astype(np.float16)
        for q, rows in zip((a, b), (16, 8))
    )
    d = np.zeros((16, 8), np.float32)
    for i in range(0, left.shape[1], BLOCK):
        d = emulator.mma_m16n8k16(left[:, i : i + BLOCK], right[:, i : i + BLOCK], d)
    assert_same_bits(emulator.matmul_fp16(a, b), d[: len(x), : len(w)].copy())


@few
@given(rows=st.integers(1, 16), blocks=st.integers(1, 140), seed=st.integers(0, 2**32 - 1))
def test_the_emulator_repeats_eight_chains_of_half_mmas(rows, blocks, seed):
    """Of each 32 along K the even numbers, then the odd ones, as fp16 numbers, many of them subnormal."""
    rng = np.random.default_rng(seed)
    a, b = (tensor_with_scales("spread", rng, (m, blocks * BLOCK)) for m in (rows, 8))
    left, right = (
        np.pad(arcquant_ref.dequantize(replace(q, tensor_scale=1)), ((0, more), (0, blocks % 2 * BLOCK)))
        for q, more in ((a, 16 - rows), (b, 0))
    )
    left, right = ((x * 2.0**-14).astype(np.float16) for x in (left, right))
    chains = np.zeros((8, 16, 8), np.float32)
    for first in range(0, left.shape[1], 32):
        for k in (slice(first, first + 32, 2), slice(first + 1, first + 32, 2)):
            chain = chains[first // 128 % 8]
            chain[:] = emulator.mma_m16n8k16(left[:, k], right[:, k], chain)
    total = chains[0]
    for chain in chains[1:]:
        total = total + chain
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        y = total[:rows] * np.float32(2**28) * np.float32(a.tensor_scale * b.tensor_scale)
    assert_same_bits(emulator.matmul_fp16_split_k(a, b), y)
