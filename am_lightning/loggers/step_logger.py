"""Log from hooks of the optimizer, for frameworks in which the user writes the training loop."""

from __future__ import annotations

import itertools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

from am_lightning.distributed.call_stack import inside_state_creation
from am_lightning.loggers.reader import StatsReader, prefix_of

StepHook = Callable[[Callable[[], None]], None]


def loggers_of(optimizer: Any) -> list[StepLogger]:
    """Return the loggers that are attached to ``optimizer``."""
    owners = (getattr(hook, "__self__", None) for hook in optimizer._optimizer_load_state_dict_post_hooks.values())
    return [owner for owner in owners if isinstance(owner, StepLogger)]


def free_prefix(others: Iterable[StepLogger]) -> str:
    """Return the first of am, am-1, am-2, ... that no logger in ``others`` uses."""
    taken = {other.reader.prefix for other in others}
    return next(prefix for prefix in map(prefix_of, itertools.count()) if prefix not in taken)


class StepLogger(ABC):
    """Base class of the loggers that every ``attach`` creates: a step hook that reads, warns and writes at an interval.

    A subclass decides which process writes and how (``is_main``, ``write``, ``draw``). The optimizer owns the logger.

    Attributes:
        reader: the StatsReader, which holds the values of its last reading.
        every: log interval in optimizer steps. None: nothing is logged.
        stacklevel: ``stacklevel`` of the warning about dropped steps, which points at the caller of ``step()``.
    """

    every: int | None
    stacklevel = 5

    def __init__(self, reader: StatsReader, after_each_step: StepHook | None = None) -> None:
        """Register the hooks.

        Args:
            reader: the reader of the optimizer.
            after_each_step: registers a callback with an engine that calls ``optimizer.step()`` several times in a
                training step. None: hooks of the optimizer are used.
        """
        self.reader = reader
        reader.at_end = self.finish
        self._hooks = []
        self._had_state = True  # whether the optimizer had state before the step that is running
        if after_each_step is None:
            self._hooks.append(reader.optimizer.register_step_pre_hook(self._look_at_state))
            self._hooks.append(reader.optimizer.register_step_post_hook(self))
        else:
            after_each_step(lambda: self(reader.optimizer, (), {}))
        self._hooks.append(reader.optimizer.register_load_state_dict_post_hook(self._count_from_state))
        self._counted = 0
        self._count_from_state(reader.optimizer)

    def _count_from_state(self, optimizer: Any) -> None:
        """Count steps from the optimizer's state, so that a resumed run counts from its checkpoint."""
        steps = [
            int(state["step"]) for state in optimizer.state.values() if isinstance(state, dict) and "step" in state
        ]
        before, self._counted = self._counted, max(steps, default=0)
        if self._counted != before:  # steps since the last reading do not belong to the resumed run
            self.reader.begin(self.steps)

    @property
    def steps(self) -> int:
        """Number of ``step()`` calls, including those before a resume.

        Steps dropped before the resume are included only if the reader's state was loaded too.
        """
        return self._counted + self.reader.skipped_at_load

    def _look_at_state(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._had_state = bool(optimizer.state)

    def remove(self) -> None:
        """Remove the hooks, which stops the logging. With a DeepSpeedEngine, set ``every = None`` instead."""
        while self._hooks:
            self._hooks.pop().remove()

    def __call__(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if not self._had_state and inside_state_creation(optimizer.param_groups):
            return
        self._counted += 1
        if self.every is not None and self.steps % self.every == 0 and self.is_main():
            self._log()

    def _log(self) -> None:
        self.reader.read(self.steps)
        if self.reader.newly_skipped():
            warnings.warn(self.reader.skip_warning(), stacklevel=self.stacklevel)
        self.write()

    def finish(self) -> str:
        """See ``StatsReader.finish``."""
        if not self.is_main():
            return ""
        self.draw()
        return self.reader.sentence(self.steps)

    @abstractmethod
    def draw(self) -> None:
        """Write the heat map of the run up to ``steps``."""

    @abstractmethod
    def is_main(self) -> bool:
        """Return whether this process writes."""

    @abstractmethod
    def write(self) -> None:
        """Write the values of the reader's last reading at ``steps``."""
