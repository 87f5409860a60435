"""The networks: ResNet-18 in its CIFAR form, and a small VGG with batch norms, both with a loss as transformers' models have it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut (He et al., arXiv 1512.03385)."""

    def __init__(self, given: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(given, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride > 1 or given != width:
            self.shortcut = nn.Sequential(nn.Conv2d(given, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(examples, given, height, width) -> (examples, width, height / stride, width / stride)."""
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        return functional.relu(y + self.shortcut(x))


def resnet18(channels: int, classes: int, width: int = 64) -> nn.Module:
    """11.2 million parameters at width 64."""
    layers: list[nn.Module] = [
        nn.Conv2d(channels, width, 3, 1, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]
    given = width
    for i in range(4):
        out, stride = width * 2**i, 1 if i == 0 else 2
        layers.append(nn.Sequential(Block(given, out, stride), Block(out, out, 1)))
        given = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(given, classes))


def vgg(channels: int, classes: int, width: int = 64) -> nn.Module:
    """Seven convolutions with batch norms and one linear layer (VGG-11 without its last and its MLP), 6.8 million at width 64."""
    features: list[nn.Module] = []
    given = channels
    for size in (1, "pool", 2, "pool", 4, 4, "pool", 8, 8, 8):
        if size == "pool":
            features.append(nn.MaxPool2d(2))
            continue
        out = width * int(size)
        features += [nn.Conv2d(given, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
        given = out
    return nn.Sequential(nn.Sequential(*features), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(given, classes))


NETWORKS = {"resnet18": resnet18, "vgg": vgg}


class Classifier(nn.Module):
    """A network whose forward gives loss and logits."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, Any]:
        """Loss (mean cross-entropy) and logits (examples, classes)."""
        logits = self.net(pixel_values)
        return {"loss": None if labels is None else functional.cross_entropy(logits.float(), labels), "logits": logits}
