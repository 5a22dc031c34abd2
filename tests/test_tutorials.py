"""The notebooks: each .ipynb is its .py, executed; and each keeps the rules. Then the rules themselves, on
notebooks with something wrong planted."""

import copy
import json
import re

import notebooks
import pytest
from matplotlib.figure import Figure
from notebooks import ROOT, TUTORIALS
from support import model_weights, optional

from arcquant_ref import plots

SOURCES = sorted(TUTORIALS.glob("[0-9]*.py"))
every_tutorial = pytest.mark.parametrize("source", SOURCES, ids=[path.stem for path in SOURCES])
NEEDS_MODEL = {"08_quantize"}


def committed(source):
    return json.loads(source.with_suffix(".ipynb").read_text())


def nothing_in(problems):
    assert not problems, "\n".join(problems)


def test_every_notebook_has_its_source():
    assert SOURCES
    assert sorted(TUTORIALS.glob("*.ipynb")) == [path.with_suffix(".ipynb") for path in SOURCES]


@every_tutorial
def test_the_notebook_keeps_the_rules(source):
    nothing_in(notebooks.problems(committed(source)))
    assert source.with_suffix(".ipynb").stat().st_size < notebooks.MOST_BYTES


@every_tutorial
def test_the_notebook_is_its_source_executed(source):
    build = notebooks.build()
    notebook = build.read(source)
    nothing_in(notebooks.out_of_step(notebook, committed(source)))
    if source.stem in NEEDS_MODEL:
        model_weights()
    before = set(TUTORIALS.iterdir())
    ran = build.execute(notebook, 300 if source.stem in NEEDS_MODEL else 60)
    assert set(TUTORIALS.iterdir()) <= before, "it leaves files"
    nothing_in(notebooks.changed_outputs(committed(source), ran))
    nothing_in(notebooks.problems(ran))


@every_tutorial
def test_the_page_of_tutorials_names_the_notebook_and_links_lead_somewhere(source):
    page = (TUTORIALS / "README.md").read_text()
    cells = committed(source)["cells"]
    number, title, minutes = re.match(
        r"# (\d)\. (.+)[^#]* (\d+)\sminutes", "".join(cells[0]["source"])
    ).groups()
    assert f"| {number} | [{title}]({source.stem}.ipynb) |" in page
    assert re.search(rf"^\| {number} \|.*\| {minutes} \|", page, re.MULTILINE), f"{minutes} minutes"
    markdown = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", markdown):
        announced = f"`{target.removesuffix('.ipynb')}`" in page  # a notebook that is still to come
        assert (TUTORIALS / target).exists() or announced, target


def of_first_cell(kind, notebook):
    """The first output that has `kind` in its data or metadata, or is of that name, and its cell."""
    for _, cell in notebooks.code_cells(notebook):
        for output in cell["outputs"]:
            if kind in (*output.get("data", {}), output.get("name")):
                return cell, output
    raise LookupError(kind)


def answer_of(notebook):
    return next(cell for cell in notebook["cells"] if "answer" in cell["metadata"].get("tags", []))


def no_alt(notebook):
    of_first_cell("image/png", notebook)[1]["metadata"] = {}


def other_caption(notebook):
    of_first_cell("text/markdown", notebook)[1]["data"]["text/markdown"] = "*A figure.*"


def no_caption(notebook):
    cell, output = of_first_cell("text/markdown", notebook)
    cell["outputs"].remove(output)


def figure_by_hand(notebook):
    of_first_cell("image/png", notebook)[0]["source"] = "display(Image(png, alt=alt), Markdown(alt))"


def no_figure(notebook):
    cell, _ = of_first_cell("image/png", notebook)
    cell["outputs"] = []


def an_error(notebook):
    error = {"output_type": "error", "ename": "NameError", "evalue": "", "traceback": []}
    notebooks.code_cells(notebook)[2][1]["outputs"].append(error)


def a_warning(notebook):
    of_first_cell("stdout", notebook)[1]["name"] = "stderr"


def rerun(notebook):
    notebooks.code_cells(notebook)[1][1]["execution_count"] = 9


def built_by_hand(notebook):
    notebook["cells"].insert(2, notebook["cells"][2])


def other_install(notebook):
    cell = notebooks.code_cells(notebook)[0][1]
    cell["source"] = "".join(cell["source"]).replace('"-q", ', "")


def solved_stub(notebook):
    for _, cell in notebooks.code_cells(notebook):
        if notebooks.printed(cell).startswith("not yet"):
            cell["outputs"][0]["text"] = "right: all inputs"


def no_answer(notebook):
    answer_of(notebook)["metadata"]["tags"] = []


def open_answer(notebook):
    del answer_of(notebook)["metadata"]["jupyter"]


def answer_without_assert(notebook):
    cell = answer_of(notebook)
    cell["source"] = "".join(cell["source"]).replace("assert ", "")


@pytest.mark.parametrize(
    ("plant", "found"),
    [
        (no_alt, "no alt text"),
        (other_caption, "does not stand below"),
        (no_caption, "does not stand below"),
        (figure_by_hand, "plots.show"),
        (no_figure, "no figure"),
        (an_error, "raises NameError"),
        (a_warning, "stderr"),
        (rerun, "build the notebook anew"),
        (built_by_hand, "build the notebook anew"),
        (other_install, "install"),
        (solved_stub, "not yet"),
        (no_answer, 'the tag "answer"'),
        (open_answer, "not folded"),
        (answer_without_assert, "asserts nothing"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_broken_rule_is_found(plant, found):
    notebook = committed(SOURCES[0])
    plant(notebook)
    assert any(found in problem for problem in notebooks.problems(notebook))


def test_a_changed_cell_is_found():
    kept = committed(SOURCES[0])
    for change in (
        lambda cells: cells[1].update(source="import arcquant_ref"),
        lambda cells: cells[0].update(source="# Another title"),
        lambda cells: cells[0].update(cell_type="raw"),
        lambda cells: cells[-2]["metadata"].update(tags=["answer", "other"]),
        lambda cells: cells.pop(),
        lambda cells: cells.insert(3, cells[2]),
    ):
        changed = copy.deepcopy(kept)
        change(changed["cells"])
        assert notebooks.out_of_step(kept, changed) != []
    assert notebooks.out_of_step(kept, kept) == []


@pytest.mark.parametrize("kind", ["stdout", "image/png", "text/markdown"])
def test_a_changed_output_is_found(kind):
    """A digit of a number, the alt text of a figure, the text below it."""
    kept = committed(SOURCES[0])
    changed = copy.deepcopy(kept)
    cell, output = of_first_cell(kind, changed)
    if kind == "stdout":
        output["text"] = "".join(output["text"]).replace("3.0", "3.5", 1)
    elif kind == "image/png":
        output["metadata"][kind]["alt"] += " And more."
    else:
        output["data"][kind] = "*Another text.*"
    assert len(notebooks.changed_outputs(kept, changed)) == 1
    assert notebooks.changed_outputs(kept, kept) == []
    cell["metadata"]["tags"] = ["varies"]
    assert notebooks.changed_outputs(changed, kept) == []


def executed(seconds, *cells):
    """Code cells, after a run."""
    nbformat, build = optional("nbformat"), notebooks.build()
    written = [nbformat.v4.new_code_cell(cell) for cell in cells]
    return build.execute(nbformat.v4.new_notebook(cells=written), seconds)["cells"]


def test_a_cell_that_raises_or_does_not_end_is_found():
    with pytest.raises(Exception, match="AssertionError"):
        executed(60, "x = 1", "assert x == 2")
    with pytest.raises(TimeoutError):
        executed(5, "while True: pass")


def test_a_fresh_kernel_imports_this_copy_and_a_result_is_an_output():
    _, cell = executed(60, "import arcquant_ref", "arcquant_ref.__file__")
    assert notebooks.printed(cell) == repr(str(ROOT / "arcquant_ref/__init__.py"))


def test_a_built_notebook_holds_nothing_that_chance_decides():
    """Pieces of stdout around a flush are one output; the order with a figure between them stays."""
    flushes = "import sys, time\nfor i in 1, 2:\n    print(i)\n    sys.stdout.flush()\n    time.sleep(0.3)"
    cells = executed(60, flushes, "print(3)\ndisplay(4)\nprint(5)")
    kinds = [[output.output_type for output in cell.outputs] for cell in cells]
    assert kinds == [["stream"], ["stream", "display_data", "stream"]]
    assert cells[0].outputs[0].text == "1\n2\n"
    assert all(cell.metadata == {} for cell in cells)


def test_a_number_without_a_notebook_is_an_error():
    with pytest.raises(SystemExit, match=r"no tutorials/77_\*\.py\. Give two digits"):
        notebooks.build().main(["77"])


def test_show_refuses_axes_that_do_not_say_what_they_measure():
    figure = Figure()
    left, right = figure.subplots(1, 2, sharey=True)
    right.set_title("on the right")
    left.set(xlabel="x", ylabel="y")
    with pytest.raises(ValueError, match=r"axes 1 .* \('on the right'\) have ticks along x but no label"):
        plots.show(figure, "Two empty axes.")
    left.set_ylabel("")
    right.set_xlabel("x")
    with pytest.raises(ValueError, match=r"axes 0 .* along y but no label.* set_ylabel, or hide them with"):
        plots.show(figure, "Two empty axes.")
    with pytest.raises(ValueError, match="alt is empty"):
        plots.show(figure, " ")


def test_show_takes_axes_with_labels_shared_labels_no_ticks_or_switched_off():
    optional("IPython")
    figure = Figure()
    (one, two), (three, four) = figure.subplots(2, 2)
    two.sharey(one)
    one.set(xlabel="x", ylabel="y")
    two.set_xticks([])
    image = three.imshow([[1, 2]])
    three.set(xlabel="k", yticks=[])
    figure.colorbar(image, ax=three, label="value")
    four.set_axis_off()
    plots.show(figure, "Four axes.")
