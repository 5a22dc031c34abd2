"""NVFP4 once more in rational arithmetic, one number at a time: it shares nothing with the package.

`fl` rounds to float32 where the normative order of operations does; everything between is exact.
"""

from fractions import Fraction
from math import copysign


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
