"""A run under an Accelerator of one process; its ``save_state`` folder is the fixture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor

from am_lightning.huggingface import attach
from tests.checkpoints.net import Net, rate_of
from tests.checkpoints.plain import adamw, groups_of, set_rate
from tests.checkpoints.saved import Betas, differences, write


class AccelerateRun:
    cap = 0.89

    def __init__(self) -> None:
        net, self.rate = Net(), 0.1
        self.optimizer = adamw(groups_of(net), self.rate)
        self.accelerator = Accelerator(cpu=True)
        self.model, self.prepared = self.accelerator.prepare(net, self.optimizer)
        attach(self.accelerator, self.prepared, log_every_n_steps=None)

    def train(self, steps: range) -> Betas:
        seen = []
        for step in steps:
            set_rate(self.optimizer, rate_of(step, self.rate))
            self.prepared.zero_grad()
            self.accelerator.backward(self.model(step))
            self.prepared.step()
            seen.append({name: float(beta) for name, beta in self.optimizer.momentum().items()})
        return seen

    def save(self, folder: Path) -> None:
        self.accelerator.save_state(str(folder))

    def load(self, folder: Path) -> None:
        self.accelerator.load_state(str(folder))

    def weights(self) -> dict[str, Tensor]:
        return {name: param.detach() for name, param in self.model.named_parameters()}

    def optimizer_state(self) -> dict[str, Any]:
        return self.optimizer.state_dict()


def _fresh() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def save(folder: Path) -> None:
    _fresh()
    write(AccelerateRun(), folder)
    _fresh()


def resume(folder: Path) -> list[str]:
    _fresh()
    try:
        return differences(AccelerateRun(), folder)
    finally:
        _fresh()
