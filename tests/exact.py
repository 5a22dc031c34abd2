"""NVFP4 once more in rational arithmetic, one number at a time: it shares nothing with the package.

`fl` rounds to float32 where the normative order of operations does; everything between is exact.
"""

from fractions import Fraction

BLOCK = 16
SIGN = {"e2m1": 8, "e4m3": 128}


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


def code(value: Fraction, negative: bool, mantissa_bits: int, least_exponent: int, sign: int) -> int:
    """The bits of an E2M1 or E4M3 value."""
    magnitude = abs(value)
    exponent = least_exponent
    while magnitude >= Fraction(2) ** (exponent + 1):
        exponent += 1
    units = magnitude / Fraction(2) ** (exponent - mantissa_bits)  # hidden bit included
    assert units.denominator == 1
    return (exponent - least_exponent) * 2**mantissa_bits + units.numerator + (sign if negative else 0)


def quantize_block(x: list[float], tensor_scale: Fraction, rounding=fl) -> tuple[list[int], int]:
    """Sixteen float32 → sixteen E2M1 codes and an E4M3 code. rounding=Fraction leaves out float32."""
    values = [Fraction(v) for v in x]
    v = rounding(rounding(max(map(abs, values)) / 6) / tensor_scale)
    scale = e4m3(max(v, Fraction(1, 2**9)))
    step = rounding(scale * tensor_scale)
    codes = [code(e2m1(rounding(v / step)), str(f)[0] == "-", 1, 0, SIGN["e2m1"]) for v, f in zip(values, x)]
    return codes, code(scale, False, 3, -6, SIGN["e4m3"])


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
