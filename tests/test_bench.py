"""arcquant bench: who is timed, who is named as missing, and that those timed compute the same. No times."""

import sys

import numpy as np
import pytest
from support import optional

from arcquant_ref import bench, layout
from arcquant_ref.quantize import quantize, tensor_scale_of

optional("numba")
N = 256


def quantized_by(cases, word):
    name, case = next((name, case) for name, case in cases.items() if word in name)
    return name, case()


@pytest.mark.parametrize(
    ("distribution", "word"), [("ml_dtypes", "ml_dtypes"), ("gfloat", "gfloat"), (None, "argmin")]
)
def test_what_is_written_in_numpy_makes_the_same_codes(distribution, word):
    """On normal numbers, none of them a tie that argmin would break otherwise."""
    if distribution:
        optional(distribution)
    x = bench._normal(N, N)
    name, (codes, scales) = quantized_by(bench.quantize_cases(N).cases, word)
    expected = quantize(x, tensor_scale_of(x)).map(
        lambda array: array[: N if word == "ml_dtypes" else N // 8]
    )
    codes, scales = (np.asarray(array).view(f"u{array.dtype.itemsize}") for array in (codes, scales))
    np.testing.assert_array_equal(scales, expected.block_scales, name)
    codes = codes.reshape(expected.codes.shape)
    # a negative number that rounds to zero: argmin finds +0 first
    same = (codes == expected.codes) | ((expected.codes == 8) & (codes == 0) & (word == "argmin"))
    assert same.all(), (name, np.argwhere(~same)[:3])


@pytest.mark.parametrize(("module", "word"), [("torchao", "torchao"), ("modelopt", "ModelOpt")])
def test_what_a_library_makes_is_what_it_is_timed_for(module, word):
    optional(module)
    x = bench._normal(N, N)
    name, made = quantized_by(bench.quantize_cases(N).cases, word)
    packed = made[1] if word == "torchao" else made[0]._quantized_data
    same = packed.numpy().view(np.uint8) == layout.pack(quantize(x, tensor_scale_of(x)).codes)
    assert same.mean() > 0.999, name  # its order of operations is another


def test_peers_that_are_not_there_are_named(monkeypatch):
    for module in ("gfloat", "torchao.prototype.mx_formats.nvfp4_tensor", "mmasim.nv_ptx.sim"):
        monkeypatch.setitem(sys.modules, module, None)
    missing = bench.quantize_cases(N).missing | bench.matmul_cases(N).missing
    assert {"gfloat", "torchao", "mmasim"} <= set(missing)
    line = bench.not_there(missing)
    assert line.startswith("not timed: ")
    assert "gfloat (import of gfloat halted" in line
    assert bench.not_there({}) == ""


def test_every_case_has_its_work():
    for group, unit in ((bench.quantize_cases(N), "GB/s read"), (bench.matmul_cases(N), "GFLOP/s")):
        assert set(group.work) == set(group.cases)
        assert {of for _, of in group.work.values()} == {unit}
        work = {name: of for name, (of, _) in group.work.items()}
        if unit == "GB/s read":
            assert work["x.copy()"] == 4 * N * N / 1e9
            assert work["NumPy, argmin over the values, 1 thread"] == 4 * N * N / 8 / 1e9
