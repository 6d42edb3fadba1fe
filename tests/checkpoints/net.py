"""A model of 62 parameters with given gradients: the same bits on every machine and under every engine."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

STOP, END = 7, 10  # a checkpoint is saved after STOP steps; the run continues to END


def gradient(name: str, shape: torch.Size, step: int) -> Tensor:
    """Return a gradient that swings as in a run that overshoots, in multiples of 1/64, which are exact in bfloat16."""
    seed = sum(map(ord, name))
    index = torch.arange(math.prod(shape), dtype=torch.float64, device="cpu")
    phase, speed = 0.75 * index + 0.37 * seed, 2.0 + 0.9 * torch.sin(1.3 * index + seed)
    noise = torch.sin(12.9898 * index + 78.233 * (step + 1) + seed)
    whole = (1.2 + 0.5 * torch.cos(index)) * torch.cos(speed * step + phase) * 0.96**step + 0.5 * noise
    return ((64 * whole).round() / 64).reshape(shape)


class Block(nn.Module):
    """A block whose loss is linear in its parameters."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(shape)), nn.Parameter(torch.empty(shape[0]))

    def forward(self, loss: Tensor, step: int, prefix: str) -> Tensor:
        for name, param in (("weight", self.weight), ("bias", self.bias)):
            loss = loss + (param * gradient(f"{prefix}.{name}", param.shape, step).to(param)).sum()
        return loss


class Net(nn.Module):
    """A net whose loss ``net(step)`` has the gradients that :func:`gradient` returns."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.first, self.second = Block(7, 4), Block(3, 7)
        self.scale = nn.Parameter(torch.empty(3))
        with torch.no_grad():
            for name, param in self.named_parameters():
                param.copy_(gradient(name, param.shape, 99) / 2)
        self.to(dtype)

    def forward(self, step: int) -> Tensor:
        loss = (self.scale * gradient("scale", self.scale.shape, step).to(self.scale)).sum()
        return self.second(self.first(loss, step, "first"), step, "second")


def rate_of(step: int, rate: float) -> float:
    return rate * (1.0, 0.5, 0.75)[step % 3]
