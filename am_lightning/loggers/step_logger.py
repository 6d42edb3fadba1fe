"""Logging from inside an optimizer, for frameworks whose training loop is the user's own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from am_lightning.distributed.call_stack import inside_state_creation
from am_lightning.loggers.reader import Readings

StepHook = Callable[[Callable[[], None]], None]


def logs_of(optimizer: Any) -> list[StepLog]:
    """Those that an optimizer owns."""
    owners = (getattr(hook, "__self__", None) for hook in optimizer._optimizer_load_state_dict_post_hooks.values())
    return [owner for owner in owners if isinstance(owner, StepLog)]


class StepLog(ABC):
    """A hook after every training step: counts the steps, and calls ``log`` on one process at the interval.

    The optimizer owns it. ``every`` is the interval in optimizer steps; None: nothing is logged.
    """

    every: int | None

    def __init__(self, readings: Readings, after_each_step: StepHook | None = None) -> None:
        """``after_each_step``: registers what an engine calls that steps the optimizer several times in a step."""
        self.readings = readings
        self._hooks = []
        self._had_state = True  # before the step that runs
        if after_each_step is None:
            self._hooks.append(readings.optimizer.register_step_pre_hook(self._look_at_state))
            self._hooks.append(readings.optimizer.register_step_post_hook(self))
        else:
            after_each_step(lambda: self(readings.optimizer, (), {}))
        self._hooks.append(readings.optimizer.register_load_state_dict_post_hook(self._count_from_state))
        self._count_from_state(readings.optimizer)

    def _count_from_state(self, optimizer: Any) -> None:
        """A resumed run is where its checkpoint was; dropped steps are not in its state."""
        steps = [
            int(state["step"]) for state in optimizer.state.values() if isinstance(state, dict) and "step" in state
        ]
        self.steps = max(steps, default=0)

    def _look_at_state(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._had_state = bool(optimizer.state)

    def remove(self) -> None:
        """Take the hooks away: nothing is logged any more. Of a DeepSpeedEngine ``every = None`` does it."""
        while self._hooks:
            self._hooks.pop().remove()

    def __call__(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if not self._had_state and inside_state_creation(optimizer.param_groups):
            return
        self.steps += 1
        if self.every is not None and self.steps % self.every == 0 and self.is_main():
            self.log()

    @abstractmethod
    def is_main(self) -> bool:
        """This process logs."""

    @abstractmethod
    def log(self) -> None:
        """Read, warn of dropped steps, and write."""
