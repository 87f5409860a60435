"""What a step costs the host: an ordinary step nothing, one multiplied out fewer launches than a dense one."""

from __future__ import annotations

import pytest

from benchmarks.steps.host import FORMS, Host, compare, host_table
from benchmarks.steps.operations import Count


def launches(form: str) -> int:
    host = Host(form, blocks=4)
    for _ in range(3):
        host.step()
    with Count() as found:
        host.step()
    return found.count


def test_an_ordinary_step_with_cuttlefish_on_launches_nothing_more() -> None:
    dense = launches("dense")
    assert launches("watched") == dense
    host = Host("watched", blocks=2)
    host.step()
    hooks = [m for m in host.model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooks == [] and not any(p._backward_hooks for p in host.model.parameters())


@pytest.mark.parametrize(("form", "most"), [("multiplied", 0.85), ("gathering", 1.3)])
def test_launches_against_a_dense_step(form: str, most: float) -> None:
    assert launches(form) <= most * launches("dense")


def test_the_benchmark_compares_each_form_with_dense_in_turn() -> None:
    records = compare(["dense", "multiplied", "gathering"], rounds=3, steps=1, blocks=1)
    assert [r["form"] for r in records] == ["dense", "multiplied", "gathering"]
    assert records[0]["quartiles"] == [1.0, 1.0]
    for r in records:
        assert r["all"] >= r["forward"] + r["backward"] - 1e-2 and r["backward"] > 0
    assert records[1]["cuttlefish"] < records[2]["all"]
    text = host_table(records)
    assert all(FORMS[r["form"]] in text for r in records)
