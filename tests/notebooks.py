"""What a tutorial must be, as functions that list what is wrong. A notebook is the JSON of its .ipynb."""

import ast
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from support import optional

ROOT = Path(__file__).parent.parent
TUTORIALS = ROOT / "tutorials"
MOST_BYTES = 400_000
INSTALL = """\
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("arcquant_ref") is None:  # in Colab: clone the repository, or open its folder
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "..[tutorials]"], check=True)
"""

Notebook = Any
Cell = Any


def code_cells(notebook: Notebook) -> list[tuple[int, Cell]]:
    return [(i, cell) for i, cell in enumerate(notebook["cells"]) if cell["cell_type"] == "code"]


def printed(cell: Cell) -> str:
    """What a code cell says in words: stdout, results, markdown, and the alt texts of its figures."""
    said = []
    for output in cell["outputs"]:
        data = output.get("data", {})
        alt = output.get("metadata", {}).get("image/png", {}).get("alt", "")
        parts = [output.get("text", ""), data.get("text/markdown", ""), alt]
        if output["output_type"] == "execute_result":
            parts.append(data["text/plain"])
        said += ["".join(part) for part in parts]
    return "".join(said)


def out_of_step(source: Notebook, built: Notebook) -> list[str]:
    """Cells of the .py (read by jupytext) that are not those of the .ipynb."""

    def written(cell: Cell) -> tuple:
        metadata = {key: cell["metadata"].get(key) for key in ("tags", "jupyter")}
        return cell["cell_type"], "".join(cell["source"]), metadata

    ours, theirs = ([written(cell) for cell in notebook["cells"]] for notebook in (source, built))
    wrong = [
        f"cell {i} of .py and .ipynb differ: {a}, {b}" for i, (a, b) in enumerate(zip(ours, theirs)) if a != b
    ]
    if len(ours) != len(theirs):
        wrong.append(f".py has {len(ours)} cells, .ipynb {len(theirs)}")
    return wrong


def changed_outputs(committed: Notebook, executed: Notebook) -> list[str]:
    """Cells that say something else when they run than what is committed, where they must not vary."""
    wrong = []
    for (i, old), (_, new) in zip(code_cells(committed), code_cells(executed)):
        if printed(old) != printed(new) and "varies" not in old["metadata"].get("tags", []):
            wrong.append(f"cell {i} says\n{printed(new)}\ncommitted is\n{printed(old)}")
    return wrong


def problems(notebook: Notebook) -> list[str]:
    """What the cells and outputs lack of the rules in tutorials/README.md."""
    return [
        *_bad_outputs(notebook),
        *_bad_figures(notebook),
        *_bad_install(notebook),
        *_bad_exercise(notebook),
    ]


def _bad_outputs(notebook: Notebook) -> list[str]:
    wrong = []
    for n, (i, cell) in enumerate(code_cells(notebook), 1):
        if cell["execution_count"] != n or cell["id"] != f"cell-{i}" or "execution" in cell["metadata"]:
            wrong.append(f"cell {i} is not as tutorials/build.py leaves it: build the notebook anew")
        for output in cell["outputs"]:
            if output["output_type"] == "error":
                wrong.append(f"cell {i} raises {output['ename']}")
            if output.get("name") == "stderr":
                wrong.append(f"cell {i} writes to stderr: {''.join(output['text'])}")
    return wrong


def _bad_figures(notebook: Notebook) -> list[str]:
    """`plots.show` labels axes and adds the text: every figure comes from it, and there is one."""
    wrong, figures = [], 0
    for i, cell in code_cells(notebook):
        for output, after in zip(cell["outputs"], [*cell["outputs"][1:], {}]):
            if not any(kind.startswith("image/") for kind in output.get("data", {})):
                continue
            figures += 1
            alt = output["metadata"].get("image/png", {}).get("alt", "")
            if not alt:
                wrong.append(f"cell {i}: a figure has no alt text")
            if "".join(after.get("data", {}).get("text/markdown", "")) != f"*{alt}*":
                wrong.append(f"cell {i}: the alt text of a figure does not stand below it")
            if "show(" not in "".join(cell["source"]):
                wrong.append(f"cell {i}: a figure does not come from plots.show, which wants labelled axes")
    return wrong if figures else ["no figure"]


def _bad_install(notebook: Notebook) -> list[str]:
    _, first = code_cells(notebook)[0]
    if "".join(first["source"]).startswith(INSTALL):
        return []
    return ["the first code cell does not begin with the lines that install the package (tests/notebooks.py)"]


def _bad_exercise(notebook: Notebook) -> list[str]:
    cells = code_cells(notebook)
    answers = [cell for _, cell in cells if "answer" in cell["metadata"].get("tags", [])]
    wrong = []
    if not any(printed(cell).startswith("not yet") for _, cell in cells if cell not in answers):
        wrong.append('no cell prints "not yet": the stub of the exercise')
    if not answers:
        wrong.append('no cell has the tag "answer"')
    for cell in answers:
        if not cell["metadata"].get("jupyter", {}).get("source_hidden"):
            wrong.append("an answer is not folded: its metadata lack source_hidden")
        if not any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse("".join(cell["source"])))):
            wrong.append("an answer asserts nothing")
    return wrong


def build() -> ModuleType:
    """tutorials/build.py; a skip without what it needs."""
    for name in ("jupytext", "nbclient", "ipykernel"):
        optional(name)
    spec = spec_from_file_location("build_tutorials", TUTORIALS / "build.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
