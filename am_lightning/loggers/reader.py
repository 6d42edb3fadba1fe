"""One optimizer's momentum, read from the device once and turned into scalars: what every framework's logger gets."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from am_lightning.loggers.metrics import MomentumStats
from am_lightning.optim.base import AdaptiveMemoryOptimizer


def prefix_of(index: int) -> str:
    """What the tags of the optimizer at ``index``, from 0, start with: am, am-1, am-2, ..."""
    return f"am-{index}" if index else "am"


class StepNumbers(NamedTuple):
    """What an optimizer counts beside beta_t, in the order in which ``report()`` ends with it.

    A field is logged everywhere as ``<prefix>/<field>`` unless ``StatsReader.scalars`` leaves it out; nan is left out.
    """

    skipped_steps: float
    skipped_in_a_row: float
    first_bad: float  # index of a parameter
    grad_norm: float  # nan where clip_grad_norm_ did not run


_NOT_LOGGED = {"skipped_in_a_row", "first_bad"}  # for warnings


def read_report(optimizer: AdaptiveMemoryOptimizer) -> tuple[torch.Tensor, StepNumbers]:
    """``[tensors]`` beta_t on the CPU, nan for tensors that have never stepped, and the counts: one copy."""
    report = optimizer.report().cpu()
    split = len(StepNumbers._fields)
    return report[:-split], StepNumbers(*report[-split:].tolist())


class StatsReader:
    """beta_t and what is counted of ``optimizer``, under tags that start with ``prefix``.

    Attributes:
        skipped_before: steps skipped before this process started, from a checkpoint.
        betas: ``[tensors]`` on the CPU, nan for tensors that have never stepped.
        numbers: what was counted, up to the last ``read``.
        first_bad: the parameter whose sum was not finite in the last skipped step.
    """

    def __init__(self, optimizer: AdaptiveMemoryOptimizer, prefix: str = "am") -> None:
        self.optimizer, self.prefix = optimizer, prefix
        self.skipped_before = 0
        self.betas = torch.empty(0, device="cpu")
        self.numbers = StepNumbers(*(0.0 for _ in StepNumbers._fields))
        self.first_bad = ""
        self._warned_of = 0
        self._stats: MomentumStats | None = None

    def read(self) -> None:
        """The one copy from device to host."""
        self.betas, self.numbers = read_report(self.optimizer)
        names = self.optimizer.parameter_names()
        self.first_bad = names[int(self.numbers.first_bad)] if names else ""
        if self._stats is None or self._stats.names != names:  # a group was added
            self._stats = MomentumStats(names, self.optimizer.caps(), self.prefix)

    @property
    def stats(self) -> MomentumStats:
        """How the tensors are grouped; known after the first ``read``."""
        assert self._stats is not None
        return self._stats

    @property
    def skipped_in_a_row(self) -> int:
        """Up to the last ``read``."""
        return int(self.numbers.skipped_in_a_row)

    def has_names(self) -> bool:
        """Parameters are called otherwise than ``group.index``."""
        return not all(name.replace(".", "").isdigit() for name in self.stats.names)

    def scalars(self) -> dict[str, float]:
        """Tag -> value of what ``read`` found: ``<prefix>/beta/...``, ``/clamp/...``, ``/skipped_steps``,
        ``/grad_norm`` where ``clip_grad_norm_`` ran."""
        counted = self.numbers._replace(skipped_steps=self.numbers.skipped_steps + self.skipped_before)._asdict()
        logged = {name: value for name, value in counted.items() if name not in _NOT_LOGGED and not math.isnan(value)}
        return self.stats.scalars(self.betas) | {f"{self.prefix}/{name}": value for name, value in logged.items()}

    def layers(self) -> dict[str, float]:
        """``<prefix>/beta/layer/<layer>``: the mean of each layer's tensors."""
        return self.stats.layers(self.betas)

    def add_histogram(self, board: Any, step: int) -> None:
        """beta_t of the tensors that have stepped, as ``<prefix>/beta``, to a ``SummaryWriter``."""
        stepped = self.betas[~self.betas.isnan()]
        if stepped.numel():
            board.add_histogram(f"{self.prefix}/beta", stepped, step)

    def card(self, where: str) -> str:
        """Markdown: scope, lambda, caps, rows and how they are reduced.

        Args:
            where: the strategy or framework, for the headline.
        """
        groups, key = self.optimizer.param_groups, self.optimizer.cap_key
        lines = [
            f"**{type(self.optimizer).__name__}** under {where}",
            f"scope | {self.optimizer.scope}",
            f"lambda | {_several(group['lambd'] for group in groups)}",
            f"cap of beta_t ({key}) | {_several(group[key] for group in groups)}",
            f"rows | {self.optimizer.describe()}",
        ]
        head, *rows = lines
        return "\n".join([head, "", "| | |", "|---|---|", *(f"| {row} |" for row in rows)])

    def newly_skipped(self) -> int:
        """Steps skipped since the last warning."""
        return int(self.numbers.skipped_steps) - self._warned_of

    def skip_warning(self) -> str:
        """The warning for this log interval; the next counts from here."""
        new, self._warned_of = self.newly_skipped(), int(self.numbers.skipped_steps)
        return (
            f"{self.prefix}: {new} step{'s' if new > 1 else ''} since the last report dropped, because a sum over "
            f"gradients was not finite (first in {self.first_bad!r}). Nothing was written; {self._warned_of} in all."
        )

    def skipped_in_all(self) -> int:
        """Steps skipped by this run and those it resumed from."""
        return self.skipped_before + int(read_report(self.optimizer)[1].skipped_steps)


def _several(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in sorted(set(values)))
