from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from support import every_backend, finite_bf16, neighbours, optional

from arcquant_ref.formats import E2M1, E4M3, E8M0, decode, encode

GOLDEN = Path(__file__).parent / "golden"
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
ML_DTYPES = {"e2m1": ml_dtypes.float4_e2m1fn, "e4m3": ml_dtypes.float8_e4m3fn}
FORMATS = {"e2m1": E2M1, "e4m3": E4M3}


@pytest.mark.parametrize("fmt", [E2M1, E4M3, E8M0], ids=lambda fmt: fmt.name)
def test_values_equal_the_specification(fmt):
    for line in (GOLDEN / f"{fmt.name.lower()}.csv").read_text().splitlines():
        if line[0] in "01":
            bits, value = line.split(",")
            got, expected = fmt.values[int(bits, 2)], np.float32(value)
            assert got == expected or (np.isnan(got) and np.isnan(expected)), line
            assert np.signbit(got) == (fmt.sign_bits == 1 and bits[0] == "1"), line


@every_backend
@pytest.mark.parametrize("name", FORMATS)
def test_every_code_decodes_as_in_ml_dtypes(backend, name):
    codes = np.arange(2 ** FORMATS[name].bits, dtype=np.uint8)
    got = getattr(backend, f"decode_{name}")(codes)
    np.testing.assert_array_equal(got, codes.view(ML_DTYPES[name]).astype(np.float32))
    np.testing.assert_array_equal(np.signbit(got)[got == 0], codes[got == 0] > 0)


@every_backend
@pytest.mark.parametrize("name", FORMATS)
def test_every_bf16_and_fp16_encodes_as_in_ml_dtypes(backend, name):
    fp16 = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
    x = neighbours(np.concatenate([finite_bf16(), fp16[np.isfinite(fp16)]]))
    x = x[np.isfinite(x)]
    saturated = np.clip(x, -FORMATS[name].max, FORMATS[name].max)  # ml_dtypes gives NaN above 464
    np.testing.assert_array_equal(
        getattr(backend, f"encode_{name}")(x), saturated.astype(ML_DTYPES[name]).view(np.uint8)
    )


def test_every_e4m3_code_and_every_bf16_is_as_in_torch():
    torch = optional("torch")
    codes = np.arange(256, dtype=np.uint8)
    values = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(decode(E4M3, codes), values)
    x = torch.from_numpy(finite_bf16()).clamp(-E4M3.max, E4M3.max)
    np.testing.assert_array_equal(
        encode(E4M3, finite_bf16()), x.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    )


@every_backend
@pytest.mark.parametrize("name", FORMATS)
def test_every_threshold_and_its_neighbours(backend, name):
    """One ulp below a midpoint rounds down, one above up, the midpoint to the even code."""
    fmt = FORMATS[name]
    for i, midpoint in enumerate(fmt.midpoints):
        for sign in (1, -1):
            got = getattr(backend, f"encode_{name}")(sign * np.sort(neighbours(fmt.midpoints[i : i + 1])))
            even = i if i % 2 == 0 else i + 1
            sign_bit = 0 if sign > 0 else 2**fmt.magnitude_bits
            assert (got - sign_bit).tolist() in ([i, even, i + 1], [i + 1, even, i]), (midpoint, got)


@every_backend
@pytest.mark.parametrize("name", FORMATS)
@given(x=arrays(np.float32, 16, elements=finite))
@example(x=np.repeat(E2M1.midpoints, 3)[:16])
@example(x=-E4M3.midpoints[-16:])
def test_encode_picks_a_nearest_value(backend, name, x):
    fmt = FORMATS[name]
    got = getattr(backend, f"decode_{name}")(getattr(backend, f"encode_{name}")(x)).astype(np.float64)
    grid = np.concatenate([-fmt.magnitudes, fmt.magnitudes])
    best = np.abs(grid - x[:, None].astype(np.float64)).min(axis=1)
    np.testing.assert_array_equal(np.abs(got - x), best)
    assert (np.signbit(got) == np.signbit(x)).all()


@every_backend
@pytest.mark.parametrize("name", FORMATS)
def test_encode_inverts_decode(backend, name):
    codes = np.arange(2 ** FORMATS[name].bits, dtype=np.uint8)
    values = getattr(backend, f"decode_{name}")(codes)
    numbers = ~np.isnan(values)
    np.testing.assert_array_equal(getattr(backend, f"encode_{name}")(values[numbers]), codes[numbers])


def test_e8m0_has_no_zero_and_no_sign():
    assert decode(E8M0, np.uint8([0]))[0] == 2.0**-127
    assert E8M0.bits == 8
    assert (E8M0.values[:-1] > 0).all()
