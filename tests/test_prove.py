"""The proof by exhaustion: that it tries what it says, and that a wrong bound does not survive it."""

from fractions import Fraction
from itertools import product

import exact
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import finite_bf16, in_bfloat16

from arcquant_ref import augment_activations, bounds, encode_e2m1, encode_e4m3, prove
from arcquant_ref.augment import merge
from arcquant_ref.formats import BLOCK, E4M3
from arcquant_ref.quantize import exact_values, quantize

LEAST = 2.0**-9  # the least E4M3


@pytest.fixture(scope="module")
def some() -> prove.Sweep:
    """Every bfloat16 element; every 32nd amax, those where the block scale is a tie, and in each regime the
    one where the bound is the largest part of it, with its neighbours."""
    x = prove.bfloat16()
    amaxes = prove.that_matter(x)
    chosen = [amaxes[::32], amaxes[np.isin(amaxes, 6 * E4M3.midpoints.astype(np.float64))]]
    for scheme, bound in prove.BOUNDS.items():
        for low, high in prove.regimes(scheme).values():
            inside = np.flatnonzero((amaxes >= low) & (amaxes < high))
            at = inside[np.argmax(bound(amaxes[inside]) / amaxes[inside])]
            chosen.append(amaxes[at - 1 : at + 2])
    return prove.sweep(x, np.unique(np.concatenate(chosen)))


def test_its_own_rounding_is_everybodys():
    x = finite_bf16()
    x = x[~np.signbit(x)]
    for grid, encode in ((prove.ELEMENT, encode_e2m1), (prove.SCALE, encode_e4m3)):
        own = [prove.nearest_code(float(value), grid) for value in x]
        np.testing.assert_array_equal(own, encode(x))


@given(
    st.lists(st.sampled_from(prove.bfloat16()[0x3C00:0x4000]), min_size=3, max_size=9, unique=True),
    st.integers(-9, 14),
)
@settings(max_examples=20)
def test_a_sweep_finds_the_worst_of_all_blocks(numbers, power):
    """Rational arithmetic, and every block with the last of these numbers as its amax and two more of them:
    no error depends on more than its own number, the amax and the number that sets the second scale."""
    numbers = sorted(float(n) * 2.0**power for n in numbers)
    swept = prove.sweep(np.array(numbers), np.array(numbers[-1:]))
    worst = [Fraction(0), Fraction(0)]
    for pair in product(numbers, repeat=2):
        block = [numbers[-1], *pair] + [0.0] * (BLOCK - 3)
        codes, scale = exact.quantize_block(block, Fraction(1))
        residual = [Fraction(x) - exact.decode(c, scale) for x, c in zip(block, codes)]
        again, second = exact.quantize_block([float(r) for r in residual], Fraction(1))
        left = [abs(r - exact.decode(c, second)) for r, c in zip(residual, again)]
        worst = [max(worst[0], *map(abs, residual)), max(worst[1], *left)]
    assert [float(w) for w in worst] == swept.worst[:, 0].tolist()


def test_every_bound_holds_and_is_attained_in_every_regime(some):
    regimes = prove.by_regime(some)
    assert {regime.scheme for regime in regimes} == {"NVFP4", "ARC"}
    assert len(regimes) == 9
    for regime in regimes:
        assert regime.worst_ratio == 1, regime
        # The supremum is a limit at an amax that has a bfloat16 within 2⁻⁷ of itself, next to which the worst
        # element may be missing: at 51 u, N(9 u) = 3 u is a limit from below, and from 32 u on bfloat16 is of
        # 1/4 u. Elsewhere less is missing.
        assert (1 - 2.0**-7) * (1 - 1 / 12) * regime.supremum < regime.attained <= regime.supremum, regime
        x = np.array([regime.block], np.float32)
        if regime.scheme == "NVFP4":
            error = np.abs(exact_values(quantize(x, 1)) - x).max()
        else:
            error = np.abs(merge(augment_activations(x, prove.ALL, 1), prove.ALL) - x).max()
        assert error / x.max() == pytest.approx(regime.attained, rel=1e-15)


def test_no_bound_could_be_lower_anywhere():
    """Every float16 at a kink of the bounds and its neighbours: up to the next amax, the bound is reached."""
    x = prove.float16()
    at = np.flatnonzero(np.isin(x, prove.kinks()) & np.isin(x, prove.that_matter(x)))
    swept = prove.sweep(x, x[np.unique([at - 1, at, at + 1])])
    for worst, bound in zip(swept.worst, prove.BOUNDS.values()):
        reached = np.maximum.accumulate(worst)[1:] / bound(swept.amaxes[:-1])
        # N(9 u) = 3 u is a limit from below, to which float16, of 1/32 u from 32 u on, comes within 1/32 u
        assert reached.min() >= 1 - 1 / 96


@pytest.mark.parametrize("factor", [1 - 2.0**-30, 0.9])
def test_a_bound_that_is_too_low_is_refuted(some, factor, monkeypatch):
    right = bounds.nvfp4_in_units
    monkeypatch.setattr(bounds, "nvfp4_in_units", lambda amax: factor * right(amax))
    assert max(regime.worst_ratio for regime in prove.by_regime(some)) > 1


def test_the_constants_are_the_suprema_of_the_normal_range():
    beyond = np.nextafter(2688, 3000)
    assert prove.regimes("NVFP4")["normal"] == (6 * 2.0**-6, beyond)
    assert prove.supremum(prove.nvfp4, 6 * 2.0**-6, beyond) == pytest.approx(3 / 17, rel=1e-9)
    low = 700 / 3 * LEAST
    assert prove.regimes("ARC")["normal"] == (low, beyond)
    assert prove.supremum(prove.arc, low, beyond) == pytest.approx(3 / 100, rel=1e-9)
    assert prove.supremum(prove.arc, low * 0.999, beyond) > 3 / 100 * 1.00001


@pytest.mark.parametrize(
    ("constant", "low", "high"),
    [(bounds.MXFP8_CEILING, 4.25 * LEAST, 4176), (bounds.MXFP8_FLOOR, 2 * LEAST, 6144)],
)
def test_where_arc_errs_more_than_mxfp8(constant, low, high):
    assert prove.range_below(prove.arc, float(constant)) == (low, high)
    quarters = np.concatenate([np.arange(1, 64), np.arange(64, 4 * 7000 * 512, 4)])  # kinks, see prove.kinks
    amax = quarters * LEAST / 4  # in between the bound is linear
    above = prove.arc(amax) > float(constant) * amax * (1 + 1e-12)
    inner = (amax != low) & (amax != high)  # at the ends it is equal, or jumps
    np.testing.assert_array_equal(above[inner], ((amax < low) | (amax > high))[inner])


def test_an_eighth_is_the_largest_power_of_two_that_tau_may_be():
    """A plain channel then errs by at most 3/17 · τ of the largest channel amax, less than ARC's 3/100 in the
    others; that holds up to τ = 17/100."""
    assert bounds.NVFP4 * Fraction(1, 8) < bounds.ARC < bounds.NVFP4 * Fraction(1, 4)
    assert Fraction(17, 100) == bounds.ARC / bounds.NVFP4


@pytest.mark.parametrize("tensor_scale", [1.0, 1 / 3, 1.7808476686477661])
def test_float32_comes_within_an_ulp_or_two(tensor_scale):
    for found in prove.search_float32(tensor_scale):
        nearest = 2 if tensor_scale == 1 else 32  # elsewhere thresholds lie between float32 numbers
        assert 1 - nearest * 2.0**-24 < found.ratio < 1 + bounds.ROUNDING_RELATIVE
        x = np.array([found.block], np.float32)
        if found.scheme == "NVFP4":
            assert bounds.check(x, quantize(x, tensor_scale)).holds
        else:
            assert bounds.check(x, augment_activations(x, prove.ALL, tensor_scale), prove.ALL).holds


def test_mx_attains_what_it_must():
    for scheme, mx in prove.MX.items():
        attained = prove.mx_attained(mx, prove.bfloat16())
        assert attained == pytest.approx(in_bfloat16(mx.constant, mx.rule), rel=2.0**-51), scheme
        assert attained <= float(mx.constant)


def test_the_table_is_in_order():
    for line in prove.table(prove.by_regime(prove.sweep(prove.bfloat16(), np.float64([1.0, 9.4375])))):
        assert line.normal_data < line.constant
        assert line.real_layers <= line.constant * (1 + 2.0**-19)
        assert line.paper is None or line.paper >= line.constant
