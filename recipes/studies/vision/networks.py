"""Convolutional networks with stems for small images (He et al. 2016; Zagoruyko and Komodakis 2016; Simonyan 2015)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """Branch plus shortcut, then a ReLU; the shortcut is a 1 x 1 convolution where the shape changes.

    Args:
        branch: of convolutions and norms, without a last activation.
        inputs, outputs: channels.
        stride: of the branch.
    """

    def __init__(self, branch: nn.Module, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.branch = branch
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else _convolution(inputs, outputs, kernel=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + self.shortcut(x))


def basic_block(inputs: int, width: int, stride: int) -> Residual:
    """Two 3 x 3 convolutions (ResNet-18)."""
    branch = nn.Sequential(
        _convolution(inputs, width, kernel=3, stride=stride), nn.ReLU(), _convolution(width, width, kernel=3)
    )
    return Residual(branch, inputs, width, stride)


def bottleneck(inputs: int, width: int, stride: int) -> Residual:
    """1 x 1, 3 x 3, 1 x 1 with four times the width at the end (ResNet-50)."""
    branch = nn.Sequential(
        _convolution(inputs, width, kernel=1),
        nn.ReLU(),
        _convolution(width, width, kernel=3, stride=stride),
        nn.ReLU(),
        _convolution(width, 4 * width, kernel=1),
    )
    return Residual(branch, inputs, 4 * width, stride)


class WideBlock(nn.Module):
    """Norm and ReLU before each of two 3 x 3 convolutions (Wide ResNet)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.first_norm, self.second_norm = nn.BatchNorm2d(inputs), nn.BatchNorm2d(width)
        self.first = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        same = inputs == width and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first_norm(x))
        y = self.second(F.relu(self.second_norm(self.first(y))))
        return torch.add(y, self.shortcut(x))


def resnet(
    block: Callable[[int, int, int], Residual], depths: Sequence[int], width: int, channels: int, classes: int
) -> nn.Sequential:
    """A ResNet whose stem is one 3 x 3 convolution, for images of 8 to 64 pixels.

    Args:
        block: makes a block from input channels, width and stride.
        depths: blocks of each stage; the width doubles and the image halves from one to the next.
        width: of the first stage.
        channels: of the images (batch, channels, height, width).
        classes: logits (batch, classes).
    """
    layers: list[nn.Module] = [_convolution(channels, width, kernel=3), nn.ReLU()]
    inputs = width
    for stage, depth in enumerate(depths):
        for position in range(depth):
            made = block(inputs, width * 2**stage, 2 if stage and position == 0 else 1)
            inputs = width * 2**stage * (4 if block is bottleneck else 1)
            layers.append(made)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def wide_resnet(depth: int, factor: int, channels: int, classes: int) -> nn.Sequential:
    """Wide ResNet of 6 n + 4 layers (WRN-28-10: depth 28, factor 10)."""
    layers: list[nn.Module] = [nn.Conv2d(channels, 16, 3, 1, 1, bias=False)]
    inputs = 16
    for stage in range(3):
        for position in range((depth - 4) // 6):
            layers.append(WideBlock(inputs, 16 * factor * 2**stage, 2 if stage and position == 0 else 1))
            inputs = 16 * factor * 2**stage
    head = [nn.BatchNorm2d(inputs), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]
    return nn.Sequential(*layers, *head)


def vgg19(channels: int, classes: int) -> nn.Sequential:
    """VGG-19 with batch norm and one linear layer, as it is used for 32 x 32 images."""
    layers: list[nn.Module] = []
    inputs = channels
    for width, depth in ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)):
        for _ in range(depth):
            layers += [_convolution(inputs, width, kernel=3), nn.ReLU()]
            inputs = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


# From channels and classes to a network.
NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
    "resnet8": partial(resnet, basic_block, (1, 1, 1), 16),
    "resnet18": partial(resnet, basic_block, (2, 2, 2, 2), 64),
    "resnet50": partial(resnet, bottleneck, (3, 4, 6, 3), 64),
    "wide_resnet28x10": partial(wide_resnet, 28, 10),
    "vgg19": vgg19,
}


def _convolution(inputs: int, outputs: int, *, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs))
