"""Products of many pairs at once: the numbers and gradients of each pair alone, whatever the shapes, ranks and groups."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from hf_cuttlefish import LowRankLinear
from hf_cuttlefish.layers.multiplied import in_batches
from hf_cuttlefish.layers.products import Layout, Pairs, Products

RANKS = {"even": [4, 4, 4], "by units": [8, 16, 24], "of no common measure": [2, 3, 7]}


def pairs_of(m: int, n: int, ranks: list[int], groups: list[int], bias: bool = True) -> Pairs:
    def made(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    biases = [made(m) for _ in ranks] if bias else []
    return Pairs([made(rank, n) for rank in ranks], [made(m, rank) for rank in ranks], biases, groups)


def apart(kind: Pairs) -> list[torch.Tensor]:
    """What is wanted: weights, then biases."""
    found: list[torch.Tensor] = []
    weights = [up @ down for up, down in zip(kind.ups, kind.downs, strict=True)]
    for stack in [weights, [b[:, None] for b in kind.biases]]:
        begin = 0
        for size in kind.groups if stack else []:
            part = stack[begin : begin + size]
            begin += size
            alone = part[0] if stack is weights else part[0][:, 0]
            found.append(alone if size == 1 else torch.stack([p.mT for p in part]))
    return found


@pytest.mark.parametrize("ranks", RANKS.values(), ids=list(RANKS))
@pytest.mark.parametrize("groups", [[1, 1, 1], [1, 2], [3]])
@pytest.mark.parametrize("bias", [True, False])
def test_two_shapes_are_multiplied_at_once(ranks: list[int], groups: list[int], bias: bool) -> None:
    torch.manual_seed(0)
    kinds = [pairs_of(30, 26, ranks, groups, bias), pairs_of(25, 40, ranks[::-1], groups)]
    parameters = [p for kind in kinds for p in kind.all]
    wanted = [part for kind in kinds for part in apart(kind)]
    found = Products.apply(Layout(kinds), torch.float64, *parameters)
    torch.testing.assert_close(list(found), wanted)
    seeds = [torch.randn_like(part) for part in wanted]
    gradients = torch.autograd.grad(found, parameters, seeds)
    torch.testing.assert_close(list(gradients), list(torch.autograd.grad(wanted, parameters, seeds)))
    assert all(g.is_contiguous() for g in gradients)  # autograd would copy others one by one


def test_those_whose_weights_are_not_used_have_no_gradient() -> None:
    kinds = [pairs_of(6, 5, [2, 3], [1, 1]), pairs_of(5, 6, [2, 3], [2]), pairs_of(7, 7, [2, 2], [1, 1])]
    parameters = [p for kind in kinds for p in kind.all]
    made = Products.apply(Layout(kinds), torch.float64, *parameters)
    (
        made[1].sum() + made[3].sum() + made[-3].sum() + made[-1].sum()
    ).backward()  # the second layer of the first and last kind
    used = [part[1] for kind in (kinds[0], kinds[2]) for part in (kind.downs, kind.ups, kind.biases)]
    assert {id(p) for p in parameters if p.grad is not None} == {id(p) for p in used}
    torch.testing.assert_close(used[-1].grad, torch.ones(7, dtype=torch.float64))


def test_second_derivatives_of_uneven_ranks() -> None:
    torch.manual_seed(0)
    kinds = [pairs_of(3, 4, [1, 2], [2]), pairs_of(2, 3, [1, 1], [1, 1], bias=False)]
    parameters = [p for kind in kinds for p in kind.all]
    layout = Layout(kinds)
    assert torch.autograd.gradgradcheck(lambda *p: Products.apply(layout, torch.float64, *p), parameters)


def test_a_layout_is_of_ranks_and_a_device() -> None:
    kinds = [pairs_of(6, 5, [2, 4], [1, 1])]
    layout = Layout(kinds)
    assert layout.is_of(kinds)
    assert not layout.is_of([pairs_of(6, 5, [2, 2], [1, 1])])


def test_layers_of_several_shapes_run_in_one_batch_and_go_on_in_another_precision() -> None:
    torch.manual_seed(0)
    layers = [LowRankLinear(16, 16, rank) for rank in (3, 5)] + [LowRankLinear(16, 40, rank) for rank in (4, 6)]
    (one,) = in_batches([layers[:2], layers[2:3], layers[3:]])
    x = torch.randn(5, 16)
    twins = copy.deepcopy(layers)
    one.start()
    for dtype in (torch.float32, torch.float64):
        for layer in (*layers, *twins):
            layer.to(dtype)
        one.open()
        torch.testing.assert_close([la(x.to(dtype)) for la in layers], [la(x.to(dtype)) for la in twins])
        one.close()
    one.stop()


def test_changed_and_exchanged_values_are_seen() -> None:
    torch.manual_seed(0)
    kinds = [pairs_of(6, 5, [2, 4], [1, 1])]
    layout = Layout(kinds)

    def check() -> None:
        made = Products.apply(layout, torch.float64, *kinds[0].all)
        torch.testing.assert_close(list(made), apart(kinds[0]))

    check()
    with torch.no_grad():
        kinds[0].ups[1].mul_(2)  # as an optimizer does
    check()
    kinds[0].downs[0].data = torch.randn(2, 5, dtype=torch.float64)  # as loading, and moving to a device
    check()
    kinds[0].ups[0].data = torch.randn(2, 6, dtype=torch.float64).T  # its columns lie one behind the other
    for _ in range(2):
        check()
        kinds[0].ups[0].data.mul_(2)


def test_a_copy_holds_no_parameters_of_the_first() -> None:
    """Else it would read them where its own came to lie at their addresses; and what is pickled would hold all twice."""
    kinds = [pairs_of(60, 50, [20, 20], [1, 1])]
    layout = Layout(kinds)
    Products.apply(layout, torch.float64, *kinds[0].all)
    assert len(pickle.dumps(layout)) < kinds[0].ups[0].nbytes
    twin = copy.deepcopy(layout)
    own = pairs_of(60, 50, [20, 20], [1, 1])
    twin._places = [p.data_ptr() for p in own.all] if twin._places else []
    torch.testing.assert_close(list(Products.apply(twin, torch.float64, *own.all)), apart(own))


def test_a_layout_is_with_or_without_biases() -> None:
    layout = Layout([pairs_of(6, 5, [2, 4], [1, 1])])
    assert not layout.is_of([pairs_of(6, 5, [2, 4], [1, 1], bias=False)])
