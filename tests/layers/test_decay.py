"""Frobenius decay, which the benchmark's controls use: its gradients against autograd's."""

import pytest
import torch

from benchmarks.accuracy.methods import OneShot, product_gradients
from hf_cuttlefish import LowRankLinear


@pytest.mark.parametrize(("rows", "columns", "rank"), [(12, 7, 3), (5, 9, 5), (1, 4, 1)])
def test_gradients_of_the_product(rows, columns, rank):
    layer = LowRankLinear(columns, rows, rank).double()
    (layer.up.weight @ layer.down.weight).square().sum().div(2).backward()
    by_up, by_down = product_gradients(layer)
    torch.testing.assert_close(by_up, layer.up.weight.grad)
    torch.testing.assert_close(by_down, layer.down.weight.grad)


def test_the_control_adds_them_to_the_loss_gradients():
    layer = LowRankLinear(6, 8, 2)
    x = torch.randn(5, 6)
    (layer(x).square().mean() + 0.1 / 2 * (layer.up.weight @ layer.down.weight).square().sum()).backward()
    expected = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    layer(x).square().mean().backward()
    control = OneShot(at=0.0, decay=0.1)
    control.switch_step = 0

    class Training:
        step = 1
        model = torch.nn.Sequential(layer)

    control.before_step(Training)
    for p, gradient in zip(layer.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)
