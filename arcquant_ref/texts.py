"""Named texts for calibration and evaluation, cut into windows of tokens; nothing is downloaded.

Each has three parts that share no text: `calibration`, `choice` (between schemes or their settings) and
`evaluation`. What was chosen on one part is then measured on another.
"""

import bz2
import importlib.util
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from numpy.typing import ArrayLike, NDArray

PARTS = ("calibration", "choice", "evaluation")
FILE = "file:"  # and a path
ARTICLES = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"  # in gensim
LEAST = 9000  # an article has more characters than this
MODULES = (
    *("argparse", "ast", "difflib", "doctest", "inspect", "json.decoder", "optparse", "pickle", "shutil"),
    *("subprocess", "tarfile", "typing"),
)
PROVENANCE = {
    "wikipedia": "English Wikipedia, the start of a dump that gensim's wheel ships for its tests, CC BY-SA; "
    "without markup, tables, lists and short lines",
    "topics": "the help topics of Python's standard library (pydoc_data.topics), PSF licence; they change "
    "with Python's version",
    "code": f"modules of Python's standard library ({', '.join(MODULES)}), PSF licence; they change with "
    "Python's version",
}


def windows(
    text_name: str,
    encode: Callable[[str], ArrayLike],
    count: int,
    length: int = 512,
    part: str = "calibration",
) -> NDArray[np.int64]:
    """(count, length) token ids, int64: windows of one part of a text, none of which overlap.

    `text_name` is a key of PROVENANCE or file:PATH, UTF-8. `encode` makes token ids of a string. Of several
    documents come the first windows of each, then the second ones, and so on; what is left of a document is
    not used. Raises ValueError for another name or part, a count or length below 1, or a part with fewer
    windows; ImportError without gensim.
    """
    for name, value in {"count": count, "length": length}.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    tokens = [np.asarray(encode(document), np.int64) for document in documents(text_name, part)]
    rounds = range(max(len(ids) // length for ids in tokens))
    found = [
        ids[i * length : (i + 1) * length] for i in rounds for ids in tokens if len(ids) // length > i
    ]  # the order is normative: another one would be another choice of windows
    if len(found) < count:
        raise ValueError(
            f"text {text_name!r} has {len(found)} windows of {length} tokens in its part {part!r}, but "
            f"count={count}. Take fewer or shorter windows, or a longer text."
        )
    return np.stack(found[:count])


def documents(text_name: str, part: str) -> list[str]:
    """The strings that make up one part of a text: articles of `wikipedia`, else one third. Errors as in
    `windows`."""
    if part not in PARTS:
        raise ValueError(f"part={part!r} must be one of {', '.join(PARTS)}.")
    i = PARTS.index(part)
    if text_name == "wikipedia":
        return list(articles()[i :: len(PARTS)])
    text = _text(text_name)
    return [text[len(text) * i // len(PARTS) : len(text) * (i + 1) // len(PARTS)]]


def provenance(text_name: str) -> str:
    """Where a text comes from, and under which licence. ValueError for an unknown name."""
    if text_name.startswith(FILE):
        return f"the file {text_name.removeprefix(FILE)}"
    _check_name(text_name)
    return PROVENANCE[text_name]


def _check_name(text_name: str) -> None:
    if text_name not in PROVENANCE:
        raise ValueError(
            f"text {text_name!r} is unknown; it must be {', '.join(PROVENANCE)}, or {FILE}PATH for a UTF-8 "
            f"text of your own."
        )


def _text(text_name: str) -> str:
    if text_name.startswith(FILE):
        return _read(Path(text_name.removeprefix(FILE)))
    _check_name(text_name)
    if text_name == "topics":
        from pydoc_data.topics import topics

        return "\n\n".join(topics[key] for key in sorted(topics))
    return "\n\n".join(_read(_source(name)) for name in MODULES)


def _source(module: str) -> Path:
    """The file of a module of the standard library."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ImportError(f"Python's own module {module} is not installed. Use another text than 'code'.")
    return Path(spec.origin)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}). Save it as UTF-8.") from error


@cache
def articles() -> tuple[str, ...]:
    """The prose of all Wikipedia articles with more than LEAST characters, in the order of the dump."""
    spec = importlib.util.find_spec("gensim")  # does not import it
    if spec is None or spec.origin is None:
        raise ImportError(
            "text 'wikipedia' is part of the package gensim, which is not installed: "
            'pip install -e ".[model]"'
        )
    path = Path(spec.origin).parent / ARTICLES
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist. It is in gensim's wheel: pip install gensim==4.4.0")
    dump = bz2.decompress(path.read_bytes()).decode("utf-8")
    pages = [ElementTree.fromstring(page) for page in re.findall("<page>.*?</page>", dump, re.DOTALL)]
    prose = [_prose(page.findtext("revision/text") or "") for page in pages]
    return tuple(text for text in prose if len(text) > LEAST)


def _prose(markup: str) -> str:
    """The paragraphs of an article: lines of more than 80 characters that start no list, table or heading.

    Empty for a redirect.
    """
    from gensim.corpora.wikicorpus import filter_wiki

    if markup.lower().startswith("#redirect"):
        return ""
    plain = re.sub(r"\[\[|\]\]|'{2,}", "", filter_wiki(markup))
    lines = [line.strip() for line in plain.splitlines()]
    return "\n\n".join(line for line in lines if len(line) > 80 and line[0] not in "*|!{#:;=<")
