"""Runs of one process that are saved by ``torch.save`` of ``state_dict()``: ``PLAIN[name]()``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from am_lightning import AMSGD, AMAdamW
from tests.checkpoints.net import END, Net, rate_of
from tests.checkpoints.saved import Betas


def groups_of(net: torch.nn.Module, *, named: bool = True) -> list[dict[str, Any]]:
    """Return two groups: matrices with decay, vectors without."""
    parts: dict[bool, list[Any]] = {True: [], False: []}
    for name, param in net.named_parameters():
        parts[name.endswith("weight")].append((name, param) if named else param)
    return [{"params": parts[True], "weight_decay": 0.1}, {"params": parts[False], "weight_decay": 0.0}]


def set_rate(optimizer: Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def adamw(params: Any, rate: float, scope: str = "tensor", **options: Any) -> AMAdamW:
    return AMAdamW(params, lr=rate, betas=(0.89, 0.95), scope=scope, **options)


def adamw_of_tensor_rate(params: Any, rate: float, **options: Any) -> AMAdamW:
    return adamw(params, torch.tensor(rate, dtype=torch.float64), **options)


def torch_adamw(params: Any, rate: float) -> AdamW:
    return AdamW(params, lr=rate, betas=(0.87, 0.95))


def sgd(params: Any, rate: float, scope: str = "global", **options: Any) -> AMSGD:
    return AMSGD(params, lr=rate, scope=scope, **options)


class PlainRun:
    """A run with one optimizer, or with ``before`` until the checkpoint and another one afterwards."""

    cap = 0.89

    def __init__(
        self,
        make: Callable[..., Any],
        rate: float,
        dtype: torch.dtype = torch.float64,
        *,
        before: Callable[..., Any] | None = None,
        named: bool = True,
        one_cycle: bool = False,
    ) -> None:
        self.net = Net(dtype)
        self.make, self.rate = make, rate
        self.optimizer = (before or make)(groups_of(self.net, named=named), rate)
        self.switches = before is not None
        self.scheduler = OneCycleLR(self.optimizer, max_lr=3 * rate, total_steps=END + 1) if one_cycle else None

    def train(self, steps: range) -> Betas:
        seen = []
        for step in steps:
            if self.scheduler is None:
                set_rate(self.optimizer, rate_of(step, self.rate))
            self.optimizer.zero_grad()
            loss = self.net(step)
            loss.backward()
            self.optimizer.step(lambda loss=loss: loss.detach())
            if self.scheduler is not None:
                self.scheduler.step()
            if isinstance(self.optimizer, (AMAdamW, AMSGD)):
                seen.append({name: float(beta) for name, beta in self.optimizer.momentum().items()})
        return seen

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        parts = {"model": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}
        if self.scheduler is not None:
            parts["scheduler"] = self.scheduler.state_dict()
        torch.save(parts, folder / "checkpoint.pt")
        if self.switches:
            self.switch()
            self.optimizer.load_state_dict(parts["optimizer"])

    def switch(self) -> None:
        """Switch from torch.optim.AdamW to AMAdamW."""
        self.optimizer, self.switches = self.make(groups_of(self.net), self.rate), False

    def load(self, folder: Path) -> None:
        if self.switches:
            self.switch()
        parts = torch.load(folder / "checkpoint.pt", weights_only=True)
        self.net.load_state_dict(parts["model"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(parts["scheduler"])
        self.optimizer.load_state_dict(parts["optimizer"])

    def weights(self) -> dict[str, Tensor]:
        return {name: param.detach() for name, param in self.net.named_parameters()}

    def optimizer_state(self) -> dict[str, Any]:
        betas = self.optimizer.momentum()
        return self.optimizer.state_dict() | {"momentum": betas}


FLOAT, HALF = torch.float32, torch.bfloat16
PLAIN: dict[str, Callable[[], PlainRun]] = {
    "adamw_tensor": partial(PlainRun, adamw, 0.1),
    "adamw_group": partial(PlainRun, partial(adamw, scope="group"), 0.1),
    "adamw_global": partial(PlainRun, partial(adamw, scope="global"), 0.1),
    "adamw_unnamed": partial(PlainRun, adamw, 0.1, named=False),
    "adamw_float32": partial(PlainRun, adamw, 0.1, FLOAT),
    "adamw_bfloat16": partial(PlainRun, adamw, 0.1, HALF),
    "adamw_exp_avg_bfloat16": partial(PlainRun, partial(adamw, exp_avg_dtype=HALF), 0.1, FLOAT),
    "adamw_capturable": partial(PlainRun, partial(adamw_of_tensor_rate, capturable=True), 0.1),
    "adamw_tensor_rate": partial(PlainRun, adamw_of_tensor_rate, 0.1),
    "adamw_one_cycle": partial(PlainRun, adamw, 0.05, one_cycle=True),
    "adamw_from_torch": partial(PlainRun, adamw, 0.1, before=torch_adamw),
    "sgd_global": partial(PlainRun, sgd, 0.3),
    "sgd_tensor": partial(PlainRun, partial(sgd, scope="tensor"), 0.3),
    "sgd_group_decoupled": partial(PlainRun, partial(sgd, scope="group", decoupled_weight_decay=True), 0.3),
    "sgd_exact": partial(PlainRun, partial(sgd, loss_gap="exact"), 0.3),
    "sgd_float32": partial(PlainRun, sgd, 0.3, FLOAT),
    "sgd_bfloat16": partial(PlainRun, sgd, 0.3, HALF),
}
ROUNDED = {"adamw_bfloat16", "adamw_exp_avg_bfloat16", "sgd_bfloat16"}
