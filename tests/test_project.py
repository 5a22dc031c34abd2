"""The project around the code: lint, types, imports, the two commands, numbers in the documents."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import optional

ROOT = Path(__file__).parent.parent
CORE = (
    "checks",
    "formats",
    "layout",
    "tensor",
    "quantize",
    "select",
    "augment",
    "gemm",
    "bounds",
)  # import order
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("command", ["ruff check .", "ruff format --check .", "mypy"])
def test_lint_and_types(command):
    done = subprocess.run([sys.executable, "-m", *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_import_brings_in_nothing_heavy():
    code = "import sys, arcquant_ref; print(*sys.modules)"
    modules = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split())
    assert "arcquant_ref.bounds" in modules
    assert not modules & {"torch", "numba", "cupy", "matplotlib", "ml_dtypes"}


def test_the_core_imports_numpy_and_safetensors_only_and_leftwards():
    """CORE is in import order."""
    for name in CORE:
        for node in ast.walk(ast.parse((ROOT / f"arcquant_ref/{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                imported = [node.module] if node.module else [alias.name for alias in node.names]
                assert all(CORE.index(other) < CORE.index(name) for other in imported), (name, imported)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
                top = module.split(".")[0]
                assert top in {"numpy", "safetensors"} | sys.stdlib_module_names, (name, top)


def test_the_constants_of_the_formats_are_typed_nowhere():
    """6, 448, 2688 and the E2M1 grid follow from the widths."""
    for name in CORE:
        tree = ast.parse((ROOT / f"arcquant_ref/{name}.py").read_text())
        numbers = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        typed = {n for n in numbers if isinstance(n, (int, float)) and not isinstance(n, bool)}
        assert not typed & {6, 448, 2688, 0.5, 1.5, 3.5, 2.5, 0.25, 0.75, 1.25, 1.75, 464, 127}, name


SHARED = {
    "checks",
    "BLOCK",
    "E2M1",
    "E4M3",
    "E8M0",
    "MX_BLOCK",
    "INT4_GROUP",
    "INT4_MAX",
    "Codes",
    "Float32",
    "Float64",
    "FloatFormat",
    "NVFP4Tensor",
    "Selection",
}
FORMATS = {"E2M1", "E4M3", "E8M0", "fmt"}
WIDTHS = {"exponent_bits", "mantissa_bits", "magnitude_bits", "bits", "bias", "nan_codes"}


def test_the_emulator_shares_types_widths_and_checks_but_no_arithmetic():
    """With the reference; and it types none of the constants that follow from the widths."""
    for path in (ROOT / "emulator").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("arcquant_ref"):
                assert {alias.name for alias in node.names} <= SHARED, (path.name, node.lineno)
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("arcquant_ref") for alias in node.names), path.name
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") in FORMATS:
                assert node.attr in WIDTHS, (path.name, node.lineno)
            if isinstance(node, ast.Constant) and not isinstance(node.value, bool):
                assert node.value not in (6, 448, 2688, 0.5, 1.5, 464), (path.name, node.lineno)
        assert "fastmath=" not in path.read_text()


# With reference and emulator, that is what they are for; what these two need: inputs, a record. And pictures,
# which show the reference's layout and the interpreter's lanes
COMPARES = {"verify.py", "bench.py", "stress.py", "record.py", "plots.py"}


def test_gpu_shares_types_widths_and_checks_but_no_arithmetic():
    """With the reference; of the emulator it uses the interpreter, which runs the same PTX as a GPU."""
    for path in (ROOT / "gpu").glob("*.py"):
        if path.name in COMPARES:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = {alias.name for alias in node.names}
                top = node.module.split(".")[0]
                assert top != "arcquant_ref" or names <= SHARED, (path.name, node.lineno)
                assert top != "emulator" or (node.module, names) == ("emulator", {"ptx"}), path.name
            if isinstance(node, ast.Import):
                tops = {alias.name.split(".")[0] for alias in node.names}
                assert not tops & {"arcquant_ref", "emulator"}, (path.name, node.lineno)
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") in FORMATS:
                assert node.attr in WIDTHS | {"name"}, (path.name, node.lineno)


def test_ci_runs_the_command_of_the_readme():
    commands = re.findall(r"^python3 -m venv .*$", README, re.MULTILINE)
    assert len(commands) == 2
    demo, test = commands
    assert demo.endswith("/arcquant demo")
    assert test.endswith("/pytest")
    assert test in (ROOT / ".ci/run").read_text()


def test_the_readme_shows_what_the_demo_prints():
    from arcquant_ref import demo, sample

    layers = sample.load_sample()
    rows = [demo.run(layer) for layer in layers]
    shown = [demo.table(layer, group) for layer, group in zip(layers, rows)]
    shown.append(demo.summary(row for group in rows for row in group))
    text = README.replace("\n", " ")
    for part in shown:
        assert " ".join(part.split()) in " ".join(text.split())


def test_the_page_of_recipes_is_what_the_code_prints():
    """`python -m emulator.recipes > docs/recipes.md`"""
    from emulator.recipes_page import markdown

    assert (ROOT / "docs/recipes.md").read_text() == markdown()


def test_compare_prints_what_its_page_shows(tmp_path, monkeypatch, capsys):
    import numpy as np
    import stress

    from arcquant_ref.cli import main

    monkeypatch.chdir(tmp_path)
    np.save("x.npy", (stress.inputs()[stress.SAVED].astype(np.uint32) << 16).view(np.float32))
    for name, library in {"q": "compressed-tensors", "other": "ModelOpt"}.items():
        Path(f"{name}.safetensors").write_bytes(stress.checkpoint(library).read_bytes())
    shown = re.findall(r"```\n\$ arcquant (.*)\n([^`]*)```", (ROOT / "docs/compare.md").read_text())
    assert len(shown) == 2
    for (line, output), code in zip(shown, (0, 1)):
        assert main(line.split()) == code
        assert capsys.readouterr().out == output


def test_every_deviation_has_a_test_of_that_name():
    page = (ROOT / "docs/deviations.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", page))
    tests = set(re.findall(r"^def (test_\w+)", (ROOT / "tests/test_deviations.py").read_text(), re.MULTILINE))
    assert named == tests


def test_links_inside_the_documents_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "tutorials/README.md"]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)


def test_anchors_of_links_are_headings():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target, anchor in re.findall(r"\]\(([^)#:]*\.md)?#([^)]+)\)", page.read_text()):
            text = (page.parent / target if target else page).read_text()
            headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in anchors, (page.name, target, anchor)


def test_versions_agree():
    yaml = (ROOT / "CITATION.cff").read_text()
    import arcquant_ref

    assert f"version: {arcquant_ref.__version__}" in yaml
    assert f"## {arcquant_ref.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_citation_file_is_yaml_with_the_sources():
    yaml = optional("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert len(citation["references"]) >= 3


def test_the_rest_of_a_run_is_what_did_not_pass(tmp_path):
    """--rest in tests/conftest.py: skipped and failed tests run again, and those that are new; no others."""
    shutil.copy(ROOT / "tests/conftest.py", tmp_path)
    text = "import os, pytest\ndef test_passes(): pass\ndef test_fails(): assert os.environ['GOOD'] == '1'\n"
    text += "@pytest.mark.skipif(os.environ['GOOD'] != '1', reason='')\ndef test_skipped(): pass\n"
    (tmp_path / "test_some.py").write_text(text)

    def run(good: str, *options: str) -> str:
        command = [sys.executable, "-m", "pytest", "-v", *options]
        env = os.environ | {"GOOD": good}
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True).stdout

    assert "1 failed, 1 passed, 1 skipped" in run("0")
    again = run("1", "--rest")
    assert "2 passed, 1 deselected" in again
    assert "test_passes" not in again
    (tmp_path / "test_new.py").write_text("def test_new(): pass\n")
    assert "1 passed, 3 deselected" in run("1", "--rest")
    assert "4 passed" in run("1")
