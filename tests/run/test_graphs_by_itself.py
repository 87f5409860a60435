"""Low-rank steps are recorded unasked only where nothing but known code runs in them. A stand-in records (`replayed`)."""

from __future__ import annotations

import copy
import functools
import logging
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, BertForSequenceClassification, Trainer, TrainerCallback
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.bert.modeling_bert import BertLayer

import replayed
from hf_cuttlefish import CuttlefishCallback, CuttlefishConfig
from hf_cuttlefish.patch import low_rank_phase
from hf_cuttlefish.patch.graphed_step import is_graphed
from hf_cuttlefish.trainer import by_itself
from hf_cuttlefish.trainer.by_itself import OF_ACCELERATOR, OWN

recording = replayed.recording
on_gpu = replayed.on_gpu
SAID = "low-rank steps run as CUDA graphs"


@pytest.mark.parametrize(
    "settings",
    [{}, {"bf16": True}, {"gradient_accumulation_steps": 2, "max_steps": 16}],
    ids=["plain", "bf16", "accumulating"],
)
def test_the_low_rank_steps_are_recorded_and_no_dense_ones(
    tmp_path: Path, on_gpu: None, settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    expected = replayed.logged(replayed.trainer_of(tmp_path, graphed=False, **settings))
    trainer = replayed.trainer_of(tmp_path, graphed=None, **settings)
    with caplog.at_level(logging.INFO):
        assert replayed.logged(trainer) == [
            pytest.approx(row, rel=1e-3 if trainer.args.bf16 is False else 0.05) for row in expected
        ]
    steps = (trainer.args.max_steps - 10) * trainer.args.gradient_accumulation_steps
    assert replayed.Replayed.count == steps - 2
    assert SAID in caplog.text and not {"training_step", "floating_point_ops"} & set(vars(trainer))


class OwnLoss(Trainer):
    def compute_loss(self, model: Any, inputs: Any, **more: Any) -> Any:
        return super().compute_loss(model, inputs, **more)


class OwnHead(nn.Linear):
    """Of a user."""


def own_head(trainer: Trainer) -> None:
    trainer.model.classifier = OwnHead(16, 2)


def hook(trainer: Trainer) -> None:
    trainer.model.bert.encoder.layer[0].register_forward_hook(lambda module, given, output: None)


def hook_of_a_tensor(trainer: Trainer) -> None:
    trainer.model.classifier.weight.register_hook(lambda gradient: None)


def own_forward(trainer: Trainer) -> None:
    layer = trainer.model.classifier
    plain = layer.forward
    layer.forward = lambda x: plain(x)


def own_forward_of_all(trainer: Trainer) -> None:
    plain = trainer.model.forward
    trainer.model.forward = functools.wraps(plain)(lambda **batch: plain(**batch))


def own_loss_function(trainer: Trainer) -> None:
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: F.cross_entropy(outputs.logits, labels)


def own_loss_of_the_model(trainer: Trainer) -> None:
    trainer.model._loss_function = lambda *args, **kwargs: None


def own_label_smoother(trainer: Trainer) -> None:
    class Smoother:
        epsilon = 0.1

        def __call__(self, outputs: Any, labels: Any, **more: Any) -> Any:
            return F.cross_entropy(outputs.logits, labels)

    trainer.label_smoother = Smoother()


def own_loss_object_of_the_model(trainer: Trainer) -> None:
    class Loss:
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError("BERT asks for none")

    trainer.model._loss_function = Loss()


def own_attention(trainer: Trainer) -> None:
    def attend(*args: Any, **kwargs: Any) -> Any:
        return sdpa_attention_forward(*args, **kwargs)

    AttentionInterface.register("of_a_test", attend)
    trainer.model.set_attn_implementation("of_a_test")


def own_clipping(trainer: Trainer) -> None:
    plain = trainer.accelerator.clip_grad_norm_
    trainer.accelerator.clip_grad_norm_ = lambda *args, **kwargs: plain(*args, **kwargs)


def own_random_numbers(trainer: Trainer) -> None:
    trainer.model.generator = torch.Generator()


def own_step(trainer: Trainer) -> None:
    plain = trainer.training_step
    trainer.training_step = lambda *args, **kwargs: plain(*args, **kwargs)


def checkpointed(trainer: Trainer) -> None:
    trainer.model.gradient_checkpointing_enable()


@pytest.mark.parametrize(
    "change",
    [
        own_head,
        hook,
        hook_of_a_tensor,
        own_forward,
        own_forward_of_all,
        own_loss_function,
        own_loss_of_the_model,
        own_loss_object_of_the_model,
        own_attention,
        own_clipping,
        own_random_numbers,
        own_label_smoother,
        own_step,
        checkpointed,
    ],
)
def test_what_may_do_something_beside_runs_as_it_is(
    tmp_path: Path, on_gpu: None, change: Any, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = replayed.trainer_of(tmp_path, graphed=None)
    change(trainer)
    with caplog.at_level(logging.INFO):
        trainer.train()
    assert trainer.state.global_step == 24 and "factorized" in caplog.text
    assert SAID not in caplog.text and not replayed.Replayed.count


@pytest.mark.parametrize("how", ["a class of its own", "told not to", "a CPU", "something compiled"])
def test_other_trainers_run_as_they_are(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how != "a CPU":
        monkeypatch.setattr("hf_cuttlefish.trainer.graphs.check", lambda trainer: None)
    monkeypatch.setattr("hf_cuttlefish.trainer.by_itself.has_compiled", lambda: how == "something compiled")
    kind = OwnLoss if how == "a class of its own" else Trainer
    trainer = replayed.trainer_of(tmp_path, kind, graphed=False if how == "told not to" else None)
    with caplog.at_level(logging.INFO):
        trainer.train()
    assert SAID not in caplog.text and not replayed.Replayed.count


def test_a_class_that_somebody_has_patched_runs_as_it_is(
    tmp_path: Path, on_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As libraries of kernels do it: the class stays transformers', its forward is another's."""
    plain = BertLayer.forward
    monkeypatch.setattr(BertLayer, "forward", lambda self, *args, **kwargs: plain(self, *args, **kwargs))
    replayed.trainer_of(tmp_path, graphed=None).train()
    assert not replayed.Replayed.count


def passing_on(plain: Any) -> Any:
    """A function of a user that looks like another one."""

    @functools.wraps(plain)
    def passes_on(*args: Any, **kwargs: Any) -> Any:
        return plain(*args, **kwargs)

    return passes_on


MASKS = "transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping"
PATCHED: dict[str, tuple[str, Any]] = {
    "a forward": ("transformers.models.bert.modeling_bert.BertLayer.forward", None),
    "a forward, decorated": ("transformers.models.bert.modeling_bert.BertLayer.forward", torch.enable_grad()),
    "a method": ("transformers.models.bert.modeling_bert.BertLayer.feed_forward_chunk", None),
    "a function in its file": ("transformers.models.bert.modeling_bert.eager_attention_forward", None),
    "a method of the base class": ("transformers.modeling_utils.PreTrainedModel.get_input_embeddings", None),
    "the Trainer's loss": ("transformers.Trainer.compute_loss", None),
    "the accelerator's clipping": ("accelerate.Accelerator.clip_grad_norm_", None),
    "the accelerator's backward": ("accelerate.Accelerator.backward", None),
    "a loss in the table": ("transformers.loss.loss_utils.LOSS_MAPPING[ForCausalLM]", None),
    "a mask in the table": (f"{MASKS}[sdpa]", None),
}


@pytest.mark.parametrize("what", PATCHED)
def test_what_only_looks_known_runs_as_it_is(
    tmp_path: Path, on_gpu: None, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """`functools.wraps` copies the module's name too."""
    path, decorate = PATCHED[what]
    place, _, key = path.rstrip("]").partition("[")
    if key:
        table = resolve_name(place)
        monkeypatch.setitem(table, key, passing_on(table[key]))
    else:
        mine = passing_on(resolve_name(place))
        monkeypatch.setattr(place, mine if decorate is None else decorate(mine))
    trainer = replayed.trainer_of(tmp_path, graphed=None)
    trainer.train()
    assert trainer.state.global_step == 24 and not replayed.Replayed.count


def test_a_property_that_somebody_has_put_on_the_class_runs_as_it_is(
    tmp_path: Path, on_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = BertForSequenceClassification.loss_function
    monkeypatch.setattr(BertForSequenceClassification, "loss_function", property(lambda self: plain.fget(self)))
    replayed.trainer_of(tmp_path, graphed=None).train()
    assert not replayed.Replayed.count


def test_what_looks_at_each_operation_runs_as_it_is(tmp_path: Path, on_gpu: None) -> None:
    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    trainer = replayed.trainer_of(tmp_path, graphed=None)
    with Count():
        trainer.train()
    assert not replayed.Replayed.count


def test_a_forward_that_is_replaced_in_mixed_precision_runs_as_it_is(tmp_path: Path, on_gpu: None) -> None:
    """Accelerate has replaced it too, and what it leaves beside it stays there."""

    class Replace(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            model = kwargs["model"]
            assert "_original_forward" in vars(model)
            model.forward = passing_on(model.forward)

    replayed.trainer_of(tmp_path, graphed=None, also=[Replace()], bf16=True).train()
    assert not replayed.Replayed.count


@pytest.mark.parametrize("of", ["the Trainer", "the accelerator"])
def test_a_method_that_comes_after_the_switch_ends_the_graphs(tmp_path: Path, on_gpu: None, of: str) -> None:
    called: list[int] = []
    trainer = replayed.trainer_of(tmp_path, graphed=None)

    class Replace(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step != 14:
                return
            owner, name = (trainer, "compute_loss") if of == "the Trainer" else (trainer.accelerator, "backward")
            plain = getattr(owner, name)

            def mine(*args: Any, **kwargs: Any) -> Any:
                called.append(trainer.state.global_step)
                return plain(*args, **kwargs)

            setattr(owner, name, mine)

    trainer.add_callback(Replace())
    trainer.train()
    assert called == [*range(14, 24)] and replayed.Replayed.count == 14 - 10 - 2


def test_a_run_that_broke_off_leaves_nothing_to_the_next(tmp_path: Path, on_gpu: None) -> None:
    class Break(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 18:
                raise KeyboardInterrupt

    trainer = replayed.trainer_of(tmp_path, graphed=None, also=[Break()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert is_graphed(trainer.model) and "training_step" in vars(trainer)
    replayed.Replayed.count = 0
    config = CuttlefishConfig(switch_step=10, statistics_steps=3)
    again = Trainer(
        trainer.model,
        trainer.args,
        train_dataset=replayed.Rows(),
        callbacks=[CuttlefishCallback(config, cuda_graphs=False)],
    )
    again.train()
    assert not is_graphed(trainer.model) and "training_step" not in vars(trainer) and not replayed.Replayed.count


def test_another_generator_of_numpy_ends_no_run(tmp_path: Path, on_gpu: None) -> None:
    numpy = pytest.importorskip("numpy")
    before = numpy.random.get_bit_generator()
    numpy.random.set_bit_generator(numpy.random.PCG64(0))
    try:
        replayed.trainer_of(tmp_path, graphed=None).train()
    finally:
        numpy.random.set_bit_generator(before)
    assert replayed.Replayed.count


def test_scripted_modules_are_not_known() -> None:
    assert by_itself._is_unknown(torch.jit.script(nn.Linear(2, 2)), False)
    assert not by_itself._is_unknown(nn.Linear(2, 2), False)


class Later(TrainerCallback):
    """Something that comes after the switch, when steps are recorded already."""

    def __init__(self, change: Any) -> None:
        self.change = change

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 14:
            self.change(SimpleNamespace(model=kwargs["model"]))


@pytest.mark.parametrize("change", [hook, hook_of_a_tensor, own_forward, own_loss_of_the_model])
def test_what_comes_after_the_switch_ends_the_graphs(
    tmp_path: Path, on_gpu: None, change: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        replayed.trainer_of(tmp_path, graphed=None, also=[Later(change)]).train()
    assert replayed.Replayed.count == 14 - 10 - 2
    assert "what runs in a step is not known any more" in caplog.text


def test_a_copy_of_the_callback_leaves_the_graphs(tmp_path: Path, on_gpu: None) -> None:
    trainer = replayed.trainer_of(tmp_path, graphed=None)
    copies: list[Any] = []

    class Copy(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 20:
                ours = next(c for c in trainer.callback_handler.callbacks if isinstance(c, CuttlefishCallback))
                assert ours._graphs is not None
                copies.append(copy.copy(ours))

    trainer.add_callback(Copy())
    trainer.train()
    assert copies[0]._graphs is None and copies[0].switch_step == 10


def test_a_question_that_fails_ends_no_run(
    tmp_path: Path, on_gpu: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*args: Any) -> bool:
        raise AttributeError("another version")

    monkeypatch.setattr(by_itself, "suits", fails)
    trainer = replayed.trainer_of(tmp_path, graphed=None)
    with caplog.at_level(logging.INFO):
        trainer.train()
    assert trainer.state.global_step == 24 and "asking whether they may failed: another version" in caplog.text


def test_a_run_that_goes_on_after_the_switch_records_too(
    tmp_path: Path, on_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it tries forms of running, whose hooks would be in the way."""
    monkeypatch.setattr(low_rank_phase, "can_try", lambda engine: True)
    monkeypatch.setattr(low_rank_phase, "LEAST", 1)
    settings = {"max_steps": 24, "save_strategy": "steps", "save_steps": 16, "save_only_model": False}
    replayed.trainer_of(tmp_path, graphed=None, **settings).train()
    replayed.Replayed.count = 0
    again = replayed.trainer_of(tmp_path, graphed=None, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-16"))
    # One step to see that the model is low rank, and two that warm up.
    assert replayed.Replayed.count == 8 - 1 - 2


def test_all_methods_that_make_up_a_step_are_the_trainers() -> None:
    """One that is renamed would be asked for in vain."""
    missing = {name for name in OWN if not hasattr(Trainer, name)}
    assert missing <= {"autocast_smart_context_manager", "_clip_grad_norm", "_prepare_context_parallel_inputs"}
    assert all(hasattr(Accelerator, name) for name in OF_ACCELERATOR)
