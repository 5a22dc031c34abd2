"""PTX instructions that compute one result, each against rational numbers, Python's integers or a table."""

from fractions import Fraction
from math import isfinite, isnan, isqrt

import exact
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ptx_kernels import one

import emulator

seeds = st.integers(0, 2**32 - 1)
N = 64
# PTX type → NumPy type, bits of precision, exponent of the least normal number, PTX's NaN
FORMATS = {
    "f16": (np.float16, 11, -14, 0x7FFF),
    "f32": (np.float32, 24, -126, 0x7FFFFFFF),
}
BITS = {2: np.uint16, 4: np.uint32, 8: np.uint64}


def bits_of(x):
    return x.view(BITS[x.dtype.itemsize])


def some_floats(rng, kind, n=N):
    """Numbers of every sort: any bits, of similar size, few bits, subnormal, special."""
    dtype, precision, least, _ = FORMATS[kind]
    width = np.dtype(dtype).itemsize * 8
    x = rng.integers(0, 2**width, n, np.uint64).astype(BITS[width // 8]).view(dtype)
    near = np.ldexp(
        rng.integers(2 ** (precision - 1), 2**precision, n) * 1.0, rng.integers(-3, 4, n) - precision
    )
    few = np.ldexp(rng.integers(0, 9, n) * 1.0, rng.integers(-30, 30, n) // (1 if width > 16 else 4))
    tiny = np.ldexp(rng.integers(0, 2**precision, n) * 1.0, least - precision + 1)
    largest = float(ml_dtypes.finfo(dtype).max)
    special = rng.choice([0, -0.0, np.inf, -np.inf, np.nan, largest, -largest, 1, -1], n)
    sort = rng.integers(0, 8, n)
    with np.errstate(all="ignore"):
        x = np.where(
            sort < 2, x, np.where(sort < 4, near, np.where(sort < 5, few, np.where(sort < 7, tiny, special)))
        )
        return (x * rng.choice([-1, 1], n)).astype(dtype)


def rounded(x: Fraction, negative_zero: bool, kind: str, rounding: str):
    """An exact number as one of this format."""
    dtype, precision, least, _ = FORMATS[kind]
    largest = Fraction(float(ml_dtypes.finfo(dtype).max))
    nearest = exact.round_to(x, precision, least)
    if rounding == "rn":
        y = nearest
    else:
        unit = Fraction(2) ** (max(exponent_below(x), least) - precision + 1)
        down = (x // unit) * unit
        up = -((-x) // unit) * unit
        y = {"rp": up, "rz": down if x > 0 else up}[rounding]
    if abs(y) > largest:
        to_largest = {"rn": False, "rz": True, "rp": y < 0}[rounding]
        magnitude = float(largest) if to_largest else np.inf
        return dtype(magnitude if y > 0 else -magnitude)
    if y == 0:
        return dtype(-0.0 if (x < 0 or (x == 0 and negative_zero)) else 0.0)
    return dtype(float(y))


def exponent_below(x: Fraction) -> int:
    if x == 0:
        return -(10**6)
    exponent = abs(x.numerator).bit_length() - x.denominator.bit_length()
    return exponent - 1 if abs(x) < Fraction(2) ** exponent else exponent


def assert_bits(got, expected, kind, *operands):
    expected = np.array(expected, FORMATS[kind][0])
    nan = np.isnan(expected)
    want = np.where(nan, BITS[expected.dtype.itemsize](FORMATS[kind][3]), bits_of(expected))
    wrong = np.flatnonzero(bits_of(got) != want)
    if len(wrong):
        i = wrong[0]
        given = [hex(bits_of(x)[i]) for x in operands]
        pytest.fail(f"{len(wrong)} differ, first {given}: got {bits_of(got)[i]:#x}, expected {want[i]:#x}")


def combine(name, values, kind, rounding):
    """IEEE: a ± b, a · b, a / b, a · b + c, √a, 1/a."""
    with np.errstate(all="ignore"):
        a, b, c = (np.float64(v) for v in (*values, 0.0, 0.0)[:3])
        in_float64 = {
            "add": a + b,
            "sub": a - b,
            "mul": a * b,
            "div": a / b,
            "fma": a * b + c,
            "sqrt": np.sqrt(a),
            "rcp": 1 / a,
        }[name]
    if not all(isfinite(v) for v in values) or not isfinite(in_float64):  # special, or by zero
        return FORMATS[kind][0](in_float64)
    x, y, z = (Fraction(float(v)) for v in (a, b, c))
    if name == "sqrt":
        root = Fraction(isqrt(x.numerator * x.denominator << 400), x.denominator << 200)
        if root * root != x:
            root += Fraction(
                1, x.denominator << 202
            )  # beside no number of the format, on the right side of it
        return rounded(root, np.signbit(a), kind, rounding)
    result = {
        "add": lambda: x + y,
        "sub": lambda: x - y,
        "mul": lambda: x * y,
        "div": lambda: x / y,
        "fma": lambda: x * y + z,
        "rcp": lambda: 1 / x,
    }[name]()
    return rounded(result, bool(np.signbit(in_float64)), kind, rounding)


OPCODES = ["add.rn.f32", "add.rp.f32", "sub.rn.f32", "mul.rn.f32", "div.rn.f32", "fma.rn.f32", "fma.rz.f32"]
OPCODES += ["sqrt.rn.f32", "rcp.rn.f32"]
OPERANDS = {"fma": 3, "sqrt": 1, "rcp": 1}


@pytest.mark.parametrize("opcode", OPCODES)
@given(seed=seeds)
def test_one_rounding_of_the_exact_result(opcode, seed):
    name, rounding, kind = opcode.split(".")
    rng = np.random.default_rng(seed)
    operands = [some_floats(rng, kind) for _ in range(OPERANDS.get(name, 2))]
    if name == "fma" and seed % 2:  # nearly cancels: bits far below those of a · b decide
        with np.errstate(all="ignore"):
            product = operands[0].astype(np.float64) * operands[1].astype(np.float64)
            operands[2] = (-product * rng.choice([1, 1, 2**-24, 2**24], N)).astype(FORMATS[kind][0])
    text = f"{opcode} d, {', '.join('abc'[: len(operands)])};"
    got = one(text, *map(bits_of, operands), dtype=BITS[operands[0].dtype.itemsize]).view(FORMATS[kind][0])
    expected = [combine(name, values, kind, rounding) for values in zip(*operands)]
    assert_bits(got, expected, kind, *operands)


@given(seed=seeds)
def test_products_of_pairs_are_two_products(seed):
    rng = np.random.default_rng(seed)
    a, b = (some_floats(rng, "f16", 2 * N) for _ in range(2))
    got = one("mul.rn.f16x2 d, a, b;", a.view(np.uint32), b.view(np.uint32), dtype=np.uint32)
    assert_bits(got.view(np.float16), [combine("mul", v, "f16", "rn") for v in zip(a, b)], "f16", a, b)


CORNERS = np.float32(
    [0, -0.0, 1, -1, 2, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 3.4e38, -3.4e38, 1e-38, 7, 8, 9]
)
LEFT, RIGHT = (x.ravel() for x in np.meshgrid(CORNERS, CORNERS))
COMPARISONS = {
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a < b or a > b,
    "equ": lambda a, b: a == b or isnan(a) or isnan(b),
    "neu": lambda a, b: a != b,
    "ltu": lambda a, b: not a >= b,
    "leu": lambda a, b: not a > b,
    "gtu": lambda a, b: not a <= b,
    "geu": lambda a, b: not a < b,
    "nan": lambda a, b: isnan(a) or isnan(b),
}


@pytest.mark.parametrize("name", COMPARISONS)
def test_setp_of_floats(name):
    text = f"setp.{name}.f32 p, a, b; selp.b32 d, 1, 0, p;"
    got = one(text, bits_of(LEFT), bits_of(RIGHT), dtype=np.uint32)
    assert got.tolist() == [int(COMPARISONS[name](float(a), float(b))) for a, b in zip(LEFT, RIGHT)]


def test_min_and_max_take_the_number_and_know_the_sign_of_zero():
    def smaller(a, b):
        if isnan(a) or isnan(b):
            return b if isnan(a) else a
        return a if a < b or (a == b and np.signbit(a)) else b

    for name, sign in (("min", 1), ("max", -1)):
        got = one(f"{name}.f32 d, a, b;", bits_of(LEFT), bits_of(RIGHT), dtype=np.uint32).view(np.float32)
        expected = [sign * np.float32(smaller(sign * a, sign * b)) for a, b in zip(LEFT, RIGHT)]
        assert_bits(got, expected, "f32", LEFT, RIGHT)
    got = one("max.NaN.f32 d, a, b;", bits_of(LEFT), bits_of(RIGHT), dtype=np.uint32).view(np.float32)
    either = np.isnan(LEFT) | np.isnan(RIGHT)
    assert_bits(got, np.where(either, np.float32(np.nan), np.float32(expected)), "f32", LEFT, RIGHT)


def test_abs_neg_and_copysign_touch_the_sign_bit_only():
    a, b = bits_of(LEFT), bits_of(RIGHT) | 0x7FC00001
    np.testing.assert_array_equal(one("abs.f32 d, a;", a, dtype=np.uint32), a & 0x7FFFFFFF)
    np.testing.assert_array_equal(one("neg.f32 d, b;", a, b, dtype=np.uint32), b ^ 0x80000000)
    got = one("copysign.f32 d, a, b;", a, b, dtype=np.uint32)
    np.testing.assert_array_equal(got, a & 0x80000000 | b & 0x7FFFFFFF)


def signed(x: int, bits: int) -> int:
    x &= (1 << bits) - 1
    return x - (1 << bits) if x >> bits - 1 else x


def inserted(a: int, b: int, position: int, length: int) -> int:
    for i in range(length & 0xFF):
        at = (position & 0xFF) + i
        if at <= 31:
            b = b & ~(1 << at) | (a >> i & 1) << at
    return b


def permuted(a: int, b: int, selectors: int) -> int:
    both = (b << 32 | a).to_bytes(8, "little")
    chosen = [selectors >> 4 * i & 15 for i in range(4)]
    return int.from_bytes(
        bytes((0xFF if both[s & 7] >> 7 else 0) if s & 8 else both[s & 7] for s in chosen), "little"
    )


# instructions → what they compute, in Python's integers
INTEGERS = {
    "add.u32 d, a, b;": lambda a, b, c: a + b,
    "sub.s32 d, a, b;": lambda a, b, c: a - b,
    "mul.lo.s32 d, a, b;": lambda a, b, c: a * b,
    "mul.hi.u32 d, a, b;": lambda a, b, c: a * b >> 32,
    "mad.lo.s32 d, a, b, c;": lambda a, b, c: a * b + c,
    "mad.wide.s32 y, a, b, 0; shr.u64 y, y, 24; cvt.u32.u64 d, y;": lambda a, b, c: (
        signed(a, 32) * signed(b, 32) >> 24
    ),
    ".reg .b64 e; cvt.s64.s32 y, a; cvt.s64.s32 e, b; div.u64 y, y, e; cvt.u32.u64 d, y;": lambda a, b, c: (
        (signed(a, 32) % 2**64) // (signed(b, 32) % 2**64) if b else -1
    ),
    "cvt.s64.s32 y, a; abs.s64 y, y; neg.s64 y, y; max.u64 y, y, 5; cvt.u32.u64 d, y;": lambda a, b, c: max(
        -abs(signed(a, 32)) % 2**64, 5
    ),
    "setp.eq.b32 p, a, b; setp.ne.s32 q, c, 0; or.pred p, p, q; selp.b32 d, 1, 0, p;": lambda a, b, c: (
        a == b or c != 0
    ),
    "div.u32 d, a, b;": lambda a, b, c: a // b if b else -1,
    "min.u32 d, a, b;": lambda a, b, c: min(a, b),
    "max.s32 d, a, b;": lambda a, b, c: max(signed(a, 32), signed(b, 32)),
    "abs.s32 d, a;": lambda a, b, c: abs(signed(a, 32)),
    "neg.s32 d, a;": lambda a, b, c: -a,
    "and.b32 d, a, b;": lambda a, b, c: a & b,
    "or.b32 d, a, b;": lambda a, b, c: a | b,
    "xor.b32 d, a, -1;": lambda a, b, c: ~a,
    "not.b32 d, a;": lambda a, b, c: ~a,
    "shl.b32 d, a, b;": lambda a, b, c: a << min(b, 32),
    "shr.u32 d, a, b;": lambda a, b, c: a >> min(b, 32),
    "shr.s32 d, a, b;": lambda a, b, c: signed(a, 32) >> min(b, 32),
    "shf.l.wrap.b32 d, a, b, c;": lambda a, b, c: (b << 32 | a) << (c & 31) >> 32,
    "lop3.b32 d, a, b, c, 0xE4;": lambda a, b, c: a & c | b & ~c,
    "lop3.b32 d, a, b, c, 0x96;": lambda a, b, c: a ^ b ^ c,
    "lop3.b32 d, a, b, c, 0x10;": lambda a, b, c: a & ~b & ~c,
    "prmt.b32 d, a, b, c;": permuted,
    "bfi.b32 d, a, b, c, 7;": lambda a, b, c: inserted(a, b, c, 7),
    "bfi.b32 d, a, b, 3, c;": lambda a, b, c: inserted(a, b, 3, c),
    "brev.b32 d, a;": lambda a, b, c: int(f"{a:032b}"[::-1], 2),
    "clz.b32 d, a;": lambda a, b, c: 32 - a.bit_length(),
    "bfind.shiftamt.u32 d, a;": lambda a, b, c: 32 - a.bit_length() if a else -1,
    "setp.lt.u32 p, a, b; selp.b32 d, a, b, p;": lambda a, b, c: min(a, b),
    "setp.lt.s32 p, a, b; selp.b32 d, a, b, p;": lambda a, b, c: min(signed(a, 32), signed(b, 32)),
    "setp.gt.s32 p, a, 0; not.pred q, p; @q mov.u32 a, 5; mov.u32 d, a;": lambda a, b, c: (
        a if signed(a, 32) > 0 else 5
    ),
    "cvt.u32.u16 d, a;": lambda a, b, c: a & 0xFFFF,
    "mov.b64 y, {a, b}; shr.u64 y, y, 20; cvt.u32.u64 d, y;": lambda a, b, c: (b << 32 | a) >> 20,
    "mov.b64 y, {a, b}; mov.b64 {_, d}, y;": lambda a, b, c: b,
    "mov.b64 y, {a, b}; shl.b64 y, y, c; shr.u64 y, y, 32; cvt.u32.u64 d, y;": lambda a, b, c: (
        (b << 32 | a) << min(c, 64) >> 32
    ),
}


@pytest.mark.parametrize("text", INTEGERS)
@given(seed=seeds)
def test_integers_and_bits(text, seed):
    rng = np.random.default_rng(seed)
    operands = [
        np.where(
            rng.random(N) < 0.5,
            rng.choice([0, 1, 2, 5, 7, 31, 32, 33, 63, 64, 65, 255, 256, 2**31 - 1, 2**31, 2**32 - 1], N),
            rng.integers(0, 2**32, N) >> rng.integers(0, 32, N),
        ).astype(np.uint32)
        for _ in range(3)
    ]
    got = one(text, *operands, dtype=np.uint32)
    expected = [int(INTEGERS[text](*values)) & 0xFFFFFFFF for values in zip(*(x.tolist() for x in operands))]
    assert got.tolist() == expected


@given(seed=seeds)
def test_float_to_integer_saturates(seed):
    rng = np.random.default_rng(seed)
    near = 2.0**31 * rng.choice([1, -1, 2**-20], N) * rng.choice([1, 1 - 2**-24, 1 + 2**-23], N)
    x = np.where(rng.random(N) < 0.3, near.astype(np.float32), some_floats(rng, "f32"))

    def expected(v):
        if isnan(v):
            return 0
        return int(min(max(v, -(2**31)), 2**31 - 1))

    got = one("cvt.rzi.s32.f32 d, a;", bits_of(x), dtype=np.int32)
    assert got.tolist() == [expected(float(v)) for v in x]


@pytest.mark.parametrize("opcode", ["cvt.rn.f32.s32", "cvt.rn.f32.s64", "cvt.rz.f32.s64"])
@given(seed=seeds)
def test_integer_to_float(opcode, seed):
    rng, bits = np.random.default_rng(seed), int(opcode[-2:])
    x = (rng.integers(0, 2**64, N, np.uint64) >> rng.integers(0, 64, N, np.uint64)).astype(BITS[bits // 8])
    ties = (rng.integers(2**23, 2**24, N) * 2 + 1 << 6) + rng.integers(-1, 2, N)
    x = np.where(rng.random(N) < 0.4, ties.astype(x.dtype), x)
    got, rounding = one(f"{opcode} d, a;", x, dtype=np.float32), opcode[4:6]
    values = [Fraction(signed(v, bits)) for v in x.tolist()]
    assert_bits(got, [rounded(v, False, "f32", rounding) for v in values], "f32", x)


def test_longer_floats():
    halves = np.arange(2**16, dtype=np.uint16)
    with np.errstate(invalid="ignore"):
        expected = halves.view(np.float16).astype(np.float32)
    assert_bits(one("cvt.f32.f16 d, a;", halves, dtype=np.float32), expected, "f32", halves)


@given(seed=seeds)
def test_codes_are_those_of_the_emulator(seed):
    x = some_floats(np.random.default_rng(seed), "f32", 2 * N)
    scaled = np.where(
        np.arange(2 * N) % 2, x, np.random.default_rng(seed).integers(-60, 60, 2 * N) / 8
    ).astype(np.float32)
    high, low = bits_of(scaled[:N]), bits_of(scaled[N:])
    got = one(".reg .b8 t; cvt.rn.satfinite.e2m1x2.f32 t, a, b; cvt.u32.u8 d, t;", high, low, dtype=np.uint32)
    codes = emulator.encode_e2m1(scaled)
    np.testing.assert_array_equal(got, codes[:N] << 4 | codes[N:])
    got = one("cvt.rn.satfinite.e4m3x2.f32 d, a, b;", high, low, dtype=np.uint16)
    codes = emulator.encode_e4m3(scaled).astype(np.uint16)
    np.testing.assert_array_equal(got, codes[:N] << 8 | codes[N:])


def test_every_pair_of_e4m3_codes_is_a_pair_of_halves():
    """PTX ISA, cvt: the lower byte becomes the lower half; NaN is 0x7FFF."""
    codes = np.arange(2**16, dtype=np.uint16)
    got = one("cvt.rn.f16x2.e4m3x2 d, a;", codes, dtype=np.uint32).view(np.uint16).reshape(-1, 2)
    values = emulator.decode_e4m3(codes.view(np.uint8)).astype(np.float16)
    expected = np.where(np.isnan(values), np.uint16(0x7FFF), values.view(np.uint16))
    np.testing.assert_array_equal(got, expected.reshape(-1, 2))
