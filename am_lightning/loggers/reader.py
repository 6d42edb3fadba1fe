"""Read an optimizer's momentum from the device in one copy, and turn it into the scalars that all frameworks log."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from am_lightning.loggers.history import RunHistory
from am_lightning.loggers.metrics import MomentumStats
from am_lightning.optim.base import AdaptiveMemoryOptimizer
from am_lightning.optim.intervals import Interval, merged_by_name, nothing


def prefix_of(index: int) -> str:
    """Return the tags' prefix for the optimizer at ``index``, counted from 0: am, am-1, am-2, ..."""
    return f"am-{index}" if index else "am"


class StepNumbers(NamedTuple):
    """The numbers that an optimizer counts beside beta_t, in the order in which they end ``report()``.

    Every framework logs a field as ``<prefix>/<field>``, unless it is nan or listed in ``_NOT_LOGGED``.
    """

    skipped_steps: float
    skipped_in_a_row: float
    first_bad: float  # index of a parameter
    grad_norm: float  # nan if clip_grad_norm_ did not run


_FEW_LAYERS = 32
_HOST = torch.empty(0, dtype=torch.float64, device="cpu")
_NOT_LOGGED = {"skipped_in_a_row", "first_bad"}  # used in warnings only


def read_report(optimizer: AdaptiveMemoryOptimizer) -> tuple[torch.Tensor, StepNumbers]:
    """Return beta_t ``[tensors]`` on the CPU, nan for tensors that have never stepped, and the counts, in one copy."""
    return _split(optimizer.report().cpu())


def _split(report: torch.Tensor) -> tuple[torch.Tensor, StepNumbers]:
    split = len(StepNumbers._fields)
    return report[:-split], StepNumbers(*report[-split:].tolist())


class StatsReader:
    """Read beta_t over the steps since the last ``read``, and the optimizer's counts.

    Each reader has its own intervals. Its first interval contains the steps that no reader has read. If a checkpoint
    contains ``state_dict`` (``fabric.save``, ``accelerator.register_for_checkpointing``), a resumed run continues the
    interval.

    Args:
        optimizer: the optimizer to read.
        prefix: prefix of the tags. Default: "am".

    Attributes:
        skipped_before: steps skipped before this process started, from a checkpoint.
        skipped_at_load: steps skipped up to that checkpoint, which an optimizer's state does not count.
        betas: ``[tensors]`` beta_t of the last step on the CPU, nan for tensors that have never stepped.
        interval: beta_t over the interval that the last ``read`` ended, whose fields are ``[tensors]`` on the CPU.
        numbers: counts at the last ``read``.
        first_bad: name of the parameter whose sum was not finite in the last skipped step.
        history: history of all intervals that were read with a step.
        at_end: function that ``finish`` calls. Without a logger it returns an empty string.
    """

    def __init__(self, optimizer: AdaptiveMemoryOptimizer, prefix: str = "am") -> None:
        self.optimizer, self.prefix = optimizer, prefix
        self.skipped_before = self.skipped_at_load = 0
        self.betas = torch.empty(0, device="cpu")
        self.interval = Interval(*nothing(_HOST, 0))
        self.numbers = StepNumbers(*(0.0 for _ in StepNumbers._fields))
        self.first_bad = ""
        self.history = RunHistory()
        self.at_end: Callable[[], str] = str
        self._warned_of = 0
        self._stats: MomentumStats | None = None
        self._carried: tuple[list[str], torch.Tensor] = [], nothing(_HOST, 0)  # names and sums of the logger's interval
        self._loaded = False  # whether all of _carried is from a checkpoint
        optimizer.begin_interval(self, unread=True)
        self.begin(0)

    def begin(self, step: int) -> None:
        """Start the logged interval after ``step``. Sums that ``load_state_dict`` loaded are kept."""
        self.optimizer.begin_interval(self.history)
        if not self._loaded:
            self._carried = [], nothing(_HOST, 0)
        self.history.begin(step)

    def read(self, step: int | None = None) -> None:
        """Copy the interval and the counts from the device, and end the interval.

        Args:
            step: last step of the logger's interval, which started at the end of the previous one. None: read the
                user's own interval, which started at the last ``read`` without a step; the logger's interval continues.
        """
        names = self.optimizer.parameter_names()
        numbers = self._take(names, self if step is None else self.history)
        if step is not None:
            numbers = merged_by_name(numbers, names, self._carried[1], self._carried[0])
            self._carried, self._loaded = ([], nothing(_HOST, 0)), False
        self.interval = Interval(*numbers)
        if step is not None:
            self.history.add(step, self.stats.layer_paths, self.stats.by_layer(self.interval), self.stats.cap)

    def _take(self, names: list[str], reader: Any) -> torch.Tensor:
        """Copy the interval of ``reader`` as ``[6, names]``, and set ``betas`` and ``numbers``, in one copy."""
        interval, report = self.optimizer.interval(reader), self.optimizer.report()
        copied = torch.cat([interval.to(report.device).reshape(-1), report]).cpu()
        self._take_report(copied[interval.numel() :], names)
        return copied[: interval.numel()].reshape(interval.shape).to(torch.float64)

    def look(self) -> None:
        """Read ``betas`` and the counts without ending the interval."""
        self._take_report(self.optimizer.report().cpu(), self.optimizer.parameter_names())

    def _take_report(self, report: torch.Tensor, names: list[str]) -> None:
        self.betas, self.numbers = _split(report)
        row = int(self.numbers.first_bad)
        self.first_bad = "unknown, the engine dropped it" if row < 0 else names[row] if names else ""

    def state_dict(self) -> dict[str, Any]:
        """Return the interval and the history, so that a resumed run's curves miss no step. It takes no collective."""
        self._carry()
        names, numbers = self._carried
        stepped = [index for index, steps in enumerate(Interval(*numbers).steps.tolist()) if steps]  # finite
        return {
            "names": [names[index] for index in stepped],
            "interval": numbers[:, stepped],
            "skipped_steps": self.skipped_before + int(self.numbers.skipped_steps),
            "history": self.history.state_dict(),
        }

    def _carry(self) -> None:
        """Move the device's sums of the logger's interval to the host, without ending the interval."""
        names = self.optimizer.parameter_names()
        taken = self._take(names, self.history)
        self._loaded = self._loaded and not bool(Interval(*taken).steps.any())
        self._carried = names, merged_by_name(taken, names, self._carried[1], self._carried[0])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Replace the interval and the history by those that ``state_dict()`` returned."""
        numbers = torch.as_tensor(state_dict["interval"], dtype=torch.float64, device="cpu")
        self.optimizer.begin_interval(self.history)
        self._carried, self._loaded = (list(state_dict["names"]), numbers), True
        self.skipped_at_load = state_dict["skipped_steps"]
        self.skipped_before = self.skipped_at_load - int(read_report(self.optimizer)[1].skipped_steps)
        self.history.load_state_dict(state_dict["history"])

    @property
    def stats(self) -> MomentumStats:
        """The MomentumStats of the optimizer's current tensors and caps."""
        names, caps = self.optimizer.parameter_names(), self.optimizer.caps()
        if self._stats is None or self._stats.names != names:  # a group was added
            self._stats = MomentumStats(names, caps, self.prefix)
        self._stats.cap = max(caps, default=0.0)  # a group's cap may change at any time
        return self._stats

    @property
    def skipped_in_a_row(self) -> int:
        """Number of consecutive steps skipped up to the last ``read``."""
        return int(self.numbers.skipped_in_a_row)

    def has_names(self) -> bool:
        """Return whether parameters have names other than ``group.index``."""
        return not all(name.replace(".", "").isdigit() for name in self.stats.names)

    def scalars(self) -> dict[str, float]:
        """Return the scalars of the interval by tag.

        The tags are ``<prefix>/beta/...``, ``/clamp/...``, ``/skipped_steps`` since the run began, and ``/grad_norm``
        of the last step if ``clip_grad_norm_`` ran.
        """
        counted = self.numbers._replace(skipped_steps=self.numbers.skipped_steps + self.skipped_before)._asdict()
        logged = {name: value for name, value in counted.items() if name not in _NOT_LOGGED and not math.isnan(value)}
        return self.stats.scalars(self.interval) | {f"{self.prefix}/{name}": value for name, value in logged.items()}

    def layers(self) -> dict[str, float]:
        """Return ``<prefix>/beta/layer/<layer>``, the mean over the layer's tensors and steps, and its ``/min``."""
        return self.stats.layers(self.interval)

    def floor(self) -> dict[str, float]:
        """Return ``<prefix>/beta/floor``, 0, which makes the axes of TensorBoard's Custom Scalars start at 0."""
        return {f"{self.prefix}/beta/floor": 0.0}

    def few_layers(self) -> bool:
        """Return whether there are at most 32 layers, so that a chart with a curve for each is legible."""
        return len(self.stats.layer_paths) <= _FEW_LAYERS

    def add_histogram(self, board: Any, step: int) -> None:
        """Write the mean beta_t of each tensor that has stepped to a ``SummaryWriter``, as ``<prefix>/beta``."""
        stepped = self.interval.steps > 0
        if bool(stepped.any()):
            board.add_histogram(f"{self.prefix}/beta", (self.interval.total / self.interval.steps)[stepped], step)

    def draw(self, sinks: Sequence[Callable[[str, Any, int], Any]], step: int) -> None:
        """Write the heat map of the layers as ``<prefix>/beta/layers``. Without Pillow, nothing is written.

        Args:
            sinks: functions of the tag, the picture as uint8 ``[height, width, 3]``, and the step.
            step: last step of the picture.
        """
        picture = self._history_until(step).picture(f"{self.prefix}: beta_t by layer") if sinks else None
        for sink in sinks if picture is not None else ():
            sink(f"{self.prefix}/beta/layers", picture, step)

    def finish(self) -> str:
        """Draw the last picture, up to the last step. Call it after training and before the logger is closed.

        Returns:
            A summary of the run in one sentence. It is empty on processes that do not log, and if no step was made.
        """
        return self.at_end()

    def card(self, where: str) -> str:
        """Return a Markdown table of the scope, lambda, the caps, and the optimizer's tensors and reductions.

        Args:
            where: name of the strategy or framework for the heading.
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
        """Return the number of steps skipped since the last warning."""
        return int(self.numbers.skipped_steps) - self._warned_of

    def skip_warning(self) -> str:
        """Return the warning about the steps skipped since the last warning, and start the next count."""
        new, self._warned_of = self.newly_skipped(), int(self.numbers.skipped_steps)
        return (
            f"{self.prefix}: {new} step{'s' if new > 1 else ''} since the last report dropped, because a sum over "
            f"gradients was not finite (first in {self.first_bad!r}). Nothing was written; {self._warned_of} in all."
        )

    def skipped_in_all(self) -> int:
        """Return the number of steps skipped by this run and by the runs that it resumed from."""
        return self.skipped_before + int(read_report(self.optimizer)[1].skipped_steps)

    def _history_until(self, step: int) -> RunHistory:
        """Return ``history`` with the steps since the last reading, without ending their interval."""
        if step <= self.history.step:
            return self.history
        self._carry()
        whole, (names, numbers) = copy.deepcopy(self.history), self._carried
        if names == self.stats.names:
            whole.add(step, self.stats.layer_paths, self.stats.by_layer(Interval(*numbers)), self.stats.cap)
        return whole

    def sentence(self, step: int) -> str:
        """Return a summary of the run up to ``step``, or an empty string if no step was made."""
        found, skipped = self._history_until(step).sentence(), self.skipped_in_all()
        dropped = f"{skipped} step{'' if skipped == 1 else 's'} skipped" if skipped else "no step skipped"
        return f"{self.prefix}: {found}; {dropped}" if found else ""


def settings_of(optimizer: AdaptiveMemoryOptimizer) -> str:
    """Return the scope, lambda, the caps and the number of tensors as text for a log line."""
    groups, tensors = optimizer.param_groups, len(optimizer.parameter_names())
    cap, lambd = (_several(group[key] for group in groups) for key in (optimizer.cap_key, "lambd"))
    return f"scope {optimizer.scope}, lambda {lambd}, cap of beta_t {cap}, {tensors} tensors"


def _several(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in sorted(set(values)))
