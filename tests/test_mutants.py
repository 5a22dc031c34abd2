"""Planted bugs: each of these one-line changes must make the tests of what it changes fail.

Runs in the profiles ci and thorough; `CI=1 pytest tests/test_mutants.py` runs it alone.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = ("formats", "layout", "tensor", "quantize", "select", "augment", "gemm", "bounds", "baselines")
MUTANTS = [
    ("formats", "ties_down % 2 == 0, ties_down, ties_up", "True, ties_down, ties_up"),  # ties toward zero
    ("formats", "ties_down % 2 == 0, ties_down, ties_up", "True, ties_up, ties_up"),  # ties away
    ("formats", "ties_down % 2 == 0", "ties_down % 2 == 1"),  # ties to odd
    ("formats", "np.signbit(x).astype(np.uint8)", "(x < 0).astype(np.uint8)"),  # −0 loses its sign
    ("formats", "np.maximum(exponent, 1) - self.bias", "exponent - self.bias"),  # subnormals halved
    ("formats", "mantissa_bits=3, nan_codes=1", "mantissa_bits=3, nan_codes=0"),  # E4M3 up to 480
    ("layout", "pairs >> E2M1.bits", "pairs >> 2 * E2M1.bits"),  # odd k on top of even k
    ("layout", "np.bitwise_or(pairs, pairs", "np.bitwise_or(pairs >> 8, pairs"),  # nibbles swapped
    ("layout", "(row % 32) * 16 + (row % TILE_ROWS // 32) * 4", "(row % TILE_ROWS) * 4"),  # rows in order
    ("layout", "np.zeros(size, np.uint8)", "np.full(size, 255, np.uint8)"),  # padding
    ("tensor", "layout.pack(self.codes)", "layout.pack(self.codes[:, ::-1])"),
    ("quantize", "np.abs(x).max()\n", "x.max()\n"),  # signed tensor amax
    ("quantize", "amax = np.abs(blocks).max(axis=-1)", "amax = blocks.max(axis=-1)"),  # signed block amax
    ("quantize", "amax / F32(E2M1.max) / scale", "amax / (F32(E2M1.max) * scale)"),  # order
    ("quantize", "amax / F32(E2M1.max) / scale", "amax * (F32(1) / F32(E2M1.max)) / scale"),
    (
        "quantize",
        "blocks / step[..., None]).reshape(",
        "blocks * (F32(1) / step[..., None])).reshape(",
    ),  # reciprocal
    (
        "quantize",
        "blocks / step[..., None]).reshape(",
        "blocks / scale / decode(E4M3, block_scales)[..., None]).reshape(",
    ),  # order
    ("quantize", "F32(E4M3.least_positive)", "F32(E4M3.least_normal)"),  # floor of other libraries
    ("quantize", "F32(E4M3.least_positive)", "F32(0)"),  # no floor
    ("quantize", "amax / F32(E2M1.max * E4M3.max)", "amax / F32(E2M1.max) / F32(E4M3.max)"),
    ("quantize", "checks.LEAST_NORMAL)\n", "F32(0))\n"),  # subnormal tensor scales
    ("quantize", "        return F32(1)\n", "        return checks.LEAST_NORMAL\n"),  # all-zero tensor
    ("quantize", "(x - exact_values(q)).astype(np.float32)", "x - dequantize(q)"),  # residual rounded twice
    ("quantize", "(x - exact_values(q))", "(exact_values(q) - x)"),  # sign of the residual
    ("quantize", "better = error < best_error", "better = error <= best_error"),  # of equals the largest
    ("quantize", "(last - first).max()) + 1)", "(last - first).max()))"),  # one code short
    ("quantize", "SEARCHED = 8.0,", "SEARCHED = 7.0,"),  # begins late
    ("quantize", "float(E2M1.midpoints[-2])", "float(E2M1.magnitudes[-2])"),  # ends early
    ("quantize", "amax / F32(m) / scale", "amax / (F32(m) * scale)"),  # order
    ("quantize", "* difference[..., i] * energy[:, i]", "* difference[..., i]"),  # all channels alike
    ("quantize", "* difference[..., i] * energy[:, i]", "* energy[:, i]"),  # not squared
    (
        "select",
        "[self.order[:plain], self.weight_channels, self.order[plain:]]",
        "[self.order, self.weight_channels]",
    ),
    (
        "select",
        "return self.K + self.num_residual + len(self.weight_channels)",
        "return self.K + self.num_residual",
    ),
    ("select", '"version": "2"', '"version": "1"'),
    ("select", "(amax > checks", "(amax >= checks"),  # a channel at τ
    ("select", "np.float64(amax.max())", "amax.max()"),  # threshold in float32
    ("select", "-(-outliers // multiple) * multiple", "(outliers // multiple + 1) * multiple"),
    ("select", 'kind="stable"', 'kind="stable")[::-1].copy('),  # outliers first
    ("select", "np.maximum(amax, batch_amax)", "batch_amax"),  # calibration forgets
    ("augment", "quantize(r, primary.tensor_scale)", "quantize(r, np.float32(1))"),
    ("augment", "r = residual(x, primary)", "r = 0 * residual(x, primary)"),
    ("augment", "[:, -selection.num_residual :]", "[:, : selection.num_residual]"),
    (
        "augment",
        "np.stack([n - s // BLOCK + appended, n + appended], axis=1)",
        "np.stack([n + appended, n - s // BLOCK + appended], axis=1)",
    ),
    ("augment", "q.block_scales[:, blocks])", "q.block_scales[:, blocks][:, ::-1])"),  # scale bytes swapped
    ("layout", "+ s % TILE_COLS", "+ (s % TILE_COLS ^ 1)"),  # neighbouring scale bytes swapped
    ("layout", "row, s = np.arange(rows)[:, None]", "row, s = np.arange(rows)[::-1, None]"),  # index
    ("augment", "pairs.ravel()", "pairs.ravel(order='F')"),  # not interleaved
    ("augment", 'matching("w", w, selection)[:, selection.order], ', 'matching("w", w, selection), '),
    ("augment", "quantize_weighted(w, energy[order])", "quantize_weighted(w, energy)"),  # energy out of order
    ("augment", "(r, energy[repaired], scale)", "(r, energy[: len(repaired)], scale)"),
    ("augment", "second = quantize(r, scale) if", "second = quantize(r) if"),  # a tensor scale of its own
    ("augment", "[:, np.argsort(order)[repaired]]", "[:, repaired]"),  # channels taken for places
    ("augment", "np.insert(block, plain, ", "np.insert(block, len(block), "),  # after the last S
    ("augment", "r = residual(w, primary)", "r = 0 * residual(w, primary)"),
    (
        "augment",
        "np.delete(values, np.s_[plain : plain + len(selection.weight_channels)], axis=1)",
        "values[:, : selection.K]",
    ),  # a weight channel for one of the last S
    ("gemm", "* UNIT**2  #", "* UNIT  #"),
    ("gemm", "if exact > nearest else", "if exact < nearest else"),
    ("gemm", "    for i in zip(*np.nonzero(low != high)):", "    for i in []:"),  # Ziv's test left out
    ("bounds", "if midpoint >= Fraction(E4M3.least_normal)", "if midpoint >= 0"),
    ("bounds", "E2M1.max * E4M3.least_positive / 2, 0)", "E4M3.least_positive / 2, 0)"),  # "at most one step"
    ("bounds", "np.diff(E2M1.magnitudes) / 2, np.inf)", "np.diff(E2M1.magnitudes) / 2, 0)"),  # saturation
    (
        "bounds",
        "np.minimum(first, _after_rounding(first, tensor_scale))",
        "float(NVFP4) * first",
    ),  # not sharp
    (
        "bounds",
        "scale = np.maximum(scale, E4M3.least_positive)",
        "scale = np.maximum(scale, E4M3.least_normal)",
    ),
    ("bounds", "amax = amax * (1 + ROUNDING_RELATIVE) + ROUNDING_ABSOLUTE\n", "pass\n"),
    ("bounds", "ROUNDING_ABSOLUTE = 2.0**-146", "ROUNDING_ABSOLUTE = 2.0**-125"),
    ("bounds", "x.shape[-1] * 2.0**-50", "2.0**-20"),
    ("bounds", "accumulation=accumulation + float64_sum", "accumulation=float64_sum"),
    ("bounds", "nan=np.inf", "nan=0.0"),
    ("baselines", "fraction > max_fraction", "fraction >= max_fraction"),
    ("baselines", "- int(np.frexp(fmt.max)[1])", "- int(np.frexp(fmt.max)[1]) + 1"),
    ("baselines", "np.stack([a + b, a - b], axis=1)", "np.stack([a + b, b - a], axis=1)"),
    ("baselines", "np.stack([a + b, a - b], axis=1)", "np.stack([a + b, a - b], axis=2)"),
    ("baselines", "x.shape[1] & -x.shape[1]", "2"),  # not the whole power of two
    ("baselines", "w ** (1 - alpha)", "w**alpha"),
    ("baselines", "used = (a > 0) & (w > 0)", "used = a > 0"),
]


STEPS, PRODUCT, CODES = "test_tensor_core.py", "test_emulator_gemm.py", "test_agreement.py"
BOUNDS, PROOF = "test_bounds.py", "test_prove.py"
BOUNDS_MUTANTS = [  # that only the emulator, or the proof, can tell
    ("bounds", PRODUCT, "error + 5 * 2.0**-35 *", "error + 2.0**-40 *"),
    ("bounds", PRODUCT, "error + 2.0**-23 *", "error + 2.0**-26 *"),
    ("bounds", BOUNDS, "np.abs(w - w_hat).T\n", "np.abs(w - w_hat).T / 2\n"),
    ("bounds", PRODUCT, "(scale * 2.0**-22 + 2.0**-149) + 2.0**-149", "0"),  # the epilogue's rounding
    (
        "bounds",
        BOUNDS,
        "bounds[:, first:] = arc_bound(amax[:, first:], tensor_scale)",
        "bounds[:, first:] = nvfp4_bound(amax[:, first:], tensor_scale)",
    ),
    (
        "bounds",
        BOUNDS,
        "amax.shape[1] - selection.num_residual // BLOCK",
        "(selection.K - selection.num_residual) // BLOCK",
    ),  # a weight channel's second place promised a residual
    ("bounds", BOUNDS, "remaining[:, repaired] -= w_hat[:, again]", "pass"),
    ("bounds", BOUNDS, "columns[:, again] = w_hat[:, again]", "columns[:, again] = 0"),
    ("bounds", BOUNDS, "quantize(w) if energy is None else quantize_weighted(w, energy)", "quantize(w)"),
    ("bounds", BOUNDS, "(true == got) | np.isinf(bound)", "true == got"),  # no bound is a violation
    ("bounds", BOUNDS, "np.where(unbounded, -1, ratio)", "ratio"),  # and may be called the worst
    ("bounds", PROOF, 'amax, side="right")', 'amax, side="left")'),  # a tie that goes to the larger scale
    ("bounds", PROOF, "np.maximum(error, rounded_down)", "error"),
    ("prove", PROOF, "residual[j] >= residual[count - 1]", "residual[j] >= 0"),  # amax without a residual
    ("prove", PROOF, "if residual[j] > largest[code]:", "if residual[j] < largest[code]:"),
    ("prove", PROOF, 'count = np.searchsorted(x, amaxes[i], side="right")', "count = len(x)"),  # beyond amax
    ("prove", PROOF, "(1 - fraction)]", "(2 - fraction)]"),
]
EMULATOR_MUTANTS = [
    ("tensor_core", STEPS, "fraction_bits=35", "fraction_bits=34"),
    ("tensor_core", STEPS, "fraction_bits=35", "fraction_bits=36"),
    ("tensor_core", STEPS, "fraction_bits=35", "fraction_bits=25"),
    ("tensor_core", STEPS, "fraction_bits=25", "fraction_bits=24"),
    ("tensor_core", STEPS, "zero_exponent=-133", "zero_exponent=-139"),
    ("tensor_core", STEPS, "total += np.trunc(terms[i] * up)", "total += np.floor(terms[i] * up)"),
    ("tensor_core", STEPS, "total = np.trunc(f64(c) * up)", "total = np.floor(f64(c) * up)"),
    ("tensor_core", STEPS, "total = np.trunc(f64(c) * up)", "total = f64(c) * up"),  # C kept exact
    ("tensor_core", STEPS, "return toward_zero(total * down)", "return f32(total * down)"),  # to nearest
    (
        "tensor_core",
        STEPS,
        "        total += np.trunc(terms[i] * up)\n",
        "        total += terms[i] * up\n    total = np.trunc(total)\n",
    ),  # groups summed before they are cut off
    ("tensor_core", STEPS, "elif products[g, r, n] != 0:", "else:"),  # a zero group keeps its exponent
    ("tensor_core", STEPS, "elif products[g, r, n] != 0:", "elif dots[g, r, n] != 0:"),  # a cancelled one not
    ("tensor_core", STEPS, " * 2.0**-149 + 0.0)", " * 2.0**-149)"),  # −0
    ("tensor_core", STEPS, "exponents_b[n, g] == HAS_NAN", "False"),  # a NaN scale is a number
    ("tensor_core", STEPS, "scale = block_scales[row, b] & UNSIGNED", "scale = block_scales[row, b]"),
    ("tensor_core", STEPS, "else value_e4m3(scale)", "else value_e4m3(scale) * f32(scale > 7)"),  # subnormals
    ("tensor_core", STEPS, "exponent = np.full(5, core.zero_exponent)", "exponent = np.full(5, 16)"),
    ("tensor_core", STEPS, "if any_product and m_a", "if significand[g] != 0 and m_a"),
    ("tensor_core", STEPS, "magnitude = abs(integer) >>", "magnitude = -(-abs(integer)) // 1 + 1 >>"),
    ("gemm", PRODUCT, "GROUP_UNIT\n", "GROUP_UNIT + 1\n"),  # a group that loses one bit is thought plain
    ("gemm", PRODUCT, "fraction_bits - MANTISSA", "fraction_bits - MANTISSA + 1"),  # and a C that does
    ("gemm", PRODUCT, "lowest + KEEPS_GROUP + 1", "lowest + KEEPS_GROUP + 2"),
    ("gemm", PRODUCT, "(abs(c[n]) < beyond)", "(abs(c[n]) <= beyond)"),
    ("gemm", PRODUCT, "return HAS_NAN, -HAS_NAN", "return highest, lowest"),
    ("gemm", PRODUCT, "f32(tensor_scale_a * tensor_scale_b)", "f32(tensor_scale_a)"),
    ("formats", CODES, "u32(binade + to_magic)", "u32(binade + to_magic + (1 << 23))"),
    ("quantize", CODES, "/ E2M1_MAX / tensor_scale", "/ (E2M1_MAX * tensor_scale)"),
    ("quantize", CODES, "/ step[b]))", "* (f32(1) / step[b])))"),  # reciprocal
    ("quantize", CODES, "amax = max(amax, fours[four])", "amax = fours[four]"),  # of the last four
    ("quantize", CODES, "max(v, LEAST_SCALE)", "v"),  # no floor
    (
        "augment",
        CODES,
        "fma(-value, tensor_scale, float_of(bits[i]))",
        "float_of(bits[i]) - value * tensor_scale",
    ),  # rounded twice
    ("augment", CODES, "/ step[b]))", "* (f32(1) / step[b])))"),  # reciprocal
    ("quantize", CODES, "(pairs[row, i] >> 4)", "(pairs[row, i] >> 8)"),  # pack loses the odd codes
    (
        "augment",
        CODES,
        "block_scales[source], appended_scales[b]",
        "block_scales[source], block_scales[source]",
    ),
    ("augment", CODES, "first + 2 * b", "first + b"),
    (
        "augment",
        CODES,
        "range(len(appended_scales) - 1, -1, -1)",
        "range(len(appended_scales))",
    ),  # overwrites
    ("augment", CODES, "residual_of(outliers,", "residual_of(tail,"),  # the next row's
    ("augment", CODES, "load(x[min(row + 1, last)], scratch)", "load(x[row], scratch)"),
]
EMULATOR_MUTANTS += [
    ("quantize", CODES, "if error < least or", "if error <= least or"),  # of equals the largest
    ("quantize", CODES, "range(first, last + 1)", "range(first, max(last, first + 1))"),  # one code short
    ("quantize", CODES, "difference * difference * weights[i]", "difference * difference"),
    ("quantize", CODES, "float_of(amax) / steps / tensor_scale", "float_of(amax) / (steps * tensor_scale)"),
    ("augment", CODES, "quantize_weighted(w, energy[order], scale)", "quantize_weighted(w, energy, scale)"),
    ("augment", CODES, "second = quantize(r, scale) if", "second = quantize(r) if"),
    ("augment", CODES, "np.insert(codes, [selection.K - s], ", "np.insert(codes, [selection.K], "),
    (
        "augment",
        CODES,
        'scale = tensor_scale_for("w", w, bits_in("w", w), None)',
        "scale = None",
    ),  # other words
]


PLAN = "test_plan.py"
PLAN_MUTANTS = [
    (
        "plan",
        PLAN,
        "self.energy[np.ix_(positions, positions)].sum()",
        "np.diagonal(self.energy)[positions].sum()",
    ),
    ("plan", PLAN, ".sum(axis=1) - self.inside", ".sum(axis=1)"),  # a block without its pairs
    ("plan", PLAN, "self.sums -= self.energy[:, positions].sum(axis=1)", "pass"),
    ("plan", PLAN, "offers[1][0] > offers[0][0]", "offers[1][0] < offers[0][0]"),  # the worse side
    ("plan", PLAN, 'kind="stable")[-BLOCK:]', 'kind="stable")[:BLOCK]'),  # the worst channels
    ("plan", PLAN, 'chosen["activation"][::-1]', 'chosen["activation"]'),
    ("plan", PLAN, "sum(cost * steps for", "sum(steps for"),  # cost ignored
    ("plan", PLAN, "r + price * cost * np.arange", "r + price * np.arange"),
    ("plan", PLAN, "if spent(choose(price)) <= budget", "if spent(choose(price)) < budget"),
    ("plan", PLAN, "/ len(x) * (weighted_w", "* (weighted_w"),  # a sum, no mean
    ("plan", PLAN, "(weighted_x.T @ x)", "(weighted_x.T @ weighted_x)"),  # weights squared
]


BASELINES = "test_emulator_baselines.py"
EMULATOR_MUTANTS += [
    ("baselines", BASELINES, "fraction - (_bits_of", "fraction + u32(1) - (_bits_of"),  # 448 and 6 doubled
    ("baselines", BASELINES, "    return u32(0)\n", "    return u32(2**MANTISSA // 2)\n"),  # to nearest
    ("baselines", BASELINES, "u32(top_exponent - LEAST_EXPONENT))", "u32(0))"),  # scales below 2⁻¹²⁷
    ("baselines", BASELINES, "min(u32(bits & MAGNITUDE), top)", "u32(bits & MAGNITUDE)"),  # not saturating
    (
        "baselines",
        BASELINES,
        "(float_of(magnitude) + magic)",
        "(float_of(u32(magnitude + 1)) + magic)",
    ),  # ties
    ("baselines", BASELINES, "np.rint(float_of(bits[i]) / step)", "np.trunc(float_of(bits[i]) / step)"),
    ("baselines", BASELINES, "min(TOP_LEVEL, level)", "min(TOP_LEVEL + 1, level)"),
    ("baselines", BASELINES, "f32(1) if step == 0 else step", "step"),
    ("baselines", BASELINES, "squares4[part]) < sum_of", "squares4[part]) <= sum_of"),  # a tie goes to 4
    (
        "baselines",
        BASELINES,
        "total += squares[i] + squares[i + BLOCK // 2]",
        "total += squares[2 * i] + squares[2 * i + 1]",
    ),
    (
        "baselines",
        BASELINES,
        "* scale * tensor_amax / FOUR_OVER_SIX_MAX - x",
        "* scale * (tensor_amax / FOUR_OVER_SIX_MAX) - x",
    ),
    ("baselines", BASELINES, "f32(1) / (decode * scale)", "f32(1) / decode / scale"),
    ("baselines", BASELINES, "if nearest != MINUS_ZERO or scaled < 0 else", "if True else"),
    ("baselines", BASELINES, "MINUS_ZERO if magnitude >= ROUNDS_TO_EIGHT else code", "code"),  # clamped
    ("baselines", BASELINES, "NOT_FINITE if magnitude >= INF else code", "code"),
    ("baselines", BASELINES, "(scaled), EIGHT,", "(scaled), bits_of(E2M1_MAX),"),
    ("baselines", BASELINES, "max(amax, FOUR_OVER_SIX_MAX * LEAST_NORMAL)", "max(amax, f32(0))"),
]
RECIPES, COMPARE = "test_recipes.py", "test_compare.py"
EMULATOR_MUTANTS += [
    ("recipes", RECIPES, '"a / (6 * dec)"', '"a / 6 / dec"'),  # ModelOpt
    ("recipes", RECIPES, '"x * (1 / dec / s)"', '"x * (1 / (dec * s))"'),  # torchao
    ("recipes", RECIPES, "t(t(1 / A) * 2688)", "t(2688 / A)"),  # compressed-tensors: PyTorch's reciprocal
    ("recipes", RECIPES, "(codes == MINUS_ZERO) & ~(scaled < 0)", "codes == MINUS_ZERO"),
    ("recipes", RECIPES, "np.copysign(f32(8), scaled[eight])", "np.copysign(f32(6), scaled[eight])"),
    ("recipes", RECIPES, "(r.view(np.int32) + np.int32(ulp))", "(r.view(np.int32) - np.int32(ulp))"),
]
COMPARE_MUTANTS = [
    ("compare", COMPARE, "2)[:, :, ::-1].reshape(rows, k)", "2).reshape(rows, k)"),  # one order of nibbles
    ("compare", COMPARE, '"enc": 1 / t,', '"enc": t,'),  # a divisor taken for a multiplier
]


def run_pytest(folder: Path, tests: list[str]) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += ["--hypothesis-profile", "mutants", *(f"tests/{test}" for test in tests)]
    one_thread = {
        "NUMBA_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }  # as many runs at once as there are cores
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env=os.environ | one_thread | {"PYTHONPATH": "."}
    )


def run_on_a_copy(folder: Path, parts: list[str], file: str, old: str, new: str, tests: list[str]):
    """These tests on a copy in which one line is changed."""
    for part in [*parts, "tests"]:
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    source = (folder / file).read_text()
    assert source.count(old) == 1, "the line to change has moved: update the list"
    (folder / file).write_text(source.replace(old, new))
    return run_pytest(folder, tests)


def core_first(first: str) -> list[str]:
    return [f"test_{name}.py" for name in sorted(FILES, key=lambda name: name != first)]


BOTH = ["arcquant_ref", "emulator"]
RUNS = {
    f"{module}: {new.strip()}": (BOTH[:1], f"arcquant_ref/{module}.py", old, new, core_first(module))
    for module, old, new in MUTANTS
}
for package, mutants in (
    ("arcquant_ref", BOUNDS_MUTANTS),
    ("emulator", EMULATOR_MUTANTS),
    ("arcquant_ref", PLAN_MUTANTS),
    ("arcquant_ref", COMPARE_MUTANTS),
):
    RUNS |= {
        f"{package}/{module}: {new.strip()}": (BOTH, f"{package}/{module}.py", old, new, [tests])
        for module, tests, old, new in mutants
    }
NOTHING = ("arcquant_ref/gemm.py", "MAX_DEPTH = ", "MAX_DEPTH = ")
UNCHANGED = {  # or every mutant would be caught by the copying
    "unchanged core": (BOTH[:1], *NOTHING, core_first("formats")),
    "unchanged emulator": (
        BOTH,
        *NOTHING,
        [STEPS, PRODUCT, CODES, BOUNDS, PROOF, BASELINES, RECIPES, COMPARE, PLAN],
    ),
}
in_ci = pytest.mark.skipif(
    not os.environ.get("CI"), reason="in CI only: every mutant is a test run of its own"
)


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory) -> Iterator[dict[str, Future]]:
    """All runs that were asked for, started at once; each test waits for its own."""
    names = [item.callspec.params["name"] for item in request.session.items if item.path == Path(__file__)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {
            name: pool.submit(run_on_a_copy, tmp_path_factory.mktemp("copy"), *(RUNS | UNCHANGED)[name])
            for name in names
        }


@in_ci
@pytest.mark.parametrize("name", RUNS)
def test_the_mutant_is_caught(name, runs):
    done = runs[name].result()
    assert done.returncode == 1, done.stdout[-2000:]
    assert "ERROR" not in done.stdout  # caught by a test, not by a broken import


@in_ci
@pytest.mark.parametrize("name", UNCHANGED)
def test_the_unchanged_copy_passes(name, runs):
    done = runs[name].result()
    assert done.returncode == 0, done.stdout[-2000:]
