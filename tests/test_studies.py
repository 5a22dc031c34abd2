"""`arcquant study`: what is counted, by hand and by definition; each study, small, of a tiny random model."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from support import optional
from test_checkpoint import tokenizer, write  # noqa: F401  (it skips without torch, gguf or tokenizers)

import emulator
from arcquant_ref import evaluate, studies, texts
from arcquant_ref.cli import main
from arcquant_ref.model import Llama

ROOT = Path(__file__).parent.parent
channels = st.lists(st.integers(0, 40), unique=True)


@given(
    x=arrays(np.float64, st.tuples(st.just(3), st.integers(2, 20)), elements=st.integers(-50, 50)),
    factor=st.sampled_from([-3.0, 0.5, 7.0]),
)
@example(x=np.eye(3, 16), factor=7.0)  # one of 16: the most there is
def test_kurtosis_lies_between_1_and_what_one_outlier_has(x, factor):
    """And neither a factor nor an offset moves it. Of equal values it is NaN."""
    n, found = x.shape[1], studies.kurtosis(x, 1)
    equal = (x == x[:, :1]).all(axis=1)
    np.testing.assert_array_equal(np.isnan(found), equal)
    assert ((found[~equal] > 1 - 1e-9) & (found[~equal] < n - 2 + 1 / (n - 1) + 1e-9)).all()
    np.testing.assert_allclose(studies.kurtosis(factor * x + 11, 1)[~equal], found[~equal], rtol=1e-9)
    np.testing.assert_array_equal(studies.kurtosis(x.T, 0), studies.kurtosis(x, 1))


def test_kurtosis_of_known_values():
    outlier = np.eye(1, 16)
    assert studies.kurtosis(outlier, 1)[0] == pytest.approx(14 + 1 / 15)
    gauss = np.random.default_rng(1).standard_normal((200_000, 16))
    assert studies.kurtosis(gauss, 0) == pytest.approx(3, abs=0.15)  # standard error √(24 / 200 000) = 0.011
    assert studies.kurtosis(gauss, 1).mean() == pytest.approx(3 * 15 / 17, abs=0.02)


@given(a=channels, b=channels)
@example(a=[], b=[])
def test_jaccard_is_shared_over_together(a, b):
    together = set(a) | set(b)
    assert studies.jaccard(a, b) == (len(set(a) & set(b)) / len(together) if together else 1)
    assert studies.jaccard(a, b) == studies.jaccard(b, a)
    assert studies.jaccard(a, a) == 1


def test_every_token_has_one_largest_of_each_block():
    x = np.random.default_rng(2).standard_normal((50, 48)).astype(np.float32)
    x[:, 5] *= 1000
    x[10:, 20] = 1e6
    share = studies.largest_in_block(x)
    np.testing.assert_allclose(share.reshape(-1, 16).sum(axis=1), 1)
    assert share[5] == 1
    assert 0.8 <= share[20] <= 1
    expected = [(np.abs(x[:, k // 16 * 16 :][:, :16]).argmax(axis=1) == k % 16).mean() for k in range(48)]
    np.testing.assert_array_equal(share, expected)


def test_statistics_of_a_site_made_by_hand():
    """Channel 3 is always large, channel 20 only in first tokens."""
    x = np.random.default_rng(3).standard_normal((4, 33, 64)).clip(-2, 2).astype(np.float16)
    x[:, :, 3], x[:, 0, 20] = 50, 400
    found = studies.within(x)
    assert found[studies.FIRST] == 8
    assert found[studies.MAX_OVER_MEDIAN] == pytest.approx(200, rel=0.01)
    assert found["the same without first tokens"] == pytest.approx(25, rel=0.01)
    assert found["channels above τ · max"] == 1  # 50 is τ · 400, not above it
    assert found["S, their number rounded up to 16, / K"] == 16 / 64
    assert found["kurtosis of a channel, largest"] < 4
    assert found[studies.SAME] > (1 + 3 / 16) / 4


def test_two_texts_that_are_one_have_all_in_common():
    amax = np.random.default_rng(4).lognormal(0, 2, 64).astype(np.float32)
    found = studies.between(amax, amax)
    assert {value for what, value in found.items() if "random" not in what} == {1}


def test_what_two_texts_have_in_common_by_hand():
    """Eight outliers each, four of them shared; of the others, eight equals fill S up, the last ones."""
    first, second = np.ones((2, 64), np.float32)
    first[:8] = second[4:12] = 100
    overlap, random, above, caught = studies.between(first, second).values()
    assert (overlap, random) == ((4 + 8) / 20, round(1 / 7, 4))  # 1/16 in both of 1/4 + 1/4 - 1/16 in one
    assert (above, caught) == (round(4 / 12, 4), 4 / 8)


def test_a_profile_begins_with_the_largest_and_ends_with_the_least():
    amax = np.random.default_rng(5).lognormal(0, 1, 576).astype(np.float32)
    found = studies.profile(amax)
    assert [found[0][0], found[-1][0]] == [1, 576]
    assert found[0][1] == pytest.approx(amax.max() / np.median(amax), abs=1e-4)
    assert (np.diff(found, axis=0)[:, 0] > 0).all()
    assert (np.diff(found, axis=0)[:, 1] <= 0).all()


@pytest.fixture
def model(write):  # noqa: F811
    optional("gensim")
    return Llama(write())


@pytest.fixture
def layers(model):
    return evaluate.calibrate(model, texts.windows("topics", model.encode, 2, 32))


def test_sequences_in_a_batch_do_not_see_each_other(model):
    windows = texts.windows("topics", model.encode, 3, 24, "choice")
    alone = evaluate.losses(model, windows)
    # float32 sums in another order; a token that sees another sequence moves a loss by far more
    np.testing.assert_allclose(studies.batch_losses(model, windows, 3), alone, atol=1e-4)
    np.testing.assert_allclose(studies.batch_losses(model, windows, 1), alone, atol=1e-4)


def test_what_static_scales_count(model, layers):
    """Of the calibrated rows nothing lies beyond; of one element moved beyond, one token and one block."""
    layer = layers[3]
    ready = studies.prepared(studies.studied()[0], [layer])[layer.name]
    static = studies.Static(layer, ready)
    x = layer.x.astype(np.float32)
    expected = emulator.dequantize(emulator.augment_activations(x, ready.selection))
    np.testing.assert_array_equal(static.layer().activations(x), expected)  # of these rows, the same scale
    assert (static.tokens, static.tokens_beyond, static.blocks_beyond) == (len(x), 0, 0)
    x[7, ready.selection.order[0]] = 1.01 * static.amax
    assert np.abs(static.activations(x)).max() == pytest.approx(static.amax, rel=1e-6)
    assert (static.tokens, static.tokens_beyond, static.blocks_beyond) == (2 * len(x), 1, 1)
    assert static.blocks == 2 * len(x) * layer.weights.shape[1] // 16


@pytest.mark.parametrize("name", list(studies.STUDIES))
def test_a_small_study_prints_every_cell(model, name, monkeypatch, tmp_path, capsys):
    """And the file it writes prints the same again."""
    monkeypatch.setattr(studies, "Llama", lambda path: model)
    monkeypatch.setattr(studies, "LENGTH", 32)
    monkeypatch.setattr(studies, "LENGTHS", (8, 16))
    monkeypatch.setattr(studies, "BATCHES", (1, 2, 32))
    monkeypatch.setattr(studies, "LEAST", 2)
    monkeypatch.setattr(
        studies, "TEXTS", ("wikipedia", "topics", "code")[: 3 if name == "activations" else 2]
    )
    path = tmp_path / "study.json"
    plot = ["--plot", str(tmp_path / "study.png")] if name == "activations" else []
    assert main(["study", name, "--windows", "2", "-o", str(path), *plot]) == 0
    printed = capsys.readouterr().out
    assert main(["study", name, "-o", str(path), "--show"]) == 0
    assert capsys.readouterr().out == printed
    assert "nan" not in printed
    assert not plot or (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
    cells = {"activations": 4 * (10 * 3 + 4 * 4), "lengths": 2 * 2 * 3, "shift": 2 * 2 * 5}[name]
    assert len(re.findall(r"\([ \d]\d\)" if plot else "±", printed)) == cells


def test_sentences(capsys, tmp_path):
    with pytest.raises(ValueError, match="study 'weather' is none of activations, lengths, shift"):
        studies.run("weather", 2)
    other = tmp_path / "other.json"
    other.write_text('{"study": "shift", "settings": {}, "rows": []}')
    for line, message in {
        "lengths --plot a.png": "--plot draws the study `activations`, not 'lengths'",
        "lengths --show": "name it with -o FILE.json",
        f"lengths --show -o {other}": "is not a file of `arcquant study lengths -o`",
        "lengths -o a.txt": "must end in .json",
    }.items():
        assert main(["study", *line.split()]) == 2
        assert message in capsys.readouterr().err


RECORDED = [path.stem.removeprefix("study_") for path in (ROOT / "docs/results").glob("study_*.json")]


@pytest.mark.parametrize("name", RECORDED)
def test_the_page_shows_lines_of_the_file(name):
    """Of docs/results.md, below its command."""
    page = (ROOT / "docs/results.md").read_text()
    path = f"docs/results/study_{name}.json"
    shown = re.search(rf"`arcquant study {name}[^`]*-o {re.escape(path)}.*?```\n(.*?)```", page, re.DOTALL)
    assert shown, name
    printed = studies.table(studies.read(ROOT / path, name)).splitlines()
    lines = [line for line in shown[1].splitlines() if line]
    assert len(lines) > 3
    assert [line for line in lines if line not in printed] == []
