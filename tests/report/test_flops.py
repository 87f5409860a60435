"""FLOPs of convolutions at their feature maps: against a count by hand, and in the tables."""

import json

import pytest
import torch
import transformers as hf
from torch import nn

from hf_cuttlefish import CuttlefishConfig, factorize
from hf_cuttlefish.cli.main import main
from hf_cuttlefish.decide.targets import find_targets
from hf_cuttlefish.report.flops import Flops, flops_of, flops_of_example
from hf_cuttlefish.report.inspection import inspect_model
from hf_cuttlefish.report.sizes import size_curve


class Net(nn.Module):
    """A stem, two blocks and a head: maps of 8 x 8, 4 x 4 and 2 x 2."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList([self._block(1), self._block(2)])
        self.head = nn.Linear(16, 4)

    def _block(self, groups):
        first = nn.Conv2d(8 * (1 if groups == 1 else 2), 16, 3, stride=2, padding=1, groups=groups)
        return nn.Sequential(first, nn.ReLU(), nn.Conv2d(16, 16, 1))

    def forward(self, pixel_values):
        x = self.stem(pixel_values)
        for block in self.blocks:
            x = block(x)
        return {"logits": self.head(x.mean((2, 3)))}


def resnet():
    torch.manual_seed(0)
    config = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_channels=1, num_labels=3
    )
    return hf.ResNetForImageClassification(config)


def test_a_convolution_works_at_each_position_of_its_map():
    net = Net()
    layers = find_targets(net)
    found = flops_of_example(net, layers, {"pixel_values": torch.zeros(5, 3, 8, 8)})
    assert found == {"blocks.0.0": 2 * 16, "blocks.0.2": 2 * 16, "blocks.1.0": 2 * 4, "blocks.1.2": 2 * 4}
    assert net.training
    # A pair runs at the dense layer's resolution: what each of its parameters costs stays the same.
    factorize(net, dict.fromkeys(layers, 2))
    assert flops_of_example(net, layers_of(net, layers), {"pixel_values": torch.zeros(5, 3, 8, 8)}) == found


def layers_of(net, names):
    return {name: net.get_submodule(name) for name in names}


def test_an_inspection_adds_them_up():
    net = Net()
    batch = {"pixel_values": torch.zeros(2, 3, 8, 8)}
    found = inspect_model(net, CuttlefishConfig(rank_multiple=1), example=batch).to_dict()
    by_hand = 2 * (16 * (16 * 8 * 9 + 16 * 16) + 4 * (16 * 8 * 9 + 16 * 16))
    assert found["rules"]["ratio"]["flops_per_image_before"] == by_hand
    assert sum(layer["flops_per_image"] for layer in found["layers"]) == by_hand
    curve = size_curve(net, [0.5], CuttlefishConfig(rank_multiple=1), held_out=[batch])
    assert curve.dense.flops == by_hand > curve.points[0].flops and "MFLOPs an image of 3 x 8 x 8" in curve.table()
    assert curve.to_dict()["dense"]["flops_per_image"] == by_hand
    # Without an image nothing is known of the maps; a model without convolutions counts tokens.
    assert "MFLOPs a position" in inspect_model(net, CuttlefishConfig(rank_multiple=1)).table("ratio")
    assert flops_of(nn.Sequential(nn.Linear(2, 2)), ["0"]) == Flops()
    with pytest.raises(ValueError, match="the example does not fit Net"):
        inspect_model(net, CuttlefishConfig(rank_multiple=1), example={"pixel_values": torch.zeros(1, 5, 8, 8)})


def test_the_command_counts_at_the_size_of_the_models_images(tmp_path, capsys):
    model = resnet()
    model.config.image_size = 32
    model.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path), "--json", "--rank-multiple", "1", "--device", "cpu"]) == 0
    layers = {layer["name"]: layer for layer in json.loads(capsys.readouterr().out)["layers"]}
    seen = {}

    def see(name):
        return lambda module, args, output: seen.update({name: output.shape[-1] * output.shape[-2]})

    for name in layers:
        model.get_submodule(name).register_forward_hook(see(name))
    model.eval()(torch.zeros(1, 1, 32, 32))
    assert all(layer["flops_per_image"] == 2 * seen[name] * layer["parameters"] for name, layer in layers.items())
    assert len(set(seen.values())) > 1


def test_the_report_of_a_switch_says_no_flops_a_token_of_convolutions():
    net = Net()
    assert "FLOPs" not in str(factorize(net, {"blocks.1.2": 2}))
    linear = nn.Sequential(nn.Linear(8, 8))
    assert "FLOPs of the target layers (estimated, per token)" in str(factorize(linear, {"0": 2}))
