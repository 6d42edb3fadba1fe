"""Logging from inside an optimizer, for frameworks whose training loop is the user's own."""

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
    """Those that an optimizer owns."""
    owners = (getattr(hook, "__self__", None) for hook in optimizer._optimizer_load_state_dict_post_hooks.values())
    return [owner for owner in owners if isinstance(owner, StepLogger)]


def free_prefix(others: Iterable[StepLogger]) -> str:
    """The first of am, am-1, am-2, ... that none of the other loggers of the same place writes under."""
    taken = {other.reader.prefix for other in others}
    return next(prefix for prefix in map(prefix_of, itertools.count()) if prefix not in taken)


class StepLogger(ABC):
    """What every ``attach`` makes: a hook that counts training steps, and at the interval reads, warns and writes.

    A framework says which process writes, and how (``is_main``, ``write``). The optimizer owns the logger.

    Attributes:
        reader: what was read last.
        every: interval in optimizer steps; None: nothing is logged.
        stacklevel: of the warning of dropped steps, up to whoever calls ``step()``.
    """

    every: int | None
    stacklevel = 5

    def __init__(self, reader: StatsReader, after_each_step: StepHook | None = None) -> None:
        """``after_each_step``: registers what an engine calls that steps the optimizer several times in a step."""
        self.reader = reader
        reader.at_end = self.finish
        self._hooks = []
        self._had_state = True  # before the step that runs
        if after_each_step is None:
            self._hooks.append(reader.optimizer.register_step_pre_hook(self._look_at_state))
            self._hooks.append(reader.optimizer.register_step_post_hook(self))
        else:
            after_each_step(lambda: self(reader.optimizer, (), {}))
        self._hooks.append(reader.optimizer.register_load_state_dict_post_hook(self._count_from_state))
        self._counted = 0
        self._count_from_state(reader.optimizer)

    def _count_from_state(self, optimizer: Any) -> None:
        """A resumed run is where its checkpoint was."""
        steps = [
            int(state["step"]) for state in optimizer.state.values() if isinstance(state, dict) and "step" in state
        ]
        before, self._counted = self._counted, max(steps, default=0)
        if self._counted != before:  # those since the last reading are not of the run that goes on
            self.reader.begin(self.steps)

    @property
    def steps(self) -> int:
        """Calls of ``step()`` so far, with those before a resume: dropped ones only where the reader resumed too."""
        return self._counted + self.reader.skipped_at_load

    def _look_at_state(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._had_state = bool(optimizer.state)

    def remove(self) -> None:
        """Take the hooks away: nothing is logged any more. Of a DeepSpeedEngine ``every = None`` does it."""
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
        """Show the picture of the run up to ``steps``."""

    @abstractmethod
    def is_main(self) -> bool:
        """This process writes."""

    @abstractmethod
    def write(self) -> None:
        """Write what ``reader`` has read, at ``steps``."""
