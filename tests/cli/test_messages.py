"""What a mistake is answered with: the field, the value, and what was probably meant."""

import json

import pytest
import torch

from hf_cuttlefish import Cuttlefish, CuttlefishConfig, factorize
from hf_cuttlefish.cli.main import main
from hf_cuttlefish.cli.texts import read_texts
from hf_cuttlefish.decide.targets import find_targets
from tiny_models import BY_NAME


@pytest.fixture
def model():
    return BY_NAME["bert"].build()


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
@pytest.mark.parametrize(
    ("text", "meant"),
    [("query", ["query"]), ("query, value", ["query", "value"]), ("self.query|self.key", ["self.query", "self.key"])],
)
def test_a_str_of_endings_is_told_from_a_regular_expression(model, field, text, meant):
    with pytest.raises(ValueError) as caught:
        find_targets(model, CuttlefishConfig(**{field: text}))
    assert f"did you mean {field}={meant!r}?" in str(caught.value) and "regular expression" in str(caught.value)
    assert "close names" not in str(caught.value)
    found = find_targets(model, CuttlefishConfig(target_modules=meant))
    assert len(found) == 2 * len(meant)


def test_a_mistyped_name_still_gets_close_names(model):
    with pytest.raises(ValueError, match="'querry' matches no module; close names: query"):
        find_targets(model, CuttlefishConfig(target_modules="querry"))


def test_a_mistyped_keyword(model):
    with pytest.raises(TypeError, match="CuttlefishConfig has no field 'rank_rull'; did you mean rank_rule"):
        CuttlefishConfig(rank_rull="loss")
    with pytest.raises(TypeError, match="no field 'qqq'; known: target_modules, "):
        CuttlefishConfig(qqq=1)
    assert CuttlefishConfig(["query"], rank_rule="energy").target_modules == ["query"]


def test_no_optimizer(model):
    with pytest.raises(TypeError, match=r"optimizer is None: give the torch optimizer .*AdamW\(model.parameters\(\)\)"):
        Cuttlefish(model, None, total_steps=10)


def test_an_empty_list_of_close_names_is_never_printed(model):
    with pytest.raises(ValueError) as caught:
        factorize(model, {"zzzzzz": 3})
    assert "'zzzzzz', which is no module" in str(caught.value) and "[]" not in str(caught.value)
    with pytest.raises(ValueError) as caught:
        find_targets(torch.nn.Sequential(torch.nn.ReLU()), CuttlefishConfig(target_modules=["x"]))
    assert "close names" not in str(caught.value)


@pytest.mark.parametrize("name", ["texts.csv", "texts.txt", "texts.jsonl"])
def test_a_file_that_is_not_utf8_is_named(tmp_path, name):
    (tmp_path / name).write_bytes("text,label\ncafé,1\n".encode("latin-1"))
    with pytest.raises(ValueError, match=rf"{name} is not UTF-8 \(byte 0xe9 at 14\).*iconv -f latin1"):
        read_texts(tmp_path / name)


@pytest.mark.parametrize("parted", [",", ";", "\t"])
def test_a_table_as_spreadsheets_write_it(tmp_path, parted):
    """With a byte order mark, and parted by semicolons where the comma is for fractions."""
    table = tmp_path / "texts.csv"
    table.write_text(f'\ufefftext{parted}label\r\n"a;\tb, c"{parted}x\r\nd{parted}y\r\n', encoding="utf-8")
    assert [(row.text, row.label) for row in read_texts(table)] == [("a;\tb, c", "x"), ("d", "y")]
    table.write_text(f"text{parted}label\na{parted}b{parted}x\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"entry 1 has more cells than the 2 columns .* stands in double quotes"):
        read_texts(table)


def test_a_plan_that_is_not_utf8_is_named(tmp_path, capsys):
    (tmp_path / "plan.json").write_bytes('{"é": 3}'.encode("latin-1"))
    code = main(["factorize", str(tmp_path), str(tmp_path / "out"), "--plan", str(tmp_path / "plan.json")])
    assert code == 1 and "plan.json is no JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "written"), [("picture", "picture.png"), ("a.b.", "a.b..png"), ("picture.svg", "picture.svg")]
)
def test_plot_names_the_file_that_it_writes(tmp_path, capsys, asked, written):
    pytest.importorskip("matplotlib")
    state = {"global_step": 2, "log_history": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    assert main(["plot", str(tmp_path / "trainer_state.json"), str(tmp_path / asked), "--what", "loss"]) == 0
    name = written.replace("..", ".")
    assert capsys.readouterr().out.startswith(f"{tmp_path / name}: from") and (tmp_path / name).stat().st_size > 1000
