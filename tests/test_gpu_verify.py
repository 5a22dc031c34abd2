"""`python -m gpu.verify` without a GPU: a part of it, interpreted, and what it says of a difference."""

import json

import numpy as np
import pytest
from support import cuda_compiler

from gpu import load, verify
from gpu.device import Interpreted
from gpu.face import Face

cuda_compiler()


@pytest.mark.parametrize("arch", ["90a", "120a"])
def test_steps_and_formats_agree(arch):
    face = Face(Interpreted(arch))
    checks = [
        check
        for group in (verify.check_steps, verify.check_formats)
        for check in group(face, np.random.default_rng(0), full=False)
    ]
    assert len(checks) == 4 + load.is_native(arch)
    assert all(check.compared > 200 and check.different == 0 for check in checks)


def test_a_difference_is_counted_and_shown_in_bits():
    check = verify.Check("matmul")
    check.compare("here", np.float32([[1, 2, 3]]), np.float32([[1, 2.5, -3]]))
    assert (check.compared, check.different, check.failed) == (3, 2, True)
    assert check.examples[0] == "here at (0, 1): got 0x40000000, expected 0x40200000"
    assert "DIFFERS" in verify.line(check)
    check.must_agree = False
    assert not check.failed
    with pytest.raises(ValueError, match=r"matmul, there: shape \(1,\), expected \(2,\)"):
        check.compare("there", np.zeros(1), np.zeros(2))


def test_the_table_and_the_record(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(verify, "CHECKS", [verify.check_steps])
    record = tmp_path / "record.json"
    assert verify.main(["--interpreted", "80", "--json", str(record)]) == 0
    written = json.loads(record.read_text())
    assert written["arch"] == "sm_80"
    assert written["gpu"] == "none: PTX interpreted"
    assert written["checks"][0]["name"] == "step of mma.m16n8k16 fp16"
    assert "4,096          0  equal" in capsys.readouterr().out


def test_without_a_gpu_it_says_why(monkeypatch, capsys):
    monkeypatch.setattr(load, "why_not", lambda: "the NVIDIA driver finds no GPU")
    assert verify.main([]) == 1
    assert capsys.readouterr().err == "gpu.verify needs a GPU: the NVIDIA driver finds no GPU.\n"
