"""What only the emulator does: NaN as hardware has it, narrow dtypes, every float32, threads, stale code."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import exact
import ml_dtypes
import numpy as np
import pytest
from hypothesis import settings
from numba import njit
from support import all_bf16, assert_same_tensor, neighbours

import emulator
from arcquant_ref import NVFP4Tensor, select_top
from arcquant_ref.formats import E2M1, E4M3, encode
from emulator.jit import fma

ROOT = Path(__file__).parent.parent
FORMATS = {"e2m1": E2M1, "e4m3": E4M3}
NAN_CODE = {"e2m1": 0x7, "e4m3": 0x7F}


def as_hardware(name: str, x: np.ndarray) -> np.ndarray:
    """The reference's codes, and for what it refuses the two rules: NaN is one code, infinity saturates."""
    largest = np.finfo(np.float32).max
    codes = encode(FORMATS[name], np.clip(np.nan_to_num(x, nan=0), -largest, largest))
    return np.where(np.isnan(x), np.uint8(NAN_CODE[name]), codes)


@pytest.mark.parametrize("name", FORMATS)
def test_every_bf16_and_fp16_and_what_lies_beside_a_boundary(name):
    encode_name = getattr(emulator, f"encode_{name}")
    bf16, fp16 = np.arange(2**16, dtype=np.uint16), np.arange(2**16, dtype=np.uint16).view(np.float16)
    np.testing.assert_array_equal(encode_name(bf16), as_hardware(name, all_bf16()))
    np.testing.assert_array_equal(encode_name(bf16.view(ml_dtypes.bfloat16)), encode_name(bf16))
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(encode_name(fp16), as_hardware(name, fp16.astype(np.float32)))
    midpoints = FORMATS[name].midpoints
    x = neighbours(np.concatenate([midpoints, -midpoints, np.float32([0, -0.0, FORMATS[name].max])]))
    np.testing.assert_array_equal(encode_name(x), as_hardware(name, x))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("payload", [0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0xFF800001, 0xFFC00000, 0xFFFFFFFF])
def test_every_kind_of_nan_is_one_code(name, payload):
    assert getattr(emulator, f"encode_{name}")(np.uint32([payload]).view(np.float32)) == NAN_CODE[name]


@pytest.mark.skipif(
    settings.get_current_profile_name() != "thorough", reason="4 billion codes: --hypothesis-profile thorough"
)
@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("e2m1", "ce1d60d1408cc7f99b9f2c1b0b8794629935442e1c6c51bb84ca6f468471b1bb"),
        ("e4m3", "9d7653f5afbe9034906208b15d2b1e9e21a762aeee82e64f569003902ccfb150"),
    ],
)
def test_every_float32_encodes_as_in_cuda(name, digest):
    """SHA-256 of one code byte per bit pattern, in order, from the conversions of CUDA 13.0 on the host
    (cuda_fp4.h and cuda_fp8.h, satfinite): all 2³² of them, NaN, infinities and subnormals included."""
    sha = hashlib.sha256()
    for start in range(0, 2**32, 2**24):
        x = np.arange(start, start + 2**24, dtype=np.uint64).astype(np.uint32).view(np.float32)
        sha.update(getattr(emulator, f"encode_{name}")(x))
    assert sha.hexdigest() == digest


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from /proc")
def test_narrow_dtypes_are_not_copied_to_float32():
    """How far the memory of a process grows: by codes and scales, 1.06 bytes a value, and not by 4 more."""
    code = """
import re, numpy as np, emulator
x = np.ones((4096, 8192), np.uint16)
emulator.quantize(x[:4]), emulator.encode_e2m1(x[:4])
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
before = peak()
emulator.quantize(x), emulator.encode_e2m1(x)
print((peak() - before) / x.size)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 1 < float(done.stdout) < 3


@pytest.mark.parametrize("tensor_scale", [None, 1.0])
@pytest.mark.parametrize("channel", [7, 23])  # one without and one with a residual
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64, np.uint16])
def test_quantize_refuses_what_the_reference_refuses(value, dtype, channel, tensor_scale):
    x = np.ones((3, 32))
    x[1, channel] = value
    x = x.astype(ml_dtypes.bfloat16).view(np.uint16) if dtype == np.uint16 else x.astype(dtype)
    selection = select_top(np.ones(32, np.float32), 16)
    for function in (
        lambda: emulator.quantize(x, tensor_scale),
        lambda: emulator.augment_activations(x, selection, tensor_scale),
        lambda: emulator.augment_weights(x, selection),
    ):
        with pytest.raises(
            ValueError, match=rf"1 of 96 elements are NaN, infinite .* at index \(1, {channel}\)"
        ):
            function()


def test_float64_beyond_float32_is_refused():
    with pytest.raises(ValueError, match=r"beyond float32, the first is 1e\+39 at index \(0, 0\)"):
        emulator.quantize(np.full((1, 16), 1e39))


@pytest.mark.parametrize("layout", ["transposed", "strided", "big-endian", "read-only"])
def test_any_memory_layout(layout):
    x = np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32)
    expected = emulator.quantize(x)
    stored = {
        "transposed": np.asfortranarray(x),
        "strided": np.repeat(x, 2, axis=1)[:, ::2],
        "big-endian": x.astype(">f4"),
        "read-only": np.frombuffer(x.tobytes(), np.float32).reshape(x.shape),
    }[layout]
    assert_same_tensor(emulator.quantize(stored), expected)
    turned = expected.map(np.asfortranarray if layout == "transposed" else np.copy)
    np.testing.assert_array_equal(emulator.matmul(turned, turned), emulator.matmul(expected, expected))


@pytest.mark.parametrize("threads", [1, 2, 3, 64])
def test_the_number_of_threads_changes_no_byte(threads, monkeypatch):
    x = np.random.default_rng(1).standard_normal((37, 64)).astype(np.float32)
    selection = select_top(np.abs(x).max(axis=0), 32)
    expected = emulator.augment_activations(x, selection), emulator.encode_e4m3(x)
    monkeypatch.setattr("numba.config.NUMBA_NUM_THREADS", threads)
    assert_same_tensor(emulator.augment_activations(x, selection), expected[0])
    np.testing.assert_array_equal(emulator.encode_e4m3(x), expected[1])


def test_scalars_and_empty_arrays_are_as_in_the_reference():
    assert emulator.encode_e2m1(2.5) == 4
    assert emulator.decode_e2m1(np.zeros((0, 3), np.uint8)).shape == (0, 3)
    with pytest.raises(ValueError, match=r"x has shape \(0,\) and no elements"):
        emulator.encode_e2m1(np.zeros(0, np.float32))
    with pytest.raises(TypeError, match=r"x has dtype int64; it must be one of float16, .*, uint16"):
        emulator.encode_e2m1(np.arange(3))


def operands(**changed):
    right = {"a_codes": (16, 64), "b_codes": (8, 64), "sfa": (16, 4), "sfb": (8, 4)}
    arrays = {name: np.zeros(shape, np.uint8) for name, shape in right.items()}
    return arrays | {"c": np.zeros((16, 8), np.float32)} | changed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sfa": np.zeros((4, 16), np.uint8)}, r"sfa has shape \(4, 16\); one MMA takes \(16, 4\)"),
        ({"b_codes": np.full((8, 64), 16, np.uint8)}, r"b_codes holds 0x10 at index .* a code has 4 bits"),
        ({"a_codes": np.zeros((16, 64))}, "a_codes has dtype float64; codes are uint8"),
        ({"c": np.zeros((16, 8))}, "c has dtype float64; it must be one of float32"),
        ({"c": np.zeros((8, 16), np.float32)}, r"c has shape \(8, 16\); one MMA takes \(16, 8\)"),
    ],
)
def test_mma_refuses_other_operands(changed, message):
    with pytest.raises((TypeError, ValueError), match=message):
        emulator.mma_m16n8k64(**operands(**changed))


def test_half_mma_refuses_mixed_or_other_dtypes():
    a, b, c = np.zeros((16, 16), np.float16), np.zeros((8, 16), np.float16), np.zeros((16, 8), np.float32)
    for other in (b.astype(ml_dtypes.bfloat16), b.astype(np.float32)):
        with pytest.raises(TypeError, match=r"a has dtype float16 and b .*; both must be float16 or"):
            emulator.mma_m16n8k16(a, other, c)
    with pytest.raises(ValueError, match=r"b has shape \(16, 16\); one MMA takes \(8, 16\)"):
        emulator.mma_m16n8k16(a, a, c)


def test_matmul_refuses_what_is_no_product():
    q = emulator.quantize(np.ones((2, 32)))
    with pytest.raises(TypeError, match="b is a ndarray, not NVFP4Tensor"):
        emulator.matmul(q, np.ones((2, 32)))
    with pytest.raises(ValueError, match="a has K=32 and b has K=16"):
        emulator.matmul(q, emulator.quantize(np.ones((2, 16))))


def test_a_nan_scale_makes_only_its_own_outputs_nan():
    q = emulator.quantize(np.ones((4, 160)))
    bad = q.map(np.copy)
    bad.block_scales[2, 7] = 0xFF
    y = emulator.matmul(bad, q)
    assert (y[2].view(np.uint32) == 0x7FFFFFFF).all()
    np.testing.assert_array_equal(y[[0, 1, 3]], emulator.matmul(q, q)[[0, 1, 3]])
    with pytest.raises(ValueError, match="1 block scales are NaN"):
        emulator.dequantize(bad)


def test_infinite_times_zero_is_the_nan_of_the_hardware():
    """Tensor scales whose product overflows: 0 · inf."""
    zero = NVFP4Tensor(
        codes=np.zeros((1, 16)).astype(np.uint8), block_scales=np.uint8([[56]]), tensor_scale=1e30
    )
    assert emulator.matmul(zero, zero).view(np.uint32) == 0x7FFFFFFF


def test_changed_sources_are_compiled_again(tmp_path):
    """Numba looks only at the file of the function it compiled: here quantize.py, which calls formats.py."""
    for part in ("arcquant_ref", "emulator"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))

    def quantized() -> str:
        code = "import emulator; print(emulator.quantize([[6.0] + 15 * [4.0]], 1).codes[0, :2])"
        command, env = [sys.executable, "-c", code], os.environ | {"PYTHONPATH": str(tmp_path)}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
        return done.stdout

    assert quantized() == "[7 6]\n"
    assert list((tmp_path / "emulator/__pycache__").rglob("*.nbi"))
    formats = tmp_path / "emulator/formats.py"
    formats.write_text(formats.read_text().replace("u32(steps + ", "u32(u32(8) + steps + "))
    assert quantized() != "[7 6]\n"


def test_a_read_only_installation_works_without_a_cache(tmp_path):
    for part in ("arcquant_ref", "emulator"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "emulator/__pycache__").write_text("a file where the folder would be")
    (tmp_path / ".cache").write_text("and another")
    code = "import emulator; print(emulator.jit._CACHE == '', emulator.encode_e2m1([2.5]))"
    env = os.environ | {"PYTHONPATH": str(tmp_path), "HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout == "True [4]\n", done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_forked_during_a_product_can_multiply():
    code = """
import multiprocessing, numpy as np, emulator
from emulator import gemm
q = emulator.quantize(np.ones((4, 64)))
gemm._one_user.acquire()
child = multiprocessing.get_context("fork").Process(target=emulator.matmul, args=(q, q))
child.start()
child.join(60)
print(child.exitcode)
child.kill()
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "0\n"


@pytest.mark.filterwarnings("error")
def test_signalling_nans_pass_silently():
    signalling = np.uint32([0x7F800001]).view(np.float32)
    arrays = operands(c=np.broadcast_to(signalling, (16, 8)))
    assert (emulator.mma_m16n8k64(**arrays).view(np.uint32) == 0x7FFFFFFF).all()
    assert emulator.encode_e4m3(np.uint64([0x7FF0000000000001]).view(np.float64)) == 0x7F


def test_nan_among_bfloat16_bits_is_named_as_such():
    for dtype in ("<u2", ">u2"):
        with pytest.raises(ValueError, match=r"x\.view\(ml_dtypes\.bfloat16\): 16 of 16 elements are NaN"):
            emulator.quantize(np.full((1, 16), 0x7FC0, dtype), 1)


def products_near_a_tie():
    """(a, b, c) with a·b + c next to the middle of two float32, nearer than a float64 can say; and others
    whose sum cancels or is subnormal."""
    rng = np.random.default_rng(4)
    c = 1 + rng.integers(0, 2**23, 400) * 2.0**-23
    off = 2.0 ** -rng.integers(15, 23, 400)  # (1 + off)(1 - off) = 1 - off²
    near_a_tie = 1 + off, (1 - off) * rng.choice([-(2.0**-24), 2.0**-24], 400), c
    x, y = rng.standard_normal((2, 400))
    cancels = x, y, -x * y
    subnormal = x * 2.0**-70, y * 2.0**-70, c * 2.0**-140
    return np.concatenate([near_a_tie, cancels, subnormal], axis=1).astype(np.float32)


def test_a_residual_is_rounded_once():
    """By the FMA, which equals rational arithmetic also where float32 after float64 does not."""

    @njit
    def each(a, b, c, out):
        for i in range(len(a)):
            out[i] = fma(a[i], b[i], c[i])

    a, b, c = products_near_a_tie()
    got = np.empty_like(a)
    each(a, b, c, got)
    terms = [[exact.Fraction(float(v)) for v in part] for part in (a, b, c)]
    expected = np.float32([exact.as_float(x * y + z) for x, y, z in zip(*terms)])
    np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))
    twice = (a.astype(np.float64) * b + c).astype(np.float32)
    assert (twice != expected).sum() > 100
