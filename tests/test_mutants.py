"""Planted bugs: each of these one-line changes to the core must make the tests of the core fail.

Runs in the profiles ci and thorough; `CI=1 pytest tests/test_mutants.py` runs it alone.
"""

import os
import shutil
import subprocess
import sys
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
    ("layout", "high, E2M1.bits", "low, E2M1.bits"),
    ("layout", "return low | ", "return high | "),
    ("layout", "(row % 32) * 16 + (row % TILE_ROWS // 32) * 4", "(row % TILE_ROWS) * 4"),  # rows in order
    ("layout", "np.zeros(size, np.uint8)", "np.full(size, 255, np.uint8)"),  # padding
    ("tensor", "layout.pack(self.codes)", "layout.pack(self.codes[:, ::-1])"),
    ("quantize", "np.abs(x).max()\n", "x.max()\n"),  # signed tensor amax
    ("quantize", "np.abs(blocks).max(axis=-1)", "blocks.max(axis=-1)"),  # signed block amax
    ("quantize", "amax / F32(E2M1.max) / scale", "amax / (F32(E2M1.max) * scale)"),  # order
    ("quantize", "amax / F32(E2M1.max) / scale", "amax * (F32(1) / F32(E2M1.max)) / scale"),
    ("quantize", "blocks / step[..., None]", "blocks * (F32(1) / step[..., None])"),  # reciprocal
    (
        "quantize",
        "blocks / step[..., None]",
        "blocks / scale / decode(E4M3, block_scales)[..., None]",
    ),  # order
    ("quantize", "F32(E4M3.least_positive)", "F32(E4M3.least_normal)"),  # floor of other libraries
    ("quantize", "F32(E4M3.least_positive)", "F32(0)"),  # no floor
    ("quantize", "amax / F32(E2M1.max * E4M3.max)", "amax / F32(E2M1.max) / F32(E4M3.max)"),
    ("quantize", "checks.LEAST_NORMAL)\n", "F32(0))\n"),  # subnormal tensor scales
    ("quantize", "        return F32(1)\n", "        return checks.LEAST_NORMAL\n"),  # all-zero tensor
    ("quantize", "(x - exact_values(q)).astype(np.float32)", "x - dequantize(q)"),  # residual rounded twice
    ("quantize", "(x - exact_values(q))", "(exact_values(q) - x)"),  # sign of the residual
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
    ("augment", 'quantize(reordered("w", w, selection))', "quantize(w)"),
    ("gemm", "* UNIT**2  #", "* UNIT  #"),
    ("gemm", "if exact > nearest else", "if exact < nearest else"),
    ("gemm", "    for i in zip(*np.nonzero(low != high)):", "    for i in []:"),  # Ziv's test left out
    ("bounds", "if midpoint >= Fraction(E4M3.least_normal)", "if midpoint >= 0"),
    ("bounds", "E2M1.max * half_spacing)", "half_spacing)"),  # "at most one step"
    ("bounds", "np.maximum(bound, a - E2M1.max * E4M3.max)", "bound"),  # saturation
    ("bounds", "float(ARC) * a,", "float(NVFP4**2) * a,"),  # valid, but not sharp
    ("bounds", "np.minimum(float(NVFP4) * a, E4M3.max)", "float(NVFP4) * a"),
    ("bounds", "np.minimum(v + half_spacing, E4M3.least_normal)", "(v + 2 * half_spacing)"),
    ("bounds", "ROUNDING_ABSOLUTE = 2.0**-146", "ROUNDING_ABSOLUTE = 2.0**-125"),
    ("bounds", "bound + np.where(np.isfinite(got), last_rounding, 0) + float64_sum", "bound + float64_sum"),
    ("bounds", "x.shape[1] * 2.0**-53", "2.0**-20"),
    ("bounds", " + 2.0**-150", ""),
    ("bounds", "nan=np.inf", "nan=0.0"),
    ("baselines", "fraction > max_fraction", "fraction >= max_fraction"),
    ("baselines", "- int(np.frexp(fmt.max)[1])", "- int(np.frexp(fmt.max)[1]) + 1"),
]


def run_tests_of_a_copy(folder: Path, module: str, old: str, new: str) -> subprocess.CompletedProcess:
    """The core's tests, those of `module` first, on a copy in which one line of it is changed."""
    for part in ("arcquant_ref", "tests"):
        shutil.copytree(ROOT / part, folder / part)
    shutil.copy(ROOT / "pyproject.toml", folder)
    path = folder / "arcquant_ref" / f"{module}.py"
    source = path.read_text()
    assert source.count(old) == 1, "the line to change has moved: update MUTANTS"
    path.write_text(source.replace(old, new))
    tests = [f"tests/test_{name}.py" for name in sorted(FILES, key=lambda name: name != module)]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += ["--hypothesis-profile", "mutants", *tests]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": "."}
    )


in_ci = pytest.mark.skipif(
    not os.environ.get("CI"), reason="in CI only: every mutant is a test run of its own"
)


@in_ci
@pytest.mark.parametrize(("module", "old", "new"), MUTANTS, ids=[f"{m}: {n.strip()}" for m, _, n in MUTANTS])
def test_the_mutant_is_caught(module, old, new, tmp_path):
    done = run_tests_of_a_copy(tmp_path, module, old, new)
    assert done.returncode == 1, done.stdout[-2000:]
    assert "ERROR" not in done.stdout  # caught by a test, not by a broken import


@in_ci
def test_the_unchanged_copy_passes(tmp_path):
    """Or every mutant would be caught by the copying."""
    done = run_tests_of_a_copy(tmp_path, "gemm", "MAX_DEPTH = ", "MAX_DEPTH = ")
    assert done.returncode == 0, done.stdout[-2000:]
