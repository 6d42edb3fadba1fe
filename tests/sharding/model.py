"""A small transformer-like regression with tensors that split unevenly, and the run in one process to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor.debug import CommDebugMode

from am_lightning import AMSGD, AMAdamW
from am_lightning.optim import base

WIDTH, HIDDEN, OUT, BATCH, TOKENS = 6, 8, 3, 8, 4
CPU = torch.device("cpu")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """Tensors of 5, 3 and 1 rows: over 2 and 4 ranks some shards are smaller than others and some are empty."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.empty(1, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.norm, self.mix, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5), nn.Linear(5, OUT)
        self.gain = nn.Parameter(torch.empty(1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.shift
        for block in self.blocks:
            x = block(x)
        return self.head(torch.tanh(self.mix(self.norm(x)))) * self.gain


def make_net(dtype: torch.dtype, blocks: int = 2) -> Net:
    generator = torch.Generator().manual_seed(0)
    net = Net(blocks).double()
    with torch.no_grad():
        for param in net.parameters():
            param.uniform_(-0.5, 0.5, generator=generator)
    return net.to(dtype)


def batch_of(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the global batch of a step: ``[8, 4, 6]`` and ``[8, 4, 3]``."""
    generator = torch.Generator().manual_seed(100 + step % 5)
    x = torch.randn(BATCH, TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    y = torch.sin(2 * x[..., :OUT]) + 0.1 * torch.randn(BATCH, TOKENS, OUT, generator=generator, dtype=torch.float64)
    return x.to(dtype), y.to(dtype)


# Rates at which the run overshoots, so that many betas lie strictly between 0 and the cap.
RATES = {"adamw": {"tensor": 0.1, "group": 0.3, "global": 0.3}, "sgd": {"tensor": 1.0, "group": 4.0, "global": 2.0}}
CAPS = {"adamw": 0.89, "sgd": 0.9}


def lr_of(step: int, rate: float = 0.1) -> float:
    return rate * (0.5 if step % 3 == 0 else 1.0)


def is_plain_decay(name: str) -> bool:
    return "norm" not in name and not name.endswith("bias") and not name.endswith("gain")


def groups_of(model: nn.Module, decay: float = 0.1) -> list[dict[str, Any]]:
    """Return two groups by name, because shapes are not the logical ones under FSDP1."""
    named = list(model.named_parameters())
    return [
        {"params": [(n, p) for n, p in named if is_plain_decay(n)], "weight_decay": decay},
        {"params": [(n, p) for n, p in named if not is_plain_decay(n)], "weight_decay": 0.0},
    ]


def make_optimizer(kind: str, params: Any, scope: str, **options: Any) -> AMAdamW | AMSGD:
    if kind == "adamw":
        return AMAdamW(params, lr=RATES[kind][scope], betas=(0.89, 0.95), scope=scope, **options)
    return AMSGD(params, lr=RATES[kind][scope], beta_max=0.9, scope=scope, **options)


@contextmanager
def raw_betas(scope: str) -> Iterator[list[list[float]]]:
    """Collect beta_t of every row before it is clipped, at each step; nan if the sums do not determine it."""
    collected: list[list[float]] = []
    original: Callable[..., Any] = base.decide

    def spy(sums: Any, **options: Any) -> Any:
        enters = sums.present & ~sums.first
        num, den = torch.where(enters, sums.num, 0.0), torch.where(enters, sums.den, 0.0)
        if scope != "tensor":
            parts = [len(num)] if scope == "global" else options["sizes"]
            num, den = (torch.cat([part.sum().expand_as(part) for part in x.split(parts)]) for x in (num, den))
        collected.append(torch.where(enters, 1 - num / den, torch.nan).tolist())
        return original(sums, **options)

    base.decide = spy
    try:
        yield collected
    finally:
        base.decide = original


Betas = list[dict[str, float]]  # for each step: name -> beta_t


def beside(raw: list[list[float]], names: list[str], seen: Betas, single: dict[str, Betas]) -> list[Any]:
    """Pair beta_t of each step with that of one process: before clipping, if ``raw_betas`` has collected it.

    Triton kernels on a GPU clip it inside; then the clipped values are compared.
    """
    if not raw:
        return list(zip(seen, single["seen"], strict=True))
    return list(zip([dict(zip(names, row, strict=True)) for row in raw], single["raw"], strict=True))


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    dtype: torch.dtype,
    *,
    share: tuple[int, int] = (0, 1),
    device: torch.device = CPU,
    rate: float = 0.1,
    before_step: Callable[[int], None] | None = None,
    counts: list[dict[str, int]] | None = None,
) -> Betas:
    """Train on this rank's share (index, number of shares) of each global batch.

    Returns:
        beta_t by name after each step; ``counts`` gets the collectives of the first two optimizer steps by operator
        (counting is slow).
    """
    seen = []
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = lr_of(step, rate)
        x, y = batch_of(step, dtype)
        x, y = (part.chunk(share[1])[share[0]].to(device) for part in (x, y))
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        if before_step is not None:
            before_step(step)
        counting = counts is not None and len(counts) < 2
        with CommDebugMode() if counting else nullcontext() as mode:
            optimizer.step()
        if counting:
            counts.append({str(operator): n for operator, n in mode.get_comm_counts().items() if n})
        seen.append({name: float(beta) for name, beta in optimizer.momentum().items()})
    return seen


def interior_share(seen: list[dict[str, float]], kind: str) -> float:
    """Return the share of the betas after the first step that lie strictly between 0 and the cap."""
    betas = [beta for step in seen[1:] for beta in step.values()]
    return sum(1e-6 < beta < CAPS[kind] - 1e-6 for beta in betas) / len(betas)
