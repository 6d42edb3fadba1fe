"""Convolutional networks with stems for small images (He et al. 2016; Zagoruyko and Komodakis 2016; Simonyan 2015)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn


class Residual(nn.Module):
    """Branch plus shortcut, which is the identity if the shape stays the same, then an activation."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.branch, self.shortcut, self.activation = branch, shortcut, activation

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.activation(self.branch(x) + self.shortcut(x))
        return result


def basic_block(inputs: int, width: int, stride: int) -> Residual:
    """Return a block of two 3 x 3 convolutions (ResNet-18)."""
    branch = nn.Sequential(_convolution(inputs, width, 3, stride), nn.ReLU(), _convolution(width, width, 3))
    same = inputs == width and stride == 1
    return Residual(branch, nn.Identity() if same else _convolution(inputs, width, 1, stride), nn.ReLU())


def bottleneck(inputs: int, width: int, stride: int) -> Residual:
    """Return a block of 1 x 1, 3 x 3 and 1 x 1 convolutions with four times the width at the end (ResNet-50)."""
    first, second = _convolution(inputs, width, 1), _convolution(width, width, 3, stride)
    branch = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), _convolution(width, 4 * width, 1))
    same = inputs == 4 * width and stride == 1
    return Residual(branch, nn.Identity() if same else _convolution(inputs, 4 * width, 1, stride), nn.ReLU())


def wide_block(inputs: int, width: int, stride: int) -> Residual:
    """Return a block of two 3 x 3 convolutions with a norm and a ReLU before each (Wide ResNet)."""
    branch = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(), nn.Conv2d(inputs, width, 3, stride, 1, bias=False))
    branch.extend([nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1, bias=False)])
    same = inputs == width and stride == 1
    shortcut = nn.Identity() if same else nn.Conv2d(inputs, width, 1, stride, bias=False)
    return Residual(branch, shortcut, nn.Identity())


def resnet(
    block: Callable[[int, int, int], Residual], depths: Sequence[int], width: int, channels: int, classes: int
) -> nn.Sequential:
    """Return a ResNet whose stem is one 3 x 3 convolution, for images of 8 to 64 pixels.

    Args:
        block: function that returns a block from input channels, width and stride.
        depths: blocks of each stage. The width doubles and the image halves from one stage to the next.
        width: width of the first stage.
        channels: channels of the images (batch, channels, height, width).
        classes: classes of the logits (batch, classes).
    """
    layers: list[nn.Module] = [_convolution(channels, width, 3), nn.ReLU()]
    inputs = width
    for stage, depth in enumerate(depths):
        for position in range(depth):
            layers.append(block(inputs, width * 2**stage, 2 if stage and position == 0 else 1))
            inputs = width * 2**stage * (4 if block is bottleneck else 1)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def wide_resnet(depth: int, factor: int, channels: int, classes: int) -> nn.Sequential:
    """Return a Wide ResNet of 6 n + 4 layers (WRN-28-10: depth 28, factor 10)."""
    layers: list[nn.Module] = [nn.Conv2d(channels, 16, 3, 1, 1, bias=False)]
    inputs = 16
    for stage in range(3):
        for position in range((depth - 4) // 6):
            layers.append(wide_block(inputs, 16 * factor * 2**stage, 2 if stage and position == 0 else 1))
            inputs = 16 * factor * 2**stage
    head = [nn.BatchNorm2d(inputs), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]
    return nn.Sequential(*layers, *head)


def vgg19(channels: int, classes: int) -> nn.Sequential:
    """Return VGG-19 with batch norm and one linear layer, as is usual for 32 x 32 images."""
    layers: list[nn.Module] = []
    inputs = channels
    for width, depth in ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)):
        for _ in range(depth):
            layers += [_convolution(inputs, width, 3), nn.ReLU()]
            inputs = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
    "resnet8": partial(resnet, basic_block, (1, 1, 1), 16),
    "resnet18": partial(resnet, basic_block, (2, 2, 2, 2), 64),
    "resnet50": partial(resnet, bottleneck, (3, 4, 6, 3), 64),
    "wide_resnet28x10": partial(wide_resnet, 28, 10),
    "vgg19": vgg19,
}


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs))
