"""`python tutorials/build.py [NN …]` runs NN_verb.py, all of them without NN, and writes NN_verb.ipynb.

The file depends on nothing but the source and what it prints: no ids by chance, no times.
"""

import os
import sys
import time
from pathlib import Path

import jupytext
import nbclient
import nbformat
from nbformat import NotebookNode

HERE = Path(__file__).resolve().parent


def read(source: Path) -> NotebookNode:
    """The cells of a .py, numbered, without outputs."""
    notebook = jupytext.read(source)
    del notebook.metadata["jupytext"]
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i}"
    return notebook


def execute(notebook: NotebookNode, seconds: float) -> NotebookNode:
    """The notebook after a run in a fresh kernel, which imports the package from this repository.

    Raises what a cell raises, as nbclient's CellExecutionError; TimeoutError after `seconds` in all.
    """
    end = time.monotonic() + seconds
    client = nbclient.NotebookClient(
        notebook,
        kernel_name="python3",
        timeout_func=lambda cell: max(end - time.monotonic(), 1),
        record_timing=False,
        resources={"metadata": {"path": HERE}},
    )
    client.execute(env={**os.environ, "PYTHONPATH": str(HERE.parent)})
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = joined(cell.outputs)
    notebook.metadata.language_info.pop("version")
    return notebook


def joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Outputs with neighbouring pieces of one stream put together: where a stream is cut is chance."""
    kept: list[NotebookNode] = []
    for output in outputs:
        if kept and output.output_type == kept[-1].output_type == "stream" and output.name == kept[-1].name:
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def main(numbers: list[str]) -> None:
    for number in numbers or ["[0-9][0-9]"]:
        sources = sorted(HERE.glob(f"{number}_*.py"))
        if not sources:
            sys.exit(f"There is no tutorials/{number}_*.py. Give two digits, such as 01, or nothing for all.")
        for source in sources:
            print(source.name)
            nbformat.write(execute(read(source), 600), source.with_suffix(".ipynb"))


if __name__ == "__main__":
    main(sys.argv[1:])
