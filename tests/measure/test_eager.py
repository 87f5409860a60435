"""What is known of compiled code: that there is some, and that there are many shapes."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from hf_cuttlefish.engines.around import forget_compiled
from hf_cuttlefish.measure.eager import MANY_GRAPHS, has_compiled, said_of_shapes

pytestmark = pytest.mark.usefixtures("nothing_compiled")


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
