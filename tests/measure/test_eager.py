"""Compiled code runs uncompiled while somebody asks for it: for several runs at once, and what a user has set comes back."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hf_cuttlefish import Cuttlefish, CuttlefishConfig
from hf_cuttlefish.engines.around import forget_compiled
from hf_cuttlefish.measure.eager import MANY_GRAPHS, eagerly, has_compiled, run_eagerly, said_of_shapes
from tiny_trainer import CONFIG, SWITCH, tiny_bert

pytestmark = pytest.mark.usefixtures("nothing_compiled")


def stance() -> str:
    return torch._dynamo.eval_frame._stance.stance


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    yield
    assert stance() == "default"
    torch.compiler.set_stance("default")


class Asking:
    """Somebody."""


def test_it_lasts_until_nobody_asks_any_more() -> None:
    first, second = Asking(), Asking()
    run_eagerly(first, True)
    run_eagerly(second, True)
    run_eagerly(first, True)
    with eagerly():
        run_eagerly(first, False)
    assert stance() == "force_eager"
    run_eagerly(first, False)
    assert stance() == "force_eager"
    run_eagerly(second, False)
    assert stance() == "default"


def test_who_is_gone_asks_no_more() -> None:
    """A run that an exception has ended stops nothing."""
    somebody = Asking()
    run_eagerly(somebody, True)
    del somebody
    gc.collect()
    assert stance() == "default"


def test_who_is_freed_while_another_begins_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Making the reference may free the last who asked; then the other one was entered without a stance to give back."""
    gone, asking = Asking(), Asking()
    run_eagerly(gone, True)
    held = [gone]
    del gone
    finalize = weakref.finalize

    def freeing(*given: Any) -> Any:
        made = finalize(*given)
        held.clear()
        return made

    monkeypatch.setattr(weakref, "finalize", freeing)
    run_eagerly(asking, True)
    assert stance() == "force_eager"
    run_eagerly(asking, False)
    assert stance() == "default"


def test_blocks_in_two_threads_that_end_in_the_order_they_began() -> None:
    began, entered, ended = threading.Event(), threading.Event(), threading.Event()

    def other() -> None:
        began.wait(10)
        with eagerly():
            entered.set()
            ended.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    with eagerly():
        began.set()
        assert entered.wait(10)
    assert stance() == "force_eager"
    ended.set()
    thread.join()
    assert stance() == "default"


def test_a_run_gives_back_the_stance_that_its_user_has_set() -> None:
    with torch.compiler.set_stance("eager_on_recompile"):
        model = tiny_bert().train()
        compiled = torch.compile(model, backend="eager")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        cuttlefish = Cuttlefish(model, optimizer, CONFIG, total_steps=20)
        for _ in range(SWITCH + 1):
            ids = torch.randint(3, 50, (8, 10))
            compiled(input_ids=ids, labels=ids[:, 0] % 3).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            cuttlefish.step()
        assert cuttlefish.switch_step == SWITCH and stance() == "eager_on_recompile"


def test_two_runs_of_one_process_gather_each_for_itself(caplog: pytest.LogCaptureFixture) -> None:
    """The one that switches first must not let the other's model run compiled, where its hooks see nothing."""
    caplog.set_level(logging.WARNING)
    runs = []
    for seed, switch, steps in ((0, 4, 2), (1, 6, 4)):
        model = tiny_bert(seed).train()
        config = CuttlefishConfig(switch_step=switch, statistics_steps=steps, rank_multiple=4, target_ratio=0.4)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        cuttlefish = Cuttlefish(model, optimizer, config, total_steps=20)
        runs.append((torch.compile(model, backend="eager"), optimizer, cuttlefish))
    gathering = []
    for _ in range(6):
        for compiled, optimizer, cuttlefish in runs:
            ids = torch.randint(3, 50, (8, 10))
            compiled(input_ids=ids, labels=ids[:, 0] % 3).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            cuttlefish.step()
        gathering.append((runs[1][2].watch.is_gathering, stance()))
    assert [run[2].switch_step for run in runs] == [4, 6]
    assert gathering[2:] == [(True, "force_eager")] * 3 + [(False, "default")]


def test_code_in_one_graph_is_known_to_be_compiled_and_goes_at_the_switch() -> None:
    """With fullgraph=True torch counts no frames."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    kept = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        kept.append(weakref.ref(graph))
        return graph.forward

    assert not has_compiled()
    torch.compile(model, backend=backend, fullgraph=True)(torch.ones(1, 2))
    gc.collect()
    assert has_compiled() and kept[0]() is not None
    forget_compiled(model)
    gc.collect()
    assert kept[0]() is None


def test_shapes_for_which_torch_has_no_more_room_are_said() -> None:
    """It compiles 8 versions of a code, and runs all further ones uncompiled: there are never more than 8 graphs then."""
    compiled = torch.compile(torch.nn.Linear(2, 2), backend="eager", dynamic=False)
    for rows in range(2, 14):
        compiled(torch.ones(rows, 2))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == MANY_GRAPHS
    told = said_of_shapes()
    assert told is not None and "8 graphs so far, and runs" in told and "pad_to_multiple_of" in told
