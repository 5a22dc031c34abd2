"""Texts cut into windows. `encode` is one token a character here: no tokenizer is needed."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import optional

from arcquant_ref import texts


def encode(text):
    return [ord(character) for character in text]


def decode(window):
    return "".join(map(chr, window))


@pytest.fixture(params=[*texts.PROVENANCE, "file"])
def name(request, tmp_path):
    if request.param == "wikipedia":
        optional("gensim")
    if request.param == "file":
        path = tmp_path / "own.txt"
        path.write_text("".join(f"line {i} of naïve text\n" for i in range(3000)), encoding="utf-8")
        return f"file:{path}"
    return request.param


def test_windows_are_what_they_say_and_the_same_again(name):
    for part in texts.PARTS:
        found = texts.windows(name, encode, 12, 100, part)
        assert (found.shape, found.dtype) == ((12, 100), np.int64)
        np.testing.assert_array_equal(found, texts.windows(name, encode, 12, 100, part))
        np.testing.assert_array_equal(found[:5], texts.windows(name, encode, 5, 100, part))
        where = [document for document in texts.documents(name, part) if decode(found[0]) in document]
        assert where


def test_parts_share_no_window(name):
    parts = [texts.windows(name, encode, 60, 200, part) for part in texts.PARTS]
    assert len({decode(window) for part in parts for window in part}) == 3 * 60


def test_parts_share_no_document_and_leave_none_out(name):
    parts = [texts.documents(name, part) for part in texts.PARTS]
    if name == "wikipedia":
        everything = [document for part in parts for document in part]
        assert len(set(everything)) == len(everything) == len(texts.articles())
        assert set(everything) == set(texts.articles())
    else:
        assert "".join(document for part in parts for document in part) == texts._text(name)
        assert all(len(part) == 1 for part in parts)


@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6), length=st.integers(1, 9), data=st.data())
def test_windows_of_several_documents_take_turns(lengths, length, data):
    """First all first windows, then all second ones; within a document they follow each other."""
    with pytest.MonkeyPatch.context() as patch:
        documents = [str(i) for i in range(len(lengths))]
        ids = {d: np.arange(n) + 1000 * i for i, (d, n) in enumerate(zip(documents, lengths))}
        patch.setattr(texts, "documents", lambda name, part: documents)
        expected = sorted(
            (start // length, i) for i, n in enumerate(lengths) for start in range(0, n - length + 1, length)
        )
        if not expected:
            with pytest.raises(ValueError, match="has 0 windows"):
                texts.windows("any", ids.get, 1, length)
            return
        count = data.draw(st.integers(1, len(expected)))
        found = texts.windows("any", ids.get, count, length)
        assert [(row[0] % 1000 // length, row[0] // 1000) for row in found] == expected[:count]
        assert (np.diff(found, axis=1) == 1).all()


def test_wikipedia_is_the_text_that_results_were_measured_on():
    """Another release of gensim would change the windows behind published numbers; this says so."""
    optional("gensim")
    found = texts.articles()
    assert len(found) == 66
    assert [len(texts.documents("wikipedia", part)) for part in texts.PARTS] == [22, 22, 22]
    digest = hashlib.sha256("\0".join(found).encode()).hexdigest()
    assert digest == DIGEST, f"{len(found)} articles, {sum(map(len, found))} characters"
    assert not any("[[" in text or "''" in text for text in found)


DIGEST = "c3e3f929e3561b14a53401f4ce6fa2bf98c2b64d57b5513d2e9e680c71759771"


def test_every_text_says_where_it_comes_from(name):
    assert texts.provenance(name)
    assert all("PSF" in text or "CC BY-SA" in text for text in texts.PROVENANCE.values())


def test_sentences(tmp_path):
    short, binary = tmp_path / "short.txt", tmp_path / "binary.txt"
    short.write_text("x" * 100)
    binary.write_bytes(b"\xff\xfe\x00")
    for arguments, message in {
        ("novel", 1): r"text 'novel' is unknown; it must be wikipedia, topics, code, or file:PATH",
        ("topics", 1, 8, "test"): r"part='test' must be one of calibration, choice, evaluation",
        ("topics", 0): r"count=0 must be at least 1",
        ("topics", 1, -1): r"length=-1 must be at least 1",
        (f"file:{short}", 4, 10): r"has 3 windows of 10 tokens in its part 'calibration', but count=4. Take",
        (f"file:{binary}", 1): r"binary.txt is not UTF-8 text .* Save it as UTF-8",
    }.items():
        with pytest.raises(ValueError, match=message):
            texts.windows(arguments[0], encode, *arguments[1:])
    with pytest.raises(ValueError, match="'novel' is unknown"):
        texts.provenance("novel")
    with pytest.raises(FileNotFoundError, match=r"absent\.txt"):
        texts.windows("file:absent.txt", encode, 1)


def test_wikipedia_says_what_to_install(monkeypatch, tmp_path):
    texts.articles.cache_clear()
    monkeypatch.setitem(sys.modules, "gensim", None)
    with pytest.raises(ImportError, match=r'not installed: pip install -e "\.\[model\]"'):
        texts.windows("wikipedia", encode, 1)
    monkeypatch.delitem(sys.modules, "gensim")
    (tmp_path / "gensim").mkdir()
    (tmp_path / "gensim/__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"It is in gensim's wheel: pip install gensim==4\.4\.0"):
        texts.windows("wikipedia", encode, 1)


def test_import_brings_in_nothing_heavy():
    code = (
        "import sys; from arcquant_ref import texts; texts.windows('topics', lambda s: [*map(ord, s)], 1); "
        "print(*sys.modules)"
    )
    modules = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split())
    assert "pydoc_data.topics" in modules
    assert not modules & {"torch", "gensim", "scipy", "tokenizers"}
