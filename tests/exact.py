"""NVFP4 once more in rational arithmetic, one number at a time: it shares nothing with the package.

`fl` rounds to float32 where the normative order of operations does; everything between is exact.
"""

from fractions import Fraction
from math import copysign, frexp, inf, isfinite, nan


def round_to(x: Fraction, precision: int, least_exponent: int) -> Fraction:
    """Nearest number with `precision` significant bits, ties to even, subnormal below 2**least_exponent."""
    if x == 0:
        return Fraction(0)
    exponent = abs(x.numerator).bit_length() - x.denominator.bit_length()
    if abs(x) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (max(exponent, least_exponent) - precision + 1)
    return round(x / unit) * unit  # Python rounds a Fraction half to even


def fl(x: Fraction) -> Fraction:
    """float32, overflow left out: the tests stay inside."""
    return round_to(x, 24, -126)


def as_float(x: Fraction) -> float:
    """fl(x) as a float; a negative number that rounds to zero is −0.0."""
    return float(fl(x)) or (-0.0 if x < 0 else 0.0)


def e2m1(x: Fraction) -> Fraction:
    return max(min(round_to(x, 2, 0), Fraction(6)), Fraction(-6))


def e4m3(x: Fraction) -> Fraction:
    return min(round_to(x, 4, -6), Fraction(448))


def code(value: Fraction, mantissa_bits: int, least_exponent: int) -> int:
    """The magnitude bits of an E2M1 or E4M3 value."""
    exponent = least_exponent
    while abs(value) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    units = abs(value) / Fraction(2) ** (exponent - mantissa_bits)  # hidden bit included
    assert units.denominator == 1
    return (exponent - least_exponent) * 2**mantissa_bits + units.numerator


def quantize_block(x: list[float], tensor_scale: Fraction) -> tuple[list[int], int]:
    """Sixteen float32 → sixteen E2M1 codes and an E4M3 code."""
    values = [Fraction(v) for v in x]
    scale = e4m3(max(fl(fl(max(map(abs, values)) / 6) / tensor_scale), Fraction(1, 2**9)))
    step = fl(scale * tensor_scale)
    codes = [8 * (copysign(1, f) < 0) + code(e2m1(fl(v / step)), 1, 0) for v, f in zip(values, x)]
    return codes, code(scale, 3, -6)


def decode(element: int, scale: int) -> Fraction:
    """Value of an E2M1 code times an E4M3 code, both positive scales."""
    exponent, mantissa = divmod(element % 8, 2)
    magnitude = Fraction(mantissa, 2) if exponent == 0 else (1 + Fraction(mantissa, 2)) * 2 ** (exponent - 1)
    scale_exponent, scale_mantissa = divmod(scale, 8)
    factor = (
        Fraction(scale_mantissa, 8) * Fraction(1, 64)
        if scale_exponent == 0
        else (1 + Fraction(scale_mantissa, 8)) * Fraction(2) ** (scale_exponent - 7)
    )
    return (-magnitude if element >= 8 else magnitude) * factor


def toward_zero(x: Fraction, unit: Fraction) -> Fraction:
    """The multiple of `unit` at x, or next to it on the side of zero."""
    return (abs(x) // unit) * unit * (1 if x > 0 else -1)


def exponent_of(x: float, least: int) -> int:
    return max(frexp(x)[1] - 1, least)


def tensor_core(terms: list[tuple[Fraction, int]], c: float, fraction_bits: int, zero_exponent: int) -> float:
    """D of one step: terms (value, exponent) and C, aligned, cut off, summed, cut off to float32."""
    if not isfinite(c):
        return c
    terms = [*terms, (Fraction(c), exponent_of(c, -126) if c else zero_exponent)]
    unit = Fraction(2) ** (max(exponent for _, exponent in terms) - fraction_bits)
    total = sum((toward_zero(value, unit) for value, _ in terms), Fraction(0))
    if abs(total) >= 2**128:
        return inf if total > 0 else -inf
    return float(toward_zero(total, Fraction(2) ** (exponent_of(float(total), -126) - 23)))


def nvfp4_step(a_codes: list[int], b_codes: list[int], sfa: list[int], sfb: list[int], c: float) -> float:
    """One output of mma.m16n8k64 mxf4nvf4 on an RTX Blackwell GPU; one = 0x38 is the scale 1.0."""
    one, terms = 0x38, []
    scales = [[scale % 128 for scale in side] for side in (sfa, sfb)]
    if 0x7F in scales[0] + scales[1]:
        return nan
    for g, (s, t) in enumerate(zip(*scales)):
        block = slice(16 * g, 16 * g + 16)
        products = [decode(x, one) * decode(y, one) for x, y in zip(a_codes[block], b_codes[block])]
        value = sum(products) * decode(2, s) * decode(2, t)
        has_product = any(products) and s and t
        terms.append((value, max(s // 8, 1) + max(t // 8, 1) - 14 if has_product else -139))
    return tensor_core(terms, c, 35, -139)


def half_step(a: list[float], b: list[float], c: float, least_exponent: int) -> float:
    """One output of mma.m16n8k16 on a Hopper GPU; the least exponent is -14 for fp16, -126 for bf16."""
    everything = sum((x * y for x, y in zip(a, b)), c)
    if not isfinite(everything):
        return everything
    exponents = [exponent_of(x, least_exponent) + exponent_of(y, least_exponent) for x, y in zip(a, b)]
    terms = [(Fraction(x) * Fraction(y), e if x * y else -133) for x, y, e in zip(a, b, exponents)]
    return tensor_core(terms, c, 25, -133)
