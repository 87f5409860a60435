"""Every optimizer of docs/optimizers.md through the switch: carried by numbers, begun anew in proportion, or refused at the start."""

import importlib.util
import logging
import warnings

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from benchmarks import optimizers as listed
from hf_cuttlefish import Cuttlefish, CuttlefishConfig, factorize
from hf_cuttlefish.patch.optimizer import check_can_switch, check_state
from hf_cuttlefish.patch.optimizer_parts import groups_in, is_packed, optimizers_in, states_in

ROWS, COLUMNS = 96, 64
MODULES = {
    "torchao": "torchao",
    "torch-optimi": "optimi",
    "apollo-torch": "apollo_torch",
    "galore-torch": "galore_torch",
}
NEEDS = {"torch-optimizer": ["pytorch_ranger"], "apollo-torch": ["bitsandbytes"], "galore-torch": ["bitsandbytes"]}


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(COLUMNS, ROWS), nn.Linear(ROWS, COLUMNS)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def made(case, model):
    """The optimizer of a case; skips where its package is missing."""
    for name in (MODULES.get(case.package, case.package.replace("-", "_")), *NEEDS.get(case.package, [])):
        if name and importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if case.make is not None:
            return case.make(model)
        low_rank = "galore" in case.name or "apollo" in case.name
        arguments = TrainingArguments(
            "out",
            optim=case.name,
            use_cpu=True,
            report_to=[],
            learning_rate=1e-3,
            optim_target_modules=["first", "second"] if low_rank else None,
            optim_args="rank=8, update_proj_gap=5" if low_rank else None,
        )
        return Trainer(model=model, args=arguments).create_optimizer()


def weights(model):
    return {"first": model.first.weight, "second": model.second.weight}


def train(model, optimizer, steps, closure=False, first=0):
    for step in range(first, first + steps):
        x = torch.randn(32, COLUMNS, generator=torch.Generator().manual_seed(step))

        def loss(x=x):
            optimizer.zero_grad()
            value = (model(x) - x.flip(-1)).square().mean()
            if hasattr(optimizer, "fused_backward"):
                optimizer.fused_backward(value, 1e-3)
            else:
                value.backward()
            return value

        with torch.compiler.set_stance("force_eager"):
            if hasattr(optimizer, "train"):
                optimizer.train()
            if closure:
                optimizer.step(loss)
            else:
                loss()
                if not hasattr(optimizer, "fused_backward"):
                    optimizer.step()


ids = pytest.mark.parametrize("case", listed.CASES, ids=[case.name for case in listed.CASES])


@ids
def test_the_list_says_what_becomes_of_the_state(case):
    model = Small()
    optimizer = made(case, model)
    random = torch.get_rng_state()
    before = [p.detach().clone() for p in model.parameters()]
    if case.expected == "refused":
        with pytest.raises((ValueError, TypeError), match=type(optimizer).__name__):
            check_can_switch(optimizer, weights(model))
        with pytest.raises((ValueError, TypeError), match=type(optimizer).__name__):
            Cuttlefish(
                model, optimizer, CuttlefishConfig(switch_step=2, target_modules=["first", "second"]), total_steps=4
            )
    else:
        found = {verdict.how for verdict in check_can_switch(optimizer, weights(model)).values()}
        assert found == {"unknown" if case.name == "lomo" else case.expected}
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert not any(p.grad is not None for p in model.parameters())


@ids
def test_the_product_moves_on_at_the_dense_rate(case):
    """At full rank, from the same step of the same run: what the pair's step changes of the product, and the dense step of it."""
    if case.expected == "refused":
        pytest.skip("refused")
    steps, moves = 12, {}
    for low_rank in (False, True):
        model = Small()
        optimizer = made(case, model)
        train(model, optimizer, steps, case.closure)
        check_state(optimizer, weights(model))
        if low_rank:
            dense = model.first.weight
            old = [dict(s.get(model.first.weight) or {}) for s in states_in(optimizer)]
            report = factorize(model, {"first": COLUMNS, "second": COLUMNS}, optimizer)
            if any(old):
                carried = 2 if case.expected == "carried" else 0
                assert f"carried for {carried} of 2" in report.optimizer
            held = {id(p) for group in groups_in(optimizer) for p in group["params"]}
            assert held >= {id(model.first.down.weight), id(model.first.up.weight)} and id(dense) not in held
            _check_linear(optimizer, old, model.first)
        now = model.first.weight.detach().clone()
        train(model, optimizer, 1, case.closure, first=steps)
        assert all(torch.isfinite(p).all() for p in model.parameters())
        moves[low_rank] = float((model.first.weight.detach() - now).norm() / now.norm())
        losses = model(torch.ones(1, COLUMNS)).square().mean()
        assert torch.isfinite(losses)
    factor = 8 if case.expected == "carried" else 25
    assert moves[False] / factor < moves[True] < moves[False] * factor, moves


def _check_linear(optimizer, old, layer):
    """First moments by whatever name: m_U = m V^T and m_V = U^T m, to rounding."""
    up, down = layer.up.weight.detach(), layer.down.weight.detach()
    for state, before in zip(states_in(optimizer), old, strict=True):
        for key in ("exp_avg", "momentum_buffer", "m", "grad_avg", "exp_avg_diff"):
            value, new = before.get(key), (state.get(layer.up.weight) or {}).get(key)
            if value is None or new is None or value.shape[-2:] != (ROWS, COLUMNS) or is_packed(value):
                continue
            if type(optimizer).__name__ in ("RMSprop", "ADOPT") and key in ("momentum_buffer", "exp_avg"):
                continue  # averages of normalized gradients
            torch.testing.assert_close(new, value @ down.mT, rtol=1e-4, atol=1e-8)
            torch.testing.assert_close(state[layer.down.weight][key], up.mT @ value, rtol=1e-4, atol=1e-8)


def test_the_list_has_every_name_of_trainer():
    names = {case.name for case in listed.TRAINER} | set(listed.NOT_ON_A_CPU)
    assert {name.value for name in OptimizerNames} <= names


def test_the_page_is_made_from_the_list():
    assert listed.PAGE.read_text(encoding="utf-8") == listed.page(), "run python -m benchmarks.optimizers"


def test_a_step_count_in_the_group_is_seen():
    """Bias correction by a count that has gone on makes a fresh start too large: refused at the start, and "carry" named."""

    class Counting(torch.optim.Optimizer):
        """Adam whose count stands in its group, and whose second moments no projection knows."""

        def __init__(self, params):
            super().__init__(params, {"lr": 1e-3, "k": 0})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                group["k"] += 1
                for p in group["params"]:
                    if p.grad is None:
                        continue
                    state = self.state[p]
                    if not state:
                        state["root"] = torch.zeros_like(p)
                    state["root"].pow_(2).mul_(0.999).addcmul_(p.grad, p.grad, value=0.001).sqrt_()
                    corrected = state["root"] / (1 - 0.999 ** group["k"]) ** 0.5
                    p.addcdiv_(p.grad, corrected + 1e-8, value=-group["lr"])

    model = Small()
    with pytest.raises(
        ValueError, match=r"Counting starts the state .* the first update would be 4\.\d times as large"
    ):
        check_can_switch(Counting(model.parameters()), weights(model))


def test_state_that_a_constructor_makes_starts_so():
    class Sums(torch.optim.Optimizer):
        def __init__(self, params, start=0.5):
            super().__init__(params, {"lr": 1e-2, "start": start})
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p] = {"total": torch.full_like(p, group["start"])}

        @torch.no_grad()
        def step(self, closure=None):
            for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
                self.state[p]["total"] += p.grad.square()
                p.addcdiv_(p.grad, self.state[p]["total"].sqrt(), value=-1e-2)

    model = Small()
    optimizer = Sums(model.parameters())
    train(model, optimizer, 2)
    factorize(model, {"first": 4}, optimizer, optimizer_state="reset")
    for p in (model.first.up.weight, model.first.down.weight):
        assert torch.equal(optimizer.state[p]["total"], torch.full_like(p, 0.5))
    train(model, optimizer, 2, first=2)


def test_schedule_free_like_state_starts_at_the_factor():
    class Averaging(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 1e-2, "k": 0})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                group["k"] += 1
                for p in (p for p in group["params"] if p.grad is not None):
                    z = self.state[p].setdefault("z", p.clone())
                    p.lerp_(z, 1 / group["k"]).sub_(p.grad, alpha=group["lr"] * 0.1)
                    z.sub_(p.grad, alpha=group["lr"])

    model = Small()
    optimizer = Averaging(model.parameters())
    train(model, optimizer, 3)
    factorize(model, {"first": 4}, optimizer)
    for p in (model.first.up.weight, model.first.down.weight):
        assert torch.equal(optimizer.state[p]["z"], p) and optimizer.state[p]["z"].data_ptr() != p.data_ptr()


@pytest.mark.parametrize("where", ["list", "by name", "by id"])
def test_weights_known_by_other_ways_are_refused_by_the_name_of_the_attribute(where):
    class Knows(torch.optim.SGD):
        pass

    model = Small()
    optimizer = Knows(model.parameters(), lr=0.1)
    optimizer.cache = {
        "list": [model.first.weight],
        "by name": {"first.weight": torch.zeros(1)},
        "by id": {id(model.first.weight): torch.zeros(1)},
    }[where]
    with pytest.raises(ValueError, match=r"keeps target weights in Knows\.cache.*exclude these layers"):
        check_can_switch(optimizer, weights(model))
    assert check_can_switch(optimizer, {"second": model.second.weight})  # the other layer is free


def test_what_cannot_be_tried_is_refused_once_its_state_appears():
    class HoldsModel(torch.optim.Optimizer):
        def __init__(self, model):
            super().__init__(model.parameters(), {"lr": 0.1})
            self.model = model

        @torch.no_grad()
        def step(self, closure=None):
            for p in self.model.parameters():
                self.state[p]["shampoo"] = torch.zeros_like(p)

    model = Small()
    optimizer = HoldsModel(model)
    run = Cuttlefish(
        model, optimizer, CuttlefishConfig(switch_step=8, target_modules=["first", "second"]), total_steps=10
    )
    train(model, optimizer, 1)
    with pytest.raises(
        ValueError, match=r"HoldsModel keeps the state shampoo of first\.weight.*holds the model itself.*reset"
    ):
        run.step()


def test_a_chain_changes_all_its_parts_and_goes_back():
    model = Small()
    optimizer = listed.Chain(model)
    train(model, optimizer, 2)
    assert [type(one).__name__ for one in optimizers_in(optimizer)] == ["Chain", "Muon", "AdamW"]
    muon = optimizer.parts[0]
    momentum = muon.state[model.first.weight]["momentum_buffer"].clone()
    factorize(model, {"first": 16}, optimizer)
    up, down = model.first.up.weight, model.first.down.weight
    assert [id(p) for p in muon.param_groups[0]["params"]][:2] == [id(down), id(up)]
    torch.testing.assert_close(muon.state[up]["momentum_buffer"], momentum @ down.mT)
    assert not any(p.shape == (ROWS, COLUMNS) for p in muon.state)
    train(model, optimizer, 2, first=2)


def test_a_gradient_mask_is_named_at_the_start_and_at_the_switch(caplog):
    model = Small()
    model.first.weight.register_hook(lambda gradient: gradient * 0)
    optimizer = torch.optim.AdamW(model.parameters())
    with caplog.at_level(logging.WARNING):
        run = Cuttlefish(
            model,
            optimizer,
            CuttlefishConfig(switch_step=2, target_modules=["first", "second"], rank_multiple=1, target_ratio=0.5),
            total_steps=4,
        )
    assert "the weights of first have gradient hooks" in caplog.text and "second" not in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        for step in range(4):
            train(model, optimizer, 1, first=step)
            run.step()
    assert run.switch_step == 2 and "the gradient hooks on the weights of first are gone" in caplog.text


def test_an_optimizer_in_backward_is_refused():
    model = Small()
    optimizer = torch.optim.AdamW(model.parameters())
    model.first.weight.register_post_accumulate_grad_hook(lambda p: optimizer.step())
    with pytest.raises(ValueError, match=r"first\.weight has a post-accumulate-grad hook \(1 of 2"):
        Cuttlefish(model, optimizer, CuttlefishConfig(target_modules=["first", "second"]), total_steps=10)
