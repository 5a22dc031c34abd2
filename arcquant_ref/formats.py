"""The number formats. The widths of E2M1, E4M3 and E8M0 stand here; every constant of theirs is computed."""

from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import checks

Codes = NDArray[np.uint8]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Scalar = TypeVar("Scalar", bound=np.generic)

BLOCK = 16  # neighbours along K that share one NVFP4 block scale


@dataclass(frozen=True)
class FloatFormat:
    """A small binary float without infinities: sign, exponent and mantissa fields, from high to low bits."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    sign_bits: int = 1
    nan_codes: int = 0  # how many magnitude codes, counted from the top, mean NaN
    subnormals: bool = True  # False: exponent field 0 is one more binade, and there is no zero

    @property
    def magnitude_bits(self) -> int:
        return self.exponent_bits + self.mantissa_bits

    @property
    def bits(self) -> int:
        return self.sign_bits + self.magnitude_bits

    @property
    def bias(self) -> int:
        """What is subtracted from the exponent field: field − bias is the exponent."""
        return int(2 ** (self.exponent_bits - 1) - 1)

    @cached_property
    def magnitudes(self) -> Float64:
        """Value of every finite magnitude code, in order: the one table of this format."""
        code = np.arange(2**self.magnitude_bits - self.nan_codes)
        exponent, mantissa = np.divmod(code, 2**self.mantissa_bits)
        if not self.subnormals:
            return _frozen(np.ldexp(1 + mantissa / 2**self.mantissa_bits, exponent - self.bias))
        hidden_one = exponent > 0  # subnormals have none
        return _frozen(
            np.ldexp(hidden_one + mantissa / 2**self.mantissa_bits, np.maximum(exponent, 1) - self.bias)
        )

    @cached_property
    def midpoints(self) -> Float32:
        """Where rounding changes its mind: halfway between neighbouring magnitudes. Exact in float32."""
        return _frozen(((self.magnitudes[:-1] + self.magnitudes[1:]) / 2).astype(np.float32))

    @cached_property
    def values(self) -> Float32:
        """Value of every code, sign and NaN included."""
        magnitudes = np.append(self.magnitudes, [np.nan] * self.nan_codes)
        return _frozen(np.concatenate([magnitudes, -magnitudes][: 1 + self.sign_bits]).astype(np.float32))

    @property
    def nan_code(self) -> int:
        """The least magnitude code that means NaN; one past the top where there is none."""
        return len(self.magnitudes)

    @property
    def max(self) -> float:
        """The largest value."""
        return float(self.magnitudes[-1])

    @property
    def least_normal(self) -> float:
        """The least value with the 1 that is not stored; below it are the subnormals."""
        return float(self.magnitudes[2**self.mantissa_bits if self.subnormals else 0])

    @property
    def least_positive(self) -> float:
        """The least value above 0."""
        return float(self.magnitudes[self.magnitudes > 0][0])


def _frozen(array: NDArray[Scalar]) -> NDArray[Scalar]:
    array.flags.writeable = False  # the tables are shared
    return array


E2M1 = FloatFormat("E2M1", exponent_bits=2, mantissa_bits=1)
E4M3 = FloatFormat("E4M3", exponent_bits=4, mantissa_bits=3, nan_codes=1)
E8M0 = FloatFormat("E8M0", exponent_bits=8, mantissa_bits=0, sign_bits=0, nan_codes=1, subnormals=False)


NVFP4_BITS = E2M1.bits + E4M3.bits / BLOCK  # 4.5 a value, the tensor scale not counted


def encode(fmt: FloatFormat, x: Float32) -> Codes:
    """Nearest codes of `x`, any shape: midpoints go to the even code, beyond ±max becomes ±max, −0 stays."""
    assert fmt.sign_bits, f"{fmt.name} has no sign; its scales are powers of two, found without rounding"
    ties_down = np.searchsorted(fmt.midpoints, np.abs(x), side="left")
    ties_up = np.searchsorted(fmt.midpoints, np.abs(x), side="right")
    magnitude = np.where(ties_down % 2 == 0, ties_down, ties_up)
    return (magnitude | np.signbit(x).astype(np.uint8) << fmt.magnitude_bits).astype(np.uint8)


def decode(fmt: FloatFormat, codes: Codes) -> Float32:
    """Values of `codes`, any shape. Every one is exact in float32; NaN codes give NaN."""
    return fmt.values[codes]


def encode_e2m1(x: ArrayLike) -> Codes:
    """Nearest E2M1 (FP4) codes 0 … 15 of `x`, any shape; ties to even, saturating at ±6, −0 kept.

    `x` is float16, bfloat16 (of ml_dtypes), float32 or float64 (rounded once to float32). Raises TypeError
    for another dtype, ValueError for NaN, infinity or an empty array. Source: OCP Microscaling Formats 1.0,
    section 5.3.3.

    >>> encode_e2m1(np.float32([0.25, 0.75, 2.5, -5, 100]))
    array([ 0,  2,  4, 14,  7], dtype=uint8)
    """
    return encode(E2M1, checks.floats("x", x))


def encode_e4m3(x: ArrayLike) -> Codes:
    """Nearest E4M3 (FP8) codes of `x`, any shape; ties to even, saturating at ±448, −0 kept.

    Dtypes and errors as in `encode_e2m1`. Source: OCP 8-bit Floating Point Specification 1.0.

    >>> encode_e4m3(np.float32([1, 448, 1e9, 2**-10])), "1.0, max, saturated, tie to zero"
    (array([ 56, 126, 126,   0], dtype=uint8), '1.0, max, saturated, tie to zero')
    """
    return encode(E4M3, checks.floats("x", x))


def decode_e2m1(codes: ArrayLike) -> Float32:
    """Values of E2M1 codes, any shape, float32. Raises TypeError unless uint8, ValueError above 15.

    >>> decode_e2m1(np.arange(8, dtype=np.uint8))
    array([0. , 0.5, 1. , 1.5, 2. , 3. , 4. , 6. ], dtype=float32)
    """
    return decode(E2M1, checks.codes("codes", codes, E2M1.bits))


def decode_e4m3(codes: ArrayLike) -> Float32:
    """Values of E4M3 codes, any shape, float32; 0x7F and 0xFF are NaN. Raises TypeError unless uint8.

    >>> decode_e4m3(np.uint8([0x01, 0x38, 0x7E, 0x7F]))
    array([1.953125e-03, 1.000000e+00, 4.480000e+02,          nan],
          dtype=float32)
    """
    return decode(E4M3, checks.codes("codes", codes, E4M3.bits))
