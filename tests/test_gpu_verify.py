"""gpu.verify on the interpreter finds nothing, finds what is planted; its inputs tell models apart."""

import json

import numpy as np
import pytest
from numba import njit
from support import optional

import emulator
from emulator.tensor_core import HOPPER, RTX_BLACKWELL, half_in_integers, nvfp4_in_integers
from gpu import stress, verify
from gpu.device import Interpreted
from gpu.face import Face

optional("cupy")


@pytest.mark.parametrize("arch", ["80", "90a", "120a"])
def test_nothing_differs_on_the_interpreter(arch, tmp_path, capsys):
    file = tmp_path / "found.json"
    assert verify.main(["--quick", "--device", "interpreted", f"sm_{arch}", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert (found["program"], found["quick"], found["failed"]) == ("gpu.verify", True, False)
    assert {"date", "device", "arch", "gpu", "nvrtc", "packages", "commit", "cores"} <= set(found["machine"])
    assert (found["machine"]["device"], found["machine"]["arch"]) == ("Interpreted", arch)
    lines = {line["what"]: line for line in found["lines"]}
    assert all(line["compared"] > 0 and line["mismatches"] == 0 for line in lines.values())
    functions = ["quantize", "augment_activations", "augment_weights", "rmsnorm_augment_activations"]
    for what in [f"{function} = {of}" for function in functions for of in ("reference", "emulator")]:
        assert lines[what]["inputs"] == verify.QUICK.matrices
    assert ("instruction mma.m16n8k64 nvfp4 = emulator" in lines) == (arch == "120a")
    assert "instruction mma.m16n8k16 bf16 = emulator" in lines
    out = capsys.readouterr().out
    assert "0 differ; 0 of" in out
    assert all(what in out for what in lines)


@pytest.fixture(scope="module")
def face() -> Face:
    return Face(Interpreted("80"))


def run(face: Face, check) -> dict[str, verify.Line]:
    return {line.what: line for line in verify.run(face, verify.QUICK, [check])}


def test_a_wrong_bit_of_an_instruction_is_printed_with_its_index(face, monkeypatch):
    mma = verify.mma

    def wrong(device, kernel, *operands):
        d = mma(device, kernel, *operands)
        if kernel.endswith("_bf16"):
            d.view(np.uint32)[2, 5, 3] ^= 1
        return d

    monkeypatch.setattr(verify, "mma", wrong)
    lines = run(face, verify.half_steps)
    assert not lines["instruction mma.m16n8k16 f16 = emulator"].failed
    line = lines["instruction mma.m16n8k16 bf16 = emulator"]
    assert (line.failed, line.mismatches, line.inputs) == (True, len(stress.STEPS), len(stress.STEPS))
    assert len(line.shown) == verify.SHOWN
    got, expected = (int(word, 16) for word in line.shown[0].replace(",", "").split() if word[:2] == "0x")
    assert line.shown[0].startswith("any bits: d[2, 5, 3] is 0x")
    assert got ^ expected == 1
    text = verify.table(list(lines.values()))
    assert f"    {line.shown[0]}\n" in text + "\n"
    assert "9 differ; 1 of 2 lines failed" in text


def test_a_wrong_code_makes_the_program_fail(monkeypatch, capsys):
    encode = emulator.encode_e4m3
    monkeypatch.setattr(
        emulator, "encode_e4m3", lambda x: encode(x) ^ (np.arange(np.size(x)) == 7).astype(np.uint8)
    )
    monkeypatch.setattr(verify, "CHECKS", (verify.conversions,))
    assert verify.main(["--device", "interpreted sm_80"]) == 1
    assert "bits from 0x00000000: codes[7] is 0x00, expected 0x01" in capsys.readouterr().out


def test_a_check_that_raises_is_a_line_and_the_others_go_on(face):
    def broken(face, size):
        raise RuntimeError("out of memory")
        yield

    lines = verify.run(face, verify.QUICK, [broken, verify.nvfp4_steps, verify.half_steps])
    assert [line.failed for line in lines] == [True, False, False]
    assert "FAILED: RuntimeError: out of memory" in verify.table(lines)


def test_another_shape_is_a_difference():
    line = verify.Line("what")
    line.add(verify.Comparison("what", "input", {"y": (np.zeros(3), np.zeros((1, 3)))}))
    assert (line.failed, line.mismatches, line.shown) == (True, 3, ["input: y has shape (3,), not (1, 3)"])


def test_a_model_of_another_gpu_differs_without_failing(face, monkeypatch):
    monkeypatch.setattr(verify, "adds_as_hopper", lambda device: False)
    monkeypatch.setattr(verify, "mma", lambda device, kernel, *operands: operands[-1] + np.float32(1))
    lines = run(face, verify.half_steps)
    assert all(line.mismatches and not line.failed for line in lines.values())
    assert "(not claimed for this GPU)" in verify.table(list(lines.values()))


def test_other_devices_are_refused(capsys):
    assert verify.main(["--device", "interpreted", "sm_70"]) == 2
    assert "'interpreted sm_70' is not known; there are cuda, interpreted sm_80" in capsys.readouterr().err
    import gpu

    if gpu.why_not():
        assert verify.main([]) == 2
        assert "no GPU can be used here" in capsys.readouterr().err


@njit
def halves(a, b, c, widths, core, d):
    for i in range(len(c)):
        for m in range(16):
            for n in range(8):
                d[i, m, n] = half_in_integers(a[i, m], b[i, n], c[i, m, n], widths, core)


@njit
def nvfp4(a, b, sfa, sfb, c, core, d):
    for i in range(len(c)):
        for m in range(16):
            for n in range(8):
                d[i, m, n] = nvfp4_in_integers(a[i, m], b[i, n], sfa[i, m], sfb[i, n], c[i, m, n], core)


STEPS = 60


@pytest.mark.parametrize("name", stress.HALVES)
@pytest.mark.parametrize("fraction_bits", [23, 24, 26])
def test_half_steps_tell_how_many_bits_are_kept(name, fraction_bits):
    rng, different = np.random.default_rng(0), {}
    for kind in stress.STEPS:
        a, b, c = stress.half_steps(rng, name, kind, STEPS)
        right, wrong = np.empty_like(c), np.empty_like(c)
        halves(a, b, c, stress.HALVES[name], HOPPER, right)
        halves(a, b, c, stress.HALVES[name], HOPPER._replace(fraction_bits=fraction_bits), wrong)
        different[kind] = int((right.view(np.uint32) != wrong.view(np.uint32)).sum())
    assert different["alignment edges"] > 0.01 * STEPS * 128, different
    assert sum(n > 0 for n in different.values()) >= 5, different


@pytest.mark.parametrize("fraction_bits", [25, 34, 36])
def test_nvfp4_steps_tell_how_many_bits_are_kept(fraction_bits):
    rng, different = np.random.default_rng(0), {}
    for kind in stress.STEPS:
        operands = stress.nvfp4_steps(rng, kind, STEPS)
        right, wrong = np.empty_like(operands[-1]), np.empty_like(operands[-1])
        nvfp4(*operands, RTX_BLACKWELL, right)
        nvfp4(*operands, RTX_BLACKWELL._replace(fraction_bits=fraction_bits), wrong)
        different[kind] = int((right.view(np.uint32) != wrong.view(np.uint32)).sum())
    assert sum(n > 0 for n in different.values()) >= 5, different


def test_nvfp4_steps_have_groups_without_products_at_the_top():
    """Whether such a group raises the largest exponent is what the model is least certain of."""
    a, b, sfa, sfb, _ = stress.nvfp4_steps(np.random.default_rng(0), "zeros", STEPS)
    products = np.abs(
        emulator.decode_e2m1(a).reshape(STEPS, 16, 1, 4, 16)
        * emulator.decode_e2m1(b).reshape(STEPS, 1, 8, 4, 16)
    ).sum(axis=-1)
    exponents = np.maximum(sfa >> 3, 1)[:, :, None].astype(int) + np.maximum(sfb >> 3, 1)[:, None]
    at_the_top = exponents == exponents.max(axis=-1, keepdims=True)
    assert 0.05 < ((products == 0) & at_the_top).any(axis=-1).mean() < 0.95


@pytest.mark.parametrize("kind", stress.MATRICES)
def test_matrices_are_finite_and_of_their_kind(kind):
    x = stress.matrix(np.random.default_rng(0), kind, (40, 64))
    assert np.isfinite(x).all()
    codes = emulator.quantize(x, 1.0).block_scales
    floored = {"zero": 1.0, "float32 subnormals": 1.0, "floored and subnormal scales": 0.0}
    if kind in floored:
        assert (codes == 1).mean() >= floored[kind]
        assert (codes < 8).any()  # a subnormal scale
    if kind == "one huge":
        assert (codes == 0x7E).any()
    if kind == "negative maxima":
        assert (x.min(axis=1) == -np.abs(x).max(axis=1)).all()
    if kind == "ties":
        step = np.repeat(emulator.decode_e4m3(codes), 16, axis=1)
        assert np.isin(np.abs(x) / step, verify.E2M1.midpoints).mean() > 0.3
