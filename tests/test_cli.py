"""Every command the way a user types it."""

import json
import os
import signal
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import safetensors.numpy
from support import assert_same_tensor

import arcquant_ref as aq
from arcquant_ref import NVFP4Tensor, Selection, bounds, prove
from arcquant_ref.cli import main, read_matrix

X = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", X)


def run(capsys, line: str) -> str:
    """stdout of a command that must succeed."""
    assert main(line.split()) == 0
    return capsys.readouterr().out


def fails(capsys, line: str) -> str:
    """The one line on stderr of a command that must exit with 2 and print nothing else."""
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("arcquant: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


def test_demo_prints_a_table_per_layer_and_what_it_shows(capsys):
    out = run(capsys, "demo")
    for word in (
        "attn_q",
        "attn_output",
        "ffn_up",
        "ffn_down",
        "NVFP4",
        "ARC",
        "W4A8",
        "W4A16",
        "none violated",
    ):
        assert word in out
    assert out.count("worst error / bound") == 4


def test_demo_as_json_and_as_a_picture(capsys):
    rows = json.loads(run(capsys, "demo --json --plot demo.png"))
    assert len(rows) == 20
    assert all(row["output_ratio"] <= 1 for row in rows)
    with open("demo.png", "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"


def test_select_quantize_dequantize_and_bounds_together(capsys):
    x = X.copy()
    x[:, 7] *= 40
    np.save("x.npy", x)
    assert "S = 16" in run(capsys, "select x.npy -o s.safetensors")
    run(capsys, "quantize x.npy -o q.safetensors")
    assert_same_tensor(NVFP4Tensor.load("q.safetensors"), aq.quantize(x))
    run(capsys, "dequantize q.safetensors -o back.npy")
    np.testing.assert_array_equal(np.load("back.npy"), aq.dequantize(aq.quantize(x)))
    selection = Selection.load("s.safetensors")
    run(capsys, "quantize x.npy --selection s.safetensors --operand activations -o a.safetensors")
    assert_same_tensor(NVFP4Tensor.load("a.safetensors"), aq.augment_activations(x, selection))
    run(capsys, "quantize x.npy --selection s.safetensors --operand weights -o w.safetensors")
    assert_same_tensor(NVFP4Tensor.load("w.safetensors"), aq.augment_weights(x, selection))
    run(capsys, "quantize x.npy --tensor-scale 0.5 -o q.safetensors")
    assert_same_tensor(NVFP4Tensor.load("q.safetensors"), aq.quantize(x, 0.5))
    assert "worst error / bound" in run(capsys, "bounds x.npy")
    assert json.loads(run(capsys, "bounds x.npy --selection s.safetensors --json"))["holds"]


def test_a_selection_with_weight_channels_is_taken(capsys):
    np.save("x.npy", X)
    k = X.shape[1]
    selection = Selection(
        order=np.arange(k)[::-1],
        num_residual=16,
        channel_amax=np.abs(X).max(axis=0),
        weight_channels=range(16),
    )
    selection.save("s.safetensors")
    for operand, augment in (("activations", aq.augment_activations), ("weights", aq.augment_weights)):
        run(capsys, f"quantize x.npy --selection s.safetensors --operand {operand} -o q.safetensors")
        assert_same_tensor(NVFP4Tensor.load("q.safetensors"), augment(X, selection))
    assert json.loads(run(capsys, "bounds x.npy --selection s.safetensors --json"))["holds"]
    assert json.loads(run(capsys, "bounds x.npy --weights x.npy --selection s.safetensors --json"))["holds"]


def test_select_reads_batches_and_takes_rules(capsys):
    np.save("y.npy", 100 * X[:, ::-1])
    selected = json.loads(run(capsys, "select x.npy y.npy --tau 0.5 --multiple 32 --json"))
    expected = aq.select(aq.calibrate([X, 100 * X[:, ::-1]]), 0.5, 32)
    assert selected["num_residual"] == expected.num_residual
    assert selected["residual_channels"] == expected.order[64 - expected.num_residual :].tolist()
    assert json.loads(run(capsys, "select x.npy --num-residual 48 --json"))["num_residual"] == 48


def test_bounds_prints_the_constants(capsys):
    out = run(capsys, "bounds")
    for fraction in ("3/17", "3/100", "1/17", "81/1024"):
        assert fraction in out
    assert json.loads(run(capsys, "bounds --json"))["NVFP4"] == {"bound": 3 / 17, "paper": None}


def test_bounds_proves_them_and_draws_them(capsys, monkeypatch):
    right = prove.that_matter
    monkeypatch.setattr(prove, "that_matter", lambda numbers: right(numbers)[::50])
    monkeypatch.setattr(prove, "float16", lambda: np.arange(64.0) / 8)
    monkeypatch.setattr(prove, "OTHER_TENSOR_SCALES", 2)
    out = run(capsys, "bounds --prove --plot b.png")
    assert "Every bfloat16 amax" in out
    assert "ARC comes within" in out
    assert "from 0.00830078 to 4176" in out
    assert out.endswith("Every error is within its bound.\n")
    with open("b.png", "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"
    assert json.loads(run(capsys, "bounds --prove --json"))["regimes"]["bfloat16"][0]["worst_ratio"] <= 1
    mx = prove.MX["MXFP8, ceiling scale"]
    with monkeypatch.context() as patch:
        patch.setitem(prove.MX, "MXFP8, ceiling scale", mx._replace(constant=Fraction(1, 18)))
        assert main(["bounds", "--prove"]) == 1
        assert capsys.readouterr().out.endswith("BOUND VIOLATED\n")
    bound = bounds.nvfp4_in_units
    monkeypatch.setattr(bounds, "nvfp4_in_units", lambda amax: 0.999 * bound(amax))
    assert main(["bounds", "--prove"]) == 1
    assert capsys.readouterr().out.endswith("BOUND VIOLATED\n")


def test_bounds_certifies_a_product(capsys):
    np.save("w.npy", X[:5] / 3)
    run(capsys, "select x.npy -o s.safetensors")
    out = run(capsys, "bounds x.npy --weights w.npy --selection s.safetensors")
    assert f"{len(X)} x 5 outputs: every error is within its bound" in out
    assert "activation" in out
    plain = json.loads(run(capsys, "bounds x.npy --weights w.npy --json"))
    assert plain["holds"]
    assert sum(plain["share"].values()) == pytest.approx(1)
    np.save("w.npy", np.full((2, X.shape[1]), [[1e18], [1e-3]]))
    np.save("large.npy", np.full_like(X, 1e20))
    assert f"outputs without a bound, as float32 may overflow: {len(X)}\n" in run(
        capsys, "bounds large.npy --weights w.npy"
    )
    overflowing = json.loads(run(capsys, "bounds large.npy --weights w.npy --json"))
    assert sum(overflowing["share"].values()) == pytest.approx(1)
    assert overflowing["without_bound"] == len(X)


def test_info_says_what_is_usable_and_why_not(capsys):
    info = json.loads(run(capsys, "info --json"))
    assert info["backends"]["reference"] == "usable"
    assert set(info["backends"]) == {"reference", "emulator", "gpu"}
    assert info["packages"]["numpy"] == np.__version__
    assert "Apache-2.0" in info["sample"]["model"]
    assert "backends:" in run(capsys, "info")


def test_matrices_are_read_from_every_kind_of_file():
    np.savez("one.npz", X)
    np.savez("two.npz", first=X, second=2 * X)
    safetensors.numpy.save_file({"w": X, "ids": np.arange(3)}, "w.safetensors")
    for name, expected in {"x.npy": X, "one.npz": X, "two.npz:second": 2 * X, "w.safetensors:w": X}.items():
        np.testing.assert_array_equal(read_matrix(name), expected)
    bits = X.view(np.uint32) >> 16
    spec = safetensors.TensorSpec(
        dtype="bfloat16", shape=X.shape, data_ptr=(b := bits.astype(np.uint16)).ctypes.data, data_len=b.nbytes
    )
    with open("bf16.safetensors", "wb") as file:
        file.write(safetensors.serialize({"w": spec}))
    np.testing.assert_array_equal(read_matrix("bf16.safetensors"), (bits << 16).view(np.float32))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((2, 32), np.nan), ": 64 of 64 elements are NaN"),
        (np.full((2, 32), -np.inf), ": 64 of 64 elements are NaN, infinite"),
        (np.ones((2, 30)), " has K=30, which is not a multiple of the block size 16"),
        (np.ones(32), " has shape (32,); it must be a matrix"),
        (np.ones((2, 32), int), " has dtype int64"),
        (np.ones((0, 32)), " has shape (0, 32) and no elements"),
        (
            np.full((2, 32), 1e39),
            ": 64 of 64 elements are NaN, infinite or beyond float32, the first is 1e+39",
        ),
    ],
)
def test_bad_matrices(capsys, array, message):
    np.save("bad.npy", array)
    commands = ["quantize bad.npy -o q.safetensors", "select bad.npy -o q.safetensors", "bounds bad.npy"]
    for command in commands:
        assert f"arcquant: bad.npy: x{message}" in fails(capsys, command)
    assert not os.path.exists("q.safetensors")


def test_bad_files_and_options(capsys):
    np.savez("two.npz", first=X, second=X)
    main(["quantize", "x.npy", "-o", "q.safetensors"])
    main(["select", "x.npy", "-o", "s.safetensors"])
    np.save("narrow.npy", X[:, :32])
    bad_scale = NVFP4Tensor.load("q.safetensors").map(np.copy)
    bad_scale.block_scales[0, 0] = 0x7F
    with open("q.safetensors", "rb") as file:
        data = file.read()
    good = NVFP4Tensor.load("q.safetensors").block_scales.tobytes()
    with open("nan.safetensors", "wb") as file:
        file.write(data.replace(good, bad_scale.block_scales.tobytes()))
    np.savez_compressed("whole.npz", X)
    with open("whole.npz", "rb") as file:
        whole = file.read()
    flipped = whole[:300] + bytes([whole[300] ^ 1]) + whole[301:]
    for name, content in {"cut.npz": whole[:200], "flipped.npz": flipped, "zip.npy": whole}.items():
        with open(name, "wb") as file:
            file.write(content)
    with open("text.npy", "w") as file:
        file.write("no array")
    os.mkdir("folder.safetensors")
    capsys.readouterr()
    for line, message in {
        "quantize absent.npy -o q.safetensors": "No such file",
        "quantize text.npy -o q.safetensors": "text.npy is damaged or not a .npy file",
        "quantize x.csv -o q.safetensors": "'.csv'; a matrix is read from .npy, .npz, .safetensors",
        "quantize two.npz -o q.safetensors": "two.npz holds first, second; name one of them: two.npz:NAME",
        "quantize two.npz:third -o q.safetensors": "two.npz holds first, second",
        "quantize x.npy --tensor-scale 0 -o q.safetensors": "tensor_scale=0.0 is not a positive",
        "quantize x.npy --tensor-scale nan -o q.safetensors": "tensor_scale=nan is not a positive",
        "quantize x.npy --operand weights -o q.safetensors": "--operand weights needs --selection",
        "quantize x.npy --selection s.safetensors -o q.safetensors": "--selection needs --operand",
        "quantize x.npy --selection s.safetensors --operand weights --tensor-scale 1 -o q.safetensors": (
            "--tensor-scale goes with --operand activations"
        ),
        "quantize narrow.npy --selection s.safetensors --operand weights -o q.safetensors": "for K=64 but",
        "quantize x.npy --selection q.safetensors --operand weights -o q.safetensors": "nvfp4-selection file",
        "dequantize x.npy -o y.npy": "x.npy is damaged or not a safetensors file",
        "dequantize s.safetensors -o y.npy": "not an nvfp4 file",
        "dequantize nan.safetensors -o y.npy": "1 block scales are NaN",
        "select x.npy narrow.npy": "batches[1] has K=32 but the batches before it have K=64",
        "select x.npy --num-residual 20": "num_residual=20 must be a multiple of 16",
        "select x.npy --num-residual 128": "num_residual=128 must be a multiple of 16 from 0 to 64",
        "select x.npy --tau 2": "tau=2.0 must be a number from 0 to 1",
        "select x.npy --multiple 10": "multiple=10 must be a positive multiple",
        "bounds narrow.npy --selection s.safetensors": "made for K=64 but x has K=32",
        "demo --sample two.npz": "two.npz is not a sample",
        "demo --sample absent.npz": "No such file",
        "demo --sample cut.npz": "cut.npz is not a sample",
        "demo --sample x.npy": "x.npy is not a sample",
        "demo --plot picture.jpg": "picture.jpg must end in .png",
        "quantize cut.npz -o q.safetensors": "cut.npz is damaged or not a .npz file",
        "quantize flipped.npz -o q.safetensors": "flipped.npz is damaged or not a .npz file",
        "quantize zip.npy -o q.safetensors": "zip.npy is damaged or not a .npy file",
        "quantize x.npy:name -o q.safetensors": "x.npy holds x; name one of them",
        "quantize q.safetensors:codes -o y.safetensors": "q.safetensors:codes: x has dtype uint8",
        "quantize q.safetensors -o y.safetensors": "holds block_scales, codes, tensor_scale; name one",
        "quantize x.npy -o q.npy": "q.npy must end in .safetensors",
        "quantize x.npy -o folder.safetensors": "exists and is not a regular file",
        "dequantize q.safetensors -o y.safetensors": "y.safetensors must end in .npy",
        "select x.npy --num-residual 16 --tau 0.1": "leave it out, or leave out --tau",
        "bounds --selection s.safetensors": "--selection and --weights need a matrix",
        "bounds --weights x.npy": "--selection and --weights need a matrix",
        "bounds x.npy --prove": "--prove and --plot are about the bounds themselves",
        "bounds x.npy --weights narrow.npy": "x has K=64 and w has K=32",
        "sample -o sample.npy": "sample.npy must end in .npz",
        "quantize x.npy -o absent/q.safetensors": "absent does not exist. Create it first",
    }.items():
        assert message in fails(capsys, line), line


def test_sample_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "arcquant_ref.model", raising=False)
    assert 'pip install -e ".[model]"' in fails(capsys, "sample -o s.npz")


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match=r"tensor_scale=0\.0"):
        main(["quantize", "x.npy", "--tensor-scale", "0", "-o", "q.safetensors", "--debug"])


def test_a_violated_bound_exits_with_1(capsys, monkeypatch):
    monkeypatch.setattr("arcquant_ref.bounds.ROUNDING_RELATIVE", -0.5)
    assert main(["bounds", "x.npy"]) == 1
    assert main(["demo"]) == 1
    assert "BOUND VIOLATED: NVFP4 in blk.12.attn_q" in capsys.readouterr().out


def test_as_a_process():
    command = [sys.executable, "-m", "arcquant_ref"]
    wrong = subprocess.run(
        [*command, "quantize", "absent.npy", "-o", "q.safetensors"], capture_output=True, text=True
    )
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "arcquant: [Errno 2] No such file or directory: 'absent.npy'\n"
    assert (
        subprocess.run([*command, "--version"], capture_output=True, text=True).stdout
        == f"arcquant {aq.__version__}\n"
    )
    assert subprocess.run([*command, "unknown"], capture_output=True).returncode == 2


def test_a_reader_that_stops_early_is_no_error():
    command = f"{sys.executable} -m arcquant_ref info | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_ctrl_c_leaves_no_half_written_file():
    command = [sys.executable, "-m", "arcquant_ref", "demo", "--plot", "demo.png"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # a shell's background job ignores it
    )
    process.stdout.readline()  # the table is coming: the picture is being drawn
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "arcquant: interrupted" in err
    assert os.listdir() == ["x.npy"]


def test_bench_prints_ratios_and_draws_the_growth(capsys, monkeypatch):
    monkeypatch.setattr("arcquant_ref.bench.ROUNDS", 1)
    monkeypatch.setattr("arcquant_ref.bench.PAUSE", 0)
    out = run(capsys, "bench --size 512 --plot growth.png")
    for word in (
        "processor",
        "threads",
        "x.copy()",
        "emulator.quantize",
        "numpy float32 matmul",
        "emulator.matmul",
        "argmin over the values",
    ):
        assert word in out
    for peer, shown in {"gfloat": "gfloat", "ml_dtypes": "ml_dtypes", "nvidia-modelopt": "ModelOpt"}.items():
        assert (f"{shown} " in out.split("not timed")[0]) != (f"{peer} (" in out.split("not timed")[-1])
    with open("growth.png", "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"
    found = json.loads(run(capsys, "bench --size 512 --json"))
    rows, missing = found["rows"], found["not_timed"]
    for peer, shown in {"gfloat": "gfloat", "mmasim": "mmasim", "nvidia-modelopt": "ModelOpt"}.items():
        assert any(shown in row["name"] for row in rows) != (peer in missing)
    assert {row["group"] for row in rows} == {"quantize", "matmul"}
    for row in rows:
        assert 0 < row["best"] <= row["median"] <= row["worst"]
        first = next(other for other in rows if other["group"] == row["group"])
        rates = [other["work"] / other["median"] for other in (row, first)]
        assert row["ratio"] == pytest.approx(rates[0] / rates[1])


def test_bench_refuses_sizes_that_leave_no_blocks(capsys):
    assert "--size 500 is not a positive multiple of 512. The default is 4096." in fails(
        capsys, "bench --size 500"
    )
