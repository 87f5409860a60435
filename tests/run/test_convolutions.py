"""Networks of convolutions through the functional API, the loop and the Trainer; plain modules and transformers' own."""

import copy

import pytest
import torch
import transformers as hf
from torch import nn
from torch.utils.data import Dataset

from benchmarks.convolutions.networks import Classifier, resnet18, vgg
from hf_cuttlefish import (
    Cuttlefish,
    CuttlefishCallback,
    CuttlefishConfig,
    estimate_ranks,
    factorize,
    follow_checkpoints,
    merge,
)
from hf_cuttlefish.decide.plan import RankPlan
from hf_cuttlefish.decide.targets import find_targets
from hf_cuttlefish.layers.convolution import LowRankConv2d
from hf_cuttlefish.layers.low_rank import low_rank_layers
from hf_cuttlefish.measure.shapes import FlowRecorder
from hf_cuttlefish.measure.timing import rank_prices, time_group
from hf_cuttlefish.report.inspection import inspect_model

STEPS = 10


class Images(Dataset):
    """Sixteen noisy images of two classes, told apart by their brightness."""

    def __len__(self):
        return 16

    def __getitem__(self, i):
        image = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(i)) + (i % 2)
        return {"pixel_values": image, "labels": i % 2}


def made(net=resnet18, width=8):
    torch.manual_seed(0)
    return Classifier(net(1, 10, width))


def batch(size=8):
    rows = [Images()[i] for i in range(size)]
    return {
        "pixel_values": torch.stack([r["pixel_values"] for r in rows]),
        "labels": torch.tensor([r["labels"] for r in rows]),
    }


@pytest.mark.parametrize(("net", "convolutions"), [(resnet18, 19), (vgg, 6)])
def test_all_but_the_first_and_the_last_layer_are_targets(net, convolutions):
    targets = find_targets(made(net))
    assert len(targets) == convolutions and {type(m) for m in targets.values()} == {nn.Conv2d}


@pytest.mark.parametrize("net", [resnet18, vgg])
def test_the_functional_api_and_both_structures_load(net):
    model = made(net)
    dense = copy.deepcopy(model.state_dict())
    plan = estimate_ranks(model, CuttlefishConfig(rank_rule="ratio", rank_multiple=1, exclude_modules=r".*\.3"))
    assert RankPlan.from_json(plan.to_json()) == plan
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(**batch())["loss"].backward()
    optimizer.step()
    report = factorize(model, plan, optimizer)
    assert report.parameters_after == sum(p.numel() for p in model.parameters()) < report.parameters_before
    model(**batch())["loss"].backward()
    optimizer.step()
    low = copy.deepcopy(model.state_dict())
    other = made(net)
    follow_checkpoints(other)
    other.load_state_dict(low)
    assert torch.equal(other.eval()(**batch())["logits"], model.eval()(**batch())["logits"])
    logits = model(**batch())["logits"]
    merge(model)
    assert not low_rank_layers(model) and torch.allclose(model(**batch())["logits"], logits, atol=1e-5)
    other.load_state_dict(dense)
    assert not low_rank_layers(other)


def test_a_plain_module_trains_under_the_callback_and_resumes(tmp_path):
    def trainer(model):
        arguments = hf.TrainingArguments(
            tmp_path, max_steps=STEPS, per_device_train_batch_size=8, save_steps=6, report_to=[], optim="sgd", use_cpu=True,
            learning_rate=0.05, save_strategy="steps", disable_tqdm=True,
        )  # fmt: skip
        callback = CuttlefishCallback(
            CuttlefishConfig(switch_step=5, statistics_steps=3, target_ratio=0.3, rank_multiple=1)
        )
        return hf.Trainer(model, arguments, train_dataset=Images(), callbacks=[callback])

    first = trainer(made())
    first.train()
    pairs = low_rank_layers(first.model)
    assert pairs and all(type(m) is LowRankConv2d for m in pairs.values())
    again = trainer(made())
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    mine, theirs = first.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(mine[k], theirs[k]) for k in mine) and list(mine) == list(theirs)


def test_depthwise_convolutions_stay_dense_and_the_plan_says_why():
    torch.manual_seed(0)
    model = hf.MobileNetV1ForImageClassification(
        hf.MobileNetV1Config(depth_multiplier=0.25, num_labels=4, classifier_dropout_prob=0.0)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    run = Cuttlefish(model, optimizer, CuttlefishConfig(switch_step=2, statistics_steps=1), total_steps=4)
    for _ in range(3):
        images = torch.randn(4, 3, 32, 32)
        model(pixel_values=images, labels=torch.randint(0, 4, (4,))).loss.backward()
        optimizer.step()
        run.step()
    run.end()
    assert run.switch_step == 2 and any("depthwise" in note for note in run.plan.notes)
    assert all(m.groups == 1 for m in low_rank_layers(model).values())


def test_convolutions_are_timed_at_their_maps():
    model = made()
    layers = find_targets(model)
    flow = FlowRecorder(model, layers)
    flow.start()
    model(**batch())["loss"].backward()
    flow.step()
    groups = {g.layers[0]: g for g in flow.groups()}
    assert set(groups) == set(layers)
    group = groups["net.4.0.conv1"]
    assert group.input_shape == (8, 8, 8, 8) and group.in_features == 72 and group.outs == ((16, False),)
    for rank in (None, 4):
        assert time_group(group, (rank,)).device_ms > 0
    assert min(rank_prices([group], {"net.4.0.conv1": 88}).values()) > 0
    factorize(model, {"net.4.0.conv1": 4})
    merge(model, where="slower", example_inputs={"pixel_values": batch()["pixel_values"]})


def test_the_papers_recipe_leaves_what_is_not_faster(caplog):
    model = made(width=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    config = CuttlefishConfig.paper_cnn()
    assert (config.rank_rule, config.objective, config.min_speedup) == ("scaled_stable_rank", "speed", 1.5)
    config = CuttlefishConfig.paper_cnn(
        rank_rule="ratio", rank_multiple=1
    )  # random weights are of full scaled stable rank
    run = Cuttlefish(model, optimizer, config, total_steps=12)
    for _ in range(12):
        optimizer.zero_grad()
        model(**batch())["loss"].backward()
        optimizer.step()
        run.step()
    run.end()
    rows = [record.message for record in caplog.records if "-> 16, 512 tokens) at rank" in record.message]
    assert rows and "1 x 0.conv1 (72" in rows[0].replace("4.0.conv1", "0.conv1")


def test_an_inspection_shows_every_rule():
    model = made()
    found = inspect_model(model, CuttlefishConfig(rank_multiple=1))
    assert "net.4.0.conv1" in found.table("stable_rank") and found.parameters_after("ratio") < found.parameters


def test_the_last_line_of_a_plain_module_says_how_that_loads(caplog):
    """from_pretrained is for transformers' models."""
    model = made(width=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    run = Cuttlefish(model, optimizer, CuttlefishConfig(target_ratio=0.5, switch_step=4), total_steps=6)
    for _ in range(6):
        optimizer.zero_grad()
        model(**batch())["loss"].backward()
        optimizer.step()
        run.step()
    with caplog.at_level("INFO", logger="hf_cuttlefish"):
        run.end()
    last = caplog.records[-1].message
    assert "follow_checkpoints(model)" in last and "from_pretrained" not in last


@pytest.mark.parametrize(("name", "layers"), [("resnet18", 19), ("regnetx_002", 43)])
def test_models_of_timm(name, layers):
    timm = pytest.importorskip("timm", exc_type=ImportError)
    torch.manual_seed(0)
    model, x = timm.create_model(name, num_classes=2).eval(), torch.randn(2, 3, 32, 32)
    plan = estimate_ranks(model, CuttlefishConfig(rank_rule="ratio", rank_ratio=0.1, rank_multiple=1))
    assert len(plan.decisions) == layers
    factorize(model, plan)
    logits = model(x)
    assert len(low_rank_layers(model)) == len(plan)
    merge(model)
    assert torch.allclose(model(x), logits, atol=1e-5)
