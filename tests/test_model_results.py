"""The file of `arcquant model`: what it holds is kept, what is not of its kind refused; its table."""

import json
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from arcquant_ref import cli
from arcquant_ref.model_results import Comparison, fingerprint, paired, read, table
from arcquant_ref.schemes import SCHEMES

ROOT = Path(__file__).parent.parent
SETTINGS = {"model": "made", "calibration": "none"}
TEXTS = {"prose": {"windows": 3, "length": 8, "part": "evaluation", "tokens": "0", "provenance": "made"}}
FLOAT32, NVFP4 = SCHEMES[0], SCHEMES[1]
SUMMARY = {"width": 1.0, "bits": [4.5, 4.5], "layers": []}


@pytest.fixture
def held(tmp_path) -> Path:
    comparison = Comparison(tmp_path / "r.json", SETTINGS, TEXTS)
    comparison.add(FLOAT32, {"prose": np.array([1.0, 2.0, 3.0])}, SUMMARY | {"bits": [16.0, 16.0]})
    comparison.add(NVFP4, {"prose": np.array([1.1, 2.3, 3.2])}, SUMMARY)
    return tmp_path / "r.json"


def test_what_is_there_is_not_missing(held):
    again = Comparison(held, SETTINGS, TEXTS | {"more": TEXTS["prose"]})
    assert again.missing(NVFP4, ["prose", "more"]) == ["more"]
    assert again.missing(SCHEMES[2], ["prose"]) == ["prose"]


def test_a_new_text_joins_a_scheme_and_its_summary_stays(held):
    again = Comparison(held, SETTINGS, TEXTS)
    again.add(NVFP4, {"more": np.array([4.0])}, {"width": 7.0})
    scheme = read(held)["schemes"]["NVFP4"]
    assert scheme["width"] == 1.0
    assert scheme["losses"] == {"prose": [1.1, 2.3, 3.2], "more": [4.0]}


@pytest.mark.parametrize(
    ("settings", "texts", "words"),
    [
        (SETTINGS | {"model": "other"}, TEXTS, "settings: model"),
        (SETTINGS, {"prose": TEXTS["prose"] | {"tokens": "1"}}, "text 'prose': tokens"),
    ],
)
def test_other_settings_are_refused(held, settings, texts, words):
    with pytest.raises(ValueError, match=f"holds another {words} differ. Write to another file"):
        Comparison(held, settings, texts)


def test_another_scheme_of_that_name_is_refused(held):
    with pytest.raises(ValueError, match="another scheme 'NVFP4': weights differ"):
        Comparison(held, SETTINGS, TEXTS).missing(replace(NVFP4, weights="searched"), ["prose"])


def test_a_foreign_file_is_refused(tmp_path, capsys):
    (tmp_path / "x.json").write_text("[]")
    assert cli.main(["model", "-o", str(tmp_path / "x.json"), "--show"]) == 2
    assert "is not a file of `arcquant model -o`" in capsys.readouterr().err
    assert cli.main(["model", "-o", str(tmp_path / "none.json"), "--show"]) == 2
    assert "none.json does not exist. `arcquant model -o" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--windows", "--calibration-windows", "--length"])
def test_no_windows_are_refused_by_their_option(tmp_path, capsys, option):
    assert cli.main(["model", "-o", str(tmp_path / "r.json"), option, "0"]) == 2
    assert f"{option} 0 must be at least 1" in capsys.readouterr().err


def test_one_window_has_no_standard_error():
    mean, error = paired([2.0], [1.5])
    assert mean == 0.5
    assert np.isnan(error)


def test_the_table_has_perplexity_and_the_paired_difference(held):
    """exp of the mean, the mean of 0.1, 0.3 and 0.2, and their standard deviation over √3."""
    line = next(line for line in table(read(held)).splitlines() if line.startswith("NVFP4 "))
    assert line.split() == ["NVFP4", "1.000", "4.50", "4.50", f"{np.exp(2.2):.2f}", "+0.2000", "±", "0.0577"]
    assert paired([2, 4], [1, 1]) == (2.0, 1.0)


def test_differences_from_another_scheme(held, capsys):
    assert cli.main(["model", "-o", str(held), "--show", "--against", "NVFP4"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("float32 "))
    assert line.split()[5:] == ["-0.2000", "±", "0.0577"]
    assert cli.main(["model", "-o", str(held), "--show", "--against", "NVFP5"]) == 2
    assert "--against 'NVFP5' is none of 'float32', 'NVFP4'" in capsys.readouterr().err


def test_fingerprints_tell_windows_apart():
    a = np.arange(6).reshape(2, 3)
    assert fingerprint(a) == fingerprint(a.copy()) != fingerprint(a[::-1])


def test_an_unknown_scheme_is_named(tmp_path, capsys):
    assert cli.main(["model", "-o", str(tmp_path / "r.json"), "--scheme", "NVFP5"]) == 2
    assert "--scheme 'NVFP5' is none of 'float32', 'NVFP4'" in capsys.readouterr().err


def test_the_committed_results_are_of_the_schemes_here():
    """Names, settings and order of docs/results/model_smollm2.json, and the table in docs/results.md."""
    results = read(ROOT / "docs/results/model_smollm2.json")
    assert list(results["schemes"]) == [scheme.label for scheme in SCHEMES]
    for scheme in SCHEMES:
        assert results["schemes"][scheme.label]["scheme"] == json.loads(json.dumps(asdict(scheme)))
    assert table(results) in (ROOT / "docs/results.md").read_text()


def test_the_bars_of_the_curves_hold_in_the_committed_results():
    """What docs/results.md says of widths, with and without the search: two-sided at 1.05 below the paper's
    rule, and each step wider below the one before, in paired differences."""
    schemes = read(ROOT / "docs/results/model_smollm2.json")["schemes"]

    def loss(label: str) -> list[float]:
        return schemes[label]["losses"]["wikipedia"]

    for also in ("", ", searched scales"):
        mean, error = paired(loss(f"two-sided, 1.05{also}"), loss(f"ARC, τ = 1/8{also}"))
        assert mean < -error
        for narrower, wider in pairwise(("1.05", "1.10", "1.19", "1.35", "1.55", "1.75")):
            mean, error = paired(loss(f"two-sided, {wider}{also}"), loss(f"two-sided, {narrower}{also}"))
            assert mean < -error
