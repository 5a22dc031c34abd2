"""compare: files of real libraries are recognised, every packing is detected, every reason is given."""

import json

import numpy as np
import pytest
import safetensors.numpy
import stress
from peers import CHECKPOINTS, PEERS
from test_recipes import block_beside, installed

import arcquant_ref as aq
from arcquant_ref import compare, layout
from arcquant_ref.cli import main
from arcquant_ref.formats import BLOCK
from emulator import recipes
from emulator.recipes import RECIPES

OURS = RECIPES["arcquant_ref"]
NAMES = {
    "dec": ("weight", "weight_scale", "weight_scale_2"),
    "enc": compare.NAMES[1][:3],
    "A": compare.NAMES[4][:3],
}


def saved_input() -> np.ndarray:
    return (stress.inputs()[stress.SAVED].astype(np.uint32) << 16).view(np.float32)


def write(path, names, packed, scales, tensor_scale, prefix="") -> str:
    parts = {
        names[0]: ("uint8", packed),
        names[1]: ("float8_e4m3fn", scales),
        names[2]: ("float32", np.asarray(tensor_scale, np.float32)),
    }
    kept = {prefix + name: (dtype, np.ascontiguousarray(array)) for name, (dtype, array) in parts.items()}
    specs = {
        name: safetensors.TensorSpec(dtype=dtype, shape=a.shape, data_ptr=a.ctypes.data, data_len=a.nbytes)
        for name, (dtype, a) in kept.items()
    }
    path.write_bytes(safetensors.serialize(specs))
    return str(path)


def written_by(path, recipe: str, x, names=compare.NAMES[0][:3], given=None) -> compare.Packed:
    """The tensor that a recipe makes of x, packed as its library packs it, written and read again."""
    q = recipes.quantize(RECIPES[recipe], x, given)
    return compare.read(write(path, names, *recipes.pack(RECIPES[recipe], q), q.tensor_scale))


@pytest.fixture
def file(tmp_path):
    return tmp_path / "q.safetensors"


PACKING = {  # of the files that the libraries wrote
    "torchao": (["arcquant_ref", "torchao"], "low nibble, block scales linear", "multiplies"),
    "ModelOpt": (["ModelOpt"], "low nibble, block scales linear", "multiplies"),
    "compressed-tensors": (
        ["compressed-tensors from bfloat16"],
        "low nibble, block scales linear",
        "divides",
    ),
    "comfy-kitchen": (
        ["comfy-kitchen from bfloat16"],
        "high nibble, block scales in 128x4 tiles",
        "multiplies",
    ),
    "fouroversix (4/6)": (["fouroversix (4/6)"], "low nibble, block scales in 128x4 tiles", "is the amax"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_library_that_wrote_a_file_is_found(name):
    writers, packing, direction = PACKING[name]
    report = compare.against(compare.read(str(stress.checkpoint(name))), saved_input())
    assert report.writers == writers
    assert report.packing == f"even k in the {packing}"
    assert direction in report.tensor_scale
    assert "usually" not in report.tensor_scale


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_library_that_writes_a_file_now_is_found(name, file):
    installed(name)
    from safetensors.torch import save_file

    tensors, metadata = CHECKPOINTS[name](stress.inputs()["near ties, bfloat16"])
    save_file(tensors, file, metadata)
    x = (stress.inputs()["near ties, bfloat16"].astype(np.uint32) << 16).view(np.float32)
    assert PACKING[name][0][-1] in compare.against(compare.read(str(file)), x).writers


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("matrix", ["near ties, float32", "heavy tails, bfloat16", "all zero, bfloat16"])
def test_every_recipe_is_recognised_in_its_own_bytes(name, matrix, file):
    x = stress.inputs()[matrix]
    packed = written_by(file, name, x)
    x = (x.astype(np.uint32) << 16).view(np.float32) if x.dtype == np.uint16 else x
    report = compare.against(packed, x)
    if report.packing.endswith("(other readings fit as well)"):  # a tensor of zeros has no order of nibbles
        assert any(row.exact for row in report.rows if row.recipe.startswith(name))
    else:
        assert any(writer.startswith(name) for writer in report.writers)


@pytest.mark.parametrize("direction", ["dec", "enc", "A"])
@pytest.mark.parametrize("swizzled", [False, True])
@pytest.mark.parametrize("high", [False, True])
@pytest.mark.parametrize("rows", [6, 128])
def test_every_packing_is_detected(rows, high, swizzled, direction, file):
    """With 128 rows both layouts have as many bytes, and only the values tell them apart."""
    x = np.random.default_rng(0).standard_normal((rows, 128)).astype(np.float32) * 3
    q = aq.quantize(x)
    codes = q.codes.reshape(rows, -1, 2)[:, :, ::-1].reshape(q.shape) if high else q.codes
    scales = layout.swizzle_128x4(q.block_scales) if swizzled else q.block_scales
    stored = {"dec": q.tensor_scale, "enc": 1 / q.tensor_scale, "A": q.tensor_scale * 2688}[direction]
    packed = compare.read(write(file, compare.NAMES[0][:3], layout.pack(codes), scales, stored))
    reading, certain = compare.detect(packed, x)
    assert (reading.high_nibble_first, reading.swizzled, reading.direction) == (high, swizzled, direction)
    assert certain
    report = compare.against(packed, x)
    ours = next(row for row in report.rows if row.recipe == "arcquant_ref")
    assert ours.exact
    said = " ".join(ours.remarks)
    assert ("nibbles swapped" in said) == high
    assert ("scales swizzled" in said) == swizzled
    assert ("multiplies to decode" in said) == (direction != "dec")
    assert ("under this name it usually multiplies" in report.tensor_scale) == (direction != "dec")


def test_what_cannot_be_told_is_said(file):
    x = np.zeros((128, 64), np.float32)
    report = compare.against(written_by(file, "arcquant_ref", x), x)
    assert "(other readings fit as well)" in report.packing
    assert "neither multiplies nor divides" in report.tensor_scale
    assert report.writers == ["arcquant_ref"]


def test_a_static_tensor_scale_is_passed_on(file):
    x = saved_input()
    report = compare.against(written_by(file, "torchao", x, given=1.0), x)
    row = next(row for row in report.rows if row.recipe == "torchao")
    assert row.exact
    assert row.remarks == ["with this tensor scale given"]
    assert report.writers == []
    assert "No library makes this file by itself" in str(report)


def why(file, x, writer: str, suspect: str) -> str:
    """Why the bytes that `writer` makes of x are not what `suspect` makes."""
    packed = written_by(file, writer, x)
    reading, _ = compare.detect(packed, np.asarray(x))
    match = next(m for m in compare.matches(packed, reading, np.asarray(x)) if m.recipe.name == suspect)
    return str(compare.first_difference(match, reading))


def test_reasons_for_codes(file):
    step = 1.875
    ties = block_beside(2688, 6 * step, 1.25 * step)
    text = why(file, ties, "Transformer Engine reference", "arcquant_ref")
    assert "first at row 0, k = 1: code 0x3 in the file, 0x2 by the recipe" in text
    assert "A tie: x / (s * dec) = 1.25 (0x3fa00000) is at the midpoint 1.25 of 1 and 1.5" in text
    underflowed = block_beside(2688, 1e-6, 0.0)
    assert "The scale underflowed to 0" in why(
        file, underflowed, "Transformer Engine reference", "comfy-kitchen"
    )
    minus = block_beside(2688, 6.0, -0.0)
    assert "The sign of zero" in why(file, minus, "arcquant_ref", "Transformer Engine reference")
    eight = block_beside(2688, 6 * 1.4 * 2.0**-9)
    text = why(file, eight, "fouroversix (static 6)", "Transformer Engine reference")
    assert "rounds to 8, which has no code" in text
    bf16 = block_beside(2688, 6, 1.25 * (1 + 2.0**-12))
    assert "as if one of the two had rounded to 16 bits first" in why(
        file, bf16, "ARCQuant authors", "comfy-kitchen"
    )


def test_reasons_for_scales(file):
    zero = block_beside(2688)
    assert "A zero block" in why(file, zero, "ModelOpt", "torchao")
    underflowed = block_beside(2688, 1e-6)
    assert "An underflowed scale: a / 6 / dec = 1.66666" in why(file, underflowed, "torchao", "arcquant_ref")
    subnormal = block_beside(2688, 6 * 3 * 2.0**-9)
    assert "A subnormal scale" in why(file, subnormal, "torchao", "arcquant_ref")
    text = why(file, saved_input(), "ModelOpt", "arcquant_ref")
    assert "A tie of block scales: a / 6 / dec = 0.242187485 (0x3e77ffff) is at the midpoint 0.242188" in text
    assert "as under the 4/6 rule" in why(file, block_beside(2688, 5), "fouroversix (4/6)", "arcquant_ref")
    zeros = np.zeros((2, BLOCK), np.float32)
    assert "A NaN scale: 0 / 0" in why(file, zeros, "torchao", "arcquant_ref")


def test_another_matrix_fits_no_recipe(file):
    x = saved_input()
    report = compare.against(written_by(file, "torchao", x), np.ascontiguousarray(x[::-1] * 0.7))
    assert not report.fits
    assert "No recipe makes these numbers." in str(report)
    assert "not near a midpoint" in str(report)


def test_two_files_of_the_same_numbers_in_different_packings(tmp_path):
    x = saved_input()
    a = written_by(tmp_path / "a.safetensors", "arcquant_ref", x)
    b = written_by(tmp_path / "b.safetensors", "comfy-kitchen", x)
    report = compare.pair(a, b)
    assert report.same
    assert report.packing == (
        "even k in the low nibble, block scales linear",
        "even k in the high nibble, block scales in 128x4 tiles",
    )
    assert "0 block scales and 0 codes differ" in str(report)


@pytest.mark.parametrize(
    ("factor", "power", "relation"),
    [
        (1, 1, "; equal"),
        (1, -1, "one is the reciprocal of the other"),
        (2688, 1, "the second is 2688 times the first: a multiplier and an amax"),
        (1 / 2688, 1, "the first is 2688 times the second: an amax and a multiplier"),
        (2688, -1, "their product is 2688: an amax and a divisor"),
        (3, 1, "they do not mean the same"),
    ],
)
def test_what_two_tensor_scales_are_to_each_other(factor, power, relation, tmp_path):
    q = aq.quantize(saved_input() * 3)
    names, packed = compare.NAMES[0][:3], layout.pack(q.codes)
    a = write(tmp_path / "a.safetensors", names, packed, q.block_scales, q.tensor_scale)
    other = np.float32(np.float64(q.tensor_scale) ** power * factor)
    b = write(tmp_path / "b.safetensors", names, packed, q.block_scales, other)
    report = compare.pair(compare.read(a), compare.read(b))
    assert relation in report.tensor_scales
    assert report.same == (factor != 3)


def test_where_two_files_differ_first(tmp_path):
    def first(x, one: str, other: str) -> str:
        a, b = (written_by(tmp_path / f"{n}.safetensors", r, x) for n, r in (("a", one), ("b", other)))
        return compare.pair(a, b).first

    assert first(saved_input(), "arcquant_ref", "ModelOpt") == (
        "first at row 1, k = 48: block scales 0x27 and 0x28, neighbours: a tie, or nearly one"
    )
    assert "block scales 0x01 and 0x38, a block of zeros" in first(
        block_beside(2688), "arcquant_ref", "ModelOpt"
    )
    ties = block_beside(2688, 6 * 1.875, 1.25 * 1.875)
    tie = first(ties, "FlashInfer/TensorRT-LLM exact", "fouroversix (static 6)")
    assert tie == ""
    assert "codes 0x2 and 0x3, neighbours" in first(ties, "comfy-kitchen", "FlashInfer/TensorRT-LLM exact")
    minus = block_beside(2688, 6, -0.0)
    assert "codes 0x8 and 0x0, zeros of different sign" in first(minus, "arcquant_ref", "ModelOpt")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", saved_input())
    (tmp_path / "q.safetensors").write_bytes(stress.checkpoint("compressed-tensors").read_bytes())
    (tmp_path / "other.safetensors").write_bytes(stress.checkpoint("ModelOpt").read_bytes())
    return tmp_path


def output(capsys, line: str, code: int) -> str:
    assert main(line.split()) == code
    out, err = capsys.readouterr()
    assert err == "" or code == 2
    return err if code == 2 else out


def test_exit_codes_and_json(folder, capsys):
    reports = json.loads(output(capsys, "compare q.safetensors other.safetensors --input x.npy --json", 1))
    assert [report["rows"][0]["recipe"] for report in reports[:2]] == [
        "compressed-tensors from bfloat16",
        "ModelOpt",
    ]
    assert reports[2]["scales"] == 45
    output(capsys, "compare q.safetensors q.safetensors", 0)
    np.save("x.npy", saved_input()[::-1] * 2)
    output(capsys, "compare q.safetensors --input x.npy", 1)


def test_errors(folder, capsys):
    np.save("narrow.npy", saved_input()[:, :32])
    np.save("tall.npy", np.tile(saved_input(), (8, 1)))
    q = aq.quantize(saved_input())
    names, packed = compare.NAMES[1][:3], layout.pack(q.codes)
    write(folder / "short.safetensors", names, packed, q.block_scales[:, :2], 1)
    write(folder / "many.safetensors", names, packed, q.block_scales, np.ones(3))
    write(folder / "odd.safetensors", names, packed[:, :-1], q.block_scales, 1)
    write(folder / "large.safetensors", names, np.zeros((300, 32), np.uint8), np.zeros((300, 4), np.uint8), 1)
    (folder / "text.safetensors").write_text("no tensors")
    safe = {"model.weight": np.ones((2, 32), np.float32)}
    safetensors.numpy.save_file(safe, folder / "plain.safetensors")
    two = {f"{n}.{name}": np.zeros((2, 8), np.uint8) for n in "ab" for name in names}
    safetensors.numpy.save_file(two, folder / "two.safetensors")
    for line, message in {
        "compare q.safetensors": "compare takes one packed tensor with --input, or two; 1 given",
        "compare q.safetensors q.safetensors q.safetensors": "or two; 3 given",
        "compare absent.safetensors --input x.npy": "No such file",
        "compare text.safetensors --input x.npy": "text.safetensors is damaged or not a safetensors file",
        "compare plain.safetensors --input x.npy": "holds no packed tensor: it holds model.weight. Known",
        "compare two.safetensors --input x.npy": "name one by its prefix: two.safetensors:a., two",
        "compare two.safetensors:c. --input x.npy": "holds no packed tensor c.…: it holds a.weight",
        "compare q.safetensors --input narrow.npy": "the input has shape (32, 32), but q.safetensors holds",
        "compare q.safetensors --input tall.npy": "the input has shape (256, 64), but q.safetensors holds",
        "compare short.safetensors --input x.npy": "32 x 64 codes need 128 linear or 512 in 128x4 tiles",
        "compare many.safetensors --input x.npy": "weight_global_scale has dtype F32 and 3 elements",
        "compare odd.safetensors --input x.npy": "weight_packed has dtype U8 and shape (32, 31)",
        "compare two.safetensors:a. --input x.npy": "weight_global_scale has dtype U8 and 16 elements",
        "compare q.safetensors large.safetensors": "they do not come from one matrix",
    }.items():
        err = output(capsys, line, 2)
        assert message in err, (line, err)
        assert err.count("\n") == 1


def test_a_prefix_chooses_a_tensor(folder, capsys):
    q = aq.quantize(saved_input())
    names, packed = compare.NAMES[1][:3], layout.pack(q.codes)
    write(folder / "p.safetensors", names, packed, q.block_scales, q.tensor_scale, prefix="model.0.")
    assert compare.read(f"{folder}/p.safetensors:model.0.").names[0] == "model.0.weight_packed"
    assert "under this name it usually divides" in output(capsys, "compare p.safetensors --input x.npy", 0)
