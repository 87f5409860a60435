"""A tiny BERT in a real Trainer, and whether two runs have ended on the same bits."""

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from hf_cuttlefish import CuttlefishCallback, CuttlefishConfig

STEPS, SWITCH = 20, 8
CONFIG = CuttlefishConfig(switch_step=SWITCH, rank_multiple=4, target_ratio=0.4)


def tiny_bert(seed: int = 0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    model = BertForSequenceClassification(
        BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                   max_position_embeddings=16, num_labels=3, hidden_dropout_prob=0.1)
    )  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


class Rows(torch.utils.data.Dataset):
    """Sentences whose label is their first token modulo 3, padded to different lengths."""

    def __init__(self, count: int = 80):
        g = torch.Generator().manual_seed(1)
        self.ids = torch.randint(3, 50, (count, 10), generator=g)
        self.lengths = torch.randint(4, 11, (count,), generator=g)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        mask = (torch.arange(10) < self.lengths[i]).long()
        return {"input_ids": self.ids[i] * mask, "attention_mask": mask, "labels": int(self.ids[i, 0]) % 3}


def run(folder, config=None, model=None, resume=None, callbacks=(), rows=None, **arguments):
    options = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "seed": 3,
        "logging_steps": 2, "save_strategy": "steps", "save_steps": 1, "report_to": [], "disable_tqdm": True, "use_cpu": True,
        **arguments,
    }  # fmt: skip
    callback = CuttlefishCallback(config if config is not None else CONFIG)
    trainer = Trainer(
        model=tiny_bert() if model is None else model,
        args=TrainingArguments(**options),
        train_dataset=rows or Rows(),
        eval_dataset=Rows(16) if rows is None else rows,
        callbacks=[callback, *callbacks],
    )
    trainer.train(resume_from_checkpoint=resume)
    # With restore_callback_states_from_checkpoint the Trainer makes a new callback object.
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, CuttlefishCallback))
    return trainer, callback


def assert_same_run(a: Trainer, b: Trainer) -> None:
    for (name, x), (other, y) in zip(a.model.state_dict().items(), b.model.state_dict().items(), strict=True):
        assert name == other and torch.equal(x, y), name
    left, right = a.optimizer.state_dict(), b.optimizer.state_dict()
    assert left["param_groups"] == right["param_groups"]
    for key, state in left["state"].items():
        for part, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(right["state"][key][part])), (key, part)
    assert a.lr_scheduler.state_dict() == b.lr_scheduler.state_dict()
