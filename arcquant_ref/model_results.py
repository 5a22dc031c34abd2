"""The results of `arcquant model`: a JSON file that grows scheme by scheme, its table and its curves."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .formats import Float64
from .schemes import Scheme
from .tensor import written_whole


class Comparison:
    """The losses of one model and calibration under schemes, on texts; in a file that grows with each."""

    def __init__(self, path: Path, settings: dict[str, Any], texts: dict[str, dict[str, Any]]) -> None:
        """Settings of model and calibration, and of each text. ValueError if the file has others."""
        self.path = path
        self.results: dict[str, Any] = {"settings": settings, "texts": {}, "schemes": {}}
        if path.exists():
            self.results = read(path)
        self._same("settings", self.results["settings"], settings)
        for name, text in texts.items():
            self._same(f"text {name!r}", self.results["texts"].setdefault(name, text), text)

    def missing(self, scheme: Scheme, texts: Iterable[str]) -> list[str]:
        """The texts on which this scheme has no losses yet."""
        held = self.results["schemes"].get(scheme.label)
        if held is None:
            return list(texts)
        self._same(f"scheme {scheme.label!r}", held["scheme"], json.loads(json.dumps(asdict(scheme))))
        return [text for text in texts if text not in held["losses"]]

    def add(self, scheme: Scheme, found: dict[str, Float64], summary: dict[str, Any]) -> None:
        """Losses of windows by text, and what `summary` says of the layers; written at once."""
        new = {"scheme": asdict(scheme), "losses": {}} | summary
        held = self.results["schemes"].setdefault(scheme.label, new)
        held["losses"] |= {text: values.round(6).tolist() for text, values in found.items()}
        with written_whole(self.path) as file:
            file.write(json.dumps(self.results, indent=1).encode())

    def _same(self, what: str, held: dict[str, Any], wanted: dict[str, Any]) -> None:
        if held != wanted:
            different = [key for key in held.keys() | wanted.keys() if held.get(key) != wanted.get(key)]
            raise ValueError(
                f"{self.path} holds another {what}: {', '.join(sorted(different))} differ. Write to another "
                f"file, or delete it."
            )


def read(path: Path) -> dict[str, Any]:
    """What `arcquant model -o` wrote. FileNotFoundError for none, ValueError for another file."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist. `arcquant model -o {path}` makes it.")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        assert results.keys() == {"settings", "texts", "schemes"}
        return results
    except (ValueError, AttributeError, AssertionError) as error:
        raise ValueError(f"{path} is not a file of `arcquant model -o`.") from error


def table(results: dict[str, Any], against: str = "float32") -> str:
    """What was read, and a line a scheme: width K'/K, bits of x and w, and for each text perplexity and the
    loss above that of `against` with its paired standard error. ValueError for an unknown scheme."""
    schemes, texts = results["schemes"], results["texts"]
    if against not in schemes:
        raise ValueError(f"--against {against!r} is none of {', '.join(map(repr, schemes))}.")
    lines = [f"{key}: {value}" for key, value in results["settings"].items()]
    for name, text in texts.items():
        lines.append(f"text {name}: {text['windows']} x {text['length']} tokens, {text['provenance']}")
    if unseen := max((held.get("unseen", 0) for held in schemes.values()), default=0):
        lines.append(f"{unseen} layers saw no calibration token: channels as they are, no residuals")
    lines += ["", f"{'scheme':<46}{'width':>7}{'bits x, w':>13}" + "".join(f"   {n:>25}" for n in texts)]
    for label, held in schemes.items():
        line = f"{label:<46}{held['width']:>7.3f}{held['bits'][0]:>7.2f}{held['bits'][1]:>6.2f}"
        for text in texts:
            found, base = held["losses"].get(text), schemes[against]["losses"].get(text)
            line += f"   {_cell(found, base) if found and base else '':>25}"
        lines.append(line.rstrip())
    return "\n".join(lines)


FULL_PRECISION = "float32"


def _cell(found: list[float], base: list[float]) -> str:
    mean, error = paired(found, base)
    return f"{np.exp(np.mean(found)):.2f}  {mean:+.4f} ± {error:.4f}"


def paired(found: Sequence[float], base: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of the difference of two schemes' losses over the same windows; one window has
    no standard error, NaN."""
    difference = np.asarray(found) - np.asarray(base)
    error = difference.std(ddof=1) / np.sqrt(len(difference)) if len(difference) > 1 else np.nan
    return float(difference.mean()), float(error)


def fingerprint(windows: NDArray[np.int64]) -> str:
    """Of token ids, so that a file says what it read."""
    return hashlib.sha256(np.ascontiguousarray(windows, np.int64).tobytes()).hexdigest()[:16]
