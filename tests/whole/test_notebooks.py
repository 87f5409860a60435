"""The committed notebooks are whole, and the checker of `make notebooks`, which executes them, sees what is wrong with one."""

import copy
import importlib.util
import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))

spec = importlib.util.spec_from_file_location("check_notebooks", FOLDER / "check.py")
check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_committed_notebook_is_whole(path):
    notebook = check.read(path)
    assert check.problems_of_run(notebook) + check.problems_of_file(path, notebook) == []


def test_there_are_five_notebooks():
    assert [path.stem for path in NOTEBOOKS] == [
        "01_quickstart",
        "02_ranks",
        "03_vit",
        "04_accelerate",
        "05_language_model",
    ]


@pytest.fixture
def notebook():
    return copy.deepcopy(check.read(NOTEBOOKS[0]))


def printing_cell(notebook):
    return next(cell for cell in check.code_cells(notebook) if "stdout" in check.kinds(cell))


def test_an_error_is_seen(notebook):
    error = {"output_type": "error", "ename": "AssertionError", "evalue": "too low", "traceback": []}
    check.code_cells(notebook)[-1]["outputs"] = [error]
    assert any("failed: AssertionError: too low" in found for found in check.problems_of_run(notebook))


def test_a_cell_that_did_not_run_is_seen(notebook):
    check.code_cells(notebook)[2]["execution_count"] = None
    assert any("not executed one after the other" in found for found in check.problems_of_run(notebook))


def test_a_lost_output_is_seen(notebook):
    committed = copy.deepcopy(notebook)
    printing_cell(notebook)["outputs"] = []
    (found,) = check.problems_of_run(notebook, committed)
    assert "gave no stdout, the committed one did" in found


def test_another_source_is_seen(notebook):
    committed = copy.deepcopy(notebook)
    check.code_cells(committed)[0]["source"] = "import this"
    (found,) = check.problems_of_run(notebook, committed)
    assert "not those of the committed notebook" in found


def test_a_notebook_without_an_assertion_is_seen(notebook):
    for cell in check.code_cells(notebook):
        cell["source"] = check.text(cell["source"]).replace("assert ", "check(")
    assert check.problems_of_run(notebook) == ["no cell asserts anything about the outputs"]


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({"output_type": "stream", "name": "stderr", "text": "a warning\n"}, "holds standard error"),
        ({"output_type": "stream", "name": "stdout", "text": "saved to /home/me/model\n"}, "path of this machine"),
        ({"output_type": "stream", "name": "stdout", "text": "." * 400_000}, "draw smaller pictures"),
    ],
)
def test_what_should_not_be_committed_is_seen(output, message, notebook, tmp_path):
    printing_cell(notebook)["outputs"] = [output]
    path = tmp_path / "notebook.ipynb"
    path.write_text(json.dumps(notebook))
    assert any(message in found for found in check.problems_of_file(path, notebook))


def test_cleaning_puts_prints_together_and_drops_noise(notebook):
    def stream(name, text):
        return {"output_type": "stream", "name": name, "text": text}

    printing_cell(notebook)["outputs"] = [
        stream("stdout", "one\n"),
        stream("stderr", "noise"),
        stream("stdout", "two\n"),
    ]
    notebook["metadata"]["widgets"] = {"state": 1}
    clean = check.cleaned(notebook)
    (output,) = printing_cell(clean)["outputs"]
    assert check.text(output["text"]) == "one\ntwo\n"
    assert clean["metadata"]["kernelspec"]["name"] == "python3" and "widgets" not in clean["metadata"]
    assert check.cleaned(clean) == clean
