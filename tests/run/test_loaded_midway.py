"""Weights from the other side of the switch, loaded into a run: the optimizer goes along, or it is said."""

import logging

import accelerate
import pytest
import torch
from transformers import TrainerCallback

from hf_cuttlefish import Cuttlefish, follow_checkpoints
from hf_cuttlefish.decide.targets import find_targets
from hf_cuttlefish.layers.low_rank import low_rank_layers
from tiny_trainer import CONFIG, STEPS, SWITCH, Rows, run, tiny_bert

SAID = "weights of another structure were loaded into a model in training"


class Load(TrainerCallback):
    """Keeps the weights of a step from before the switch, and loads them after it; and its own again, if told to."""

    def __init__(self, back):
        self.back, self.old, self.seen = back, {}, []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == SWITCH - 2:
            self.old = copied(model)
        if state.global_step == SWITCH + 2:
            now = copied(model)
            model.load_state_dict(self.old)
            if self.back:
                model.load_state_dict(now)
        if state.global_step >= SWITCH + 2:
            self.seen.append(copied(model))


def copied(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("back", [True, False], ids=["swapped for a while", "rolled back"])
def test_the_optimizer_follows_what_a_callback_loads(tmp_path, caplog, back):
    """It held what was no more in the model, and nothing of it trained from there on."""
    load = Load(back)
    with caplog.at_level(logging.WARNING):
        trainer, callback = run(tmp_path, callbacks=[load], save_strategy="no")
    assert callback.switch_step == SWITCH and len(low_rank_layers(trainer.model)) == (12 if back else 0)
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in trainer.model.parameters()}
    first, *_, last = load.seen
    moved = [name for name in first if not torch.equal(first[name], last[name])]
    assert {name for name in first if ".query." in name and name.endswith("weight")} <= set(moved)
    said = [r.getMessage() for r in caplog.records if SAID in r.getMessage()]
    assert ["are dense now" in text for text in said] == ([True, False] if back else [True])
    assert all("and 11 more" in text and "optimizer state starts anew" in text for text in said)


def test_a_trainer_whose_best_model_is_dense_does_not_train_again(tmp_path):
    """Its optimizer has the rate of the low-rank phase, which the next switch would scale once more."""
    worse = iter(range(100, 0, -1))
    trainer, callback = run(
        tmp_path,
        save_steps=5,
        eval_strategy="steps",
        eval_steps=5,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        callbacks=[Worse(worse)],
    )
    assert callback.switch_step == SWITCH and not low_rank_layers(trainer.model)
    for _ in range(2):  # as by running a cell once more
        with pytest.raises(ValueError, match=r"model is dense again.*make a new Trainer"):
            trainer.train()
        assert not any(layer._forward_hooks for layer in find_targets(trainer.model).values())


class Worse(TrainerCallback):
    """Lets each evaluation look worse than the one before."""

    def __init__(self, falling):
        self.falling = falling

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        metrics["eval_loss"] = 1 / next(self.falling)


def start():
    accelerator = accelerate.Accelerator(cpu=True)
    model = tiny_bert()
    follow_checkpoints(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    cuttlefish = Cuttlefish(model, optimizer, CONFIG, total_steps=STEPS, scheduler=scheduler)
    accelerator.register_for_checkpointing(cuttlefish)
    return accelerator, model, optimizer, scheduler, cuttlefish


def train(parts, first, last):
    accelerator, model, optimizer, scheduler, cuttlefish = parts
    rows = Rows()
    model.train()
    for step in range(first, last):
        items = [rows[(8 * step + i) % len(rows)] for i in range(8)]
        batch = {key: torch.stack([torch.as_tensor(item[key]) for item in items]) for key in items[0]}
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        cuttlefish.step()


@pytest.mark.parametrize("at", [SWITCH, SWITCH + 4])
def test_load_state_of_accelerate_resumes_after_the_switch_bit_for_bit(tmp_path, at):
    """It loads weights, then the state of an optimizer that was made for the dense model."""
    whole = start()
    train(whole, 0, at)
    whole[0].save_state(tmp_path)
    train(whole, at, STEPS)
    again = start()
    again[0].load_state(tmp_path)
    assert again[-1].switch_step == SWITCH and len(low_rank_layers(again[1])) == 12
    train(again, at, STEPS)
    for (name, x), (other, y) in zip(whole[1].state_dict().items(), again[1].state_dict().items(), strict=True):
        assert name == other and torch.equal(x, y), name
    assert whole[3].get_last_lr() == again[3].get_last_lr()
