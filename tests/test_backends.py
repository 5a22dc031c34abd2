import inspect
import sys

import pytest
from support import usable_backends

from arcquant_ref import backends

FACE = [name for name in vars(backends.Backend) if not name.startswith("_")]


MORE = {  # what a backend takes beyond the face: a faster product; an offline search of weights' scales
    ("gpu", "matmul"): ["exact"],
    ("reference", "augment_weights"): ["energy"],
    ("emulator", "augment_weights"): ["energy"],
}


def test_the_face_has_one_signature_in_every_backend():
    assert len(FACE) == 10
    for name in usable_backends():
        for function in FACE:
            declared = list(inspect.signature(getattr(backends.Backend, function)).parameters)[1:]
            parameters = inspect.signature(getattr(backends.get(name), function)).parameters
            assert list(parameters)[: len(declared)] == declared
            more = list(parameters)[len(declared) :]
            assert more == MORE.get((name, function), [])


def test_available_names_every_backend_and_a_reason():
    reasons = backends.available()
    assert list(reasons) == ["reference", "emulator", "gpu"]
    assert reasons["reference"] is None
    for name, reason in reasons.items():
        assert reason is None or name in reason


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend='cuda' is not one of reference, emulator, gpu"):
        backends.get("cuda")


@pytest.mark.parametrize("layout", ["emulator/__init__.py", "emulator.py", "gpu/__init__.py"])
def test_a_foreign_package_of_the_same_name_is_refused_by_its_path(tmp_path, monkeypatch, layout):
    path = tmp_path / layout
    path.parent.mkdir(exist_ok=True)
    path.write_text("")
    package = layout.split("/")[0].removesuffix(".py")
    for name in [n for n in sys.modules if n.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ImportError, match=f"'{package}' found at {tmp_path}.* is not the one of arcquant_ref"
    ):
        backends.get(package)
    sys.modules.pop(package, None)
