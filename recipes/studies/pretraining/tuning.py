"""Tuning of learning rates on one seed: a grid of factors of two that grows until the best lies inside, then finer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from am_lightning.pretrain.runtime.errors import RecipeError
from recipes.studies.ledger import Config, Ledger
from recipes.studies.pretraining.methods import Method
from recipes.studies.pretraining.stages import Scale

SEED = 0
START = (-2, 0, 2, 4)  # steps of sqrt(2) from 1e-3: 5e-4, 1e-3, 2e-3, 4e-3
LIMITS = (-6, 12)  # 1.25e-4 and 6.4e-2
CLOSE = 0.05  # nats per token: what lies as near to the best of its family is tuned in factors of sqrt(2)


def rate_at(step: int) -> float:
    """The learning rate ``step`` factors of sqrt(2) above 1e-3, in three digits."""
    return float(f"{1e-3 * 2 ** (step / 2):.3g}")


@dataclass(frozen=True)
class Tuning:
    """The learning rates that were tried at one scale, and those that come next.

    Attributes:
        ledger: of the finished runs.
        scale: batch and steps.
        families: name -> its variants. All variants of all families are tuned by the same rule.
    """

    ledger: Ledger
    scale: Scale
    families: Mapping[str, Sequence[Method]]

    def missing(self) -> Iterator[Config]:
        """The runs of the next round; nothing when all learning rates are tuned.

        A round is a function of the runs that are in the ledger, so an interrupted study makes the same choices.
        """
        coarse = {method: self._coarse(method) for family in self.families.values() for method in family}
        for family in self.families.values():
            for method in family:
                yield from (self.config(method, step) for step in coarse[method])
            if any(coarse[method] for method in family):
                continue
            best = min(self.value(method, self.best(method, fine=False)) for method in family)
            for method in family:
                step = self.best(method, fine=False)
                if self.value(method, step) <= best + CLOSE:
                    yield from (self.config(method, s) for s in (step - 1, step + 1) if not self._has(method, s))

    def tried(self, method: Method) -> dict[int, float]:
        """Step of the grid -> validation loss, in order; inf where the run diverged."""
        every = range(LIMITS[0], LIMITS[1] + 1)
        return {step: self.value(method, step) for step in every if self._has(method, step)}

    def best(self, method: Method, *, fine: bool = True) -> int:
        """The step of the grid with the least loss; without ``fine``, of those that are factors of two apart.

        Raises:
            RecipeError: no learning rate was tried.
        """
        tried = {step: loss for step, loss in self.tried(method).items() if fine or step % 2 == 0}
        if not tried:
            raise RecipeError(f"no run of {method} at {self.scale.batch_size} rows x {self.scale.steps} steps yet")
        return min(tried, key=lambda step: tried[step])

    def best_of(self, methods: Sequence[Method]) -> Method:
        """The variant with the least loss at its best learning rate."""
        return min(methods, key=lambda method: self.value(method, self.best(method)))

    def largest_usable(self, method: Method, loss: float) -> float:
        """The largest learning rate that ends no higher than at ``loss``, interpolated between those that were tried.

        The largest that was tried, if that still does; nan if none does.
        """
        tried = [(rate_at(step), value) for step, value in self.tried(method).items()]
        if tried[-1][1] <= loss:
            return tried[-1][0]
        for (low, before), (high, after) in reversed(list(pairwise(tried))):
            if before <= loss:
                share = (loss - before) / (after - before) if math.isfinite(after) else 0.0
                return low * float((high / low) ** share)
        return math.nan

    def config(self, method: Method, step: int, seed: int = SEED) -> Config:
        """A run at a step of the grid."""
        return self.scale.config(method, rate_at(step), seed)

    def value(self, method: Method, step: int, seed: int = SEED) -> float:
        """The validation loss of a run that is in the ledger; inf where it diverged."""
        value = self.ledger[self.config(method, step, seed)]["val_loss"]
        return math.inf if value is None else float(value)

    def _has(self, method: Method, step: int) -> bool:
        return self.config(method, step) in self.ledger

    def _coarse(self, method: Method) -> list[int]:
        """Steps, factors of two apart, that have to be tried before the best is known to lie inside the grid."""
        first = [step for step in START if not self._has(method, step)]
        if first:
            return first
        steps = [step for step in self.tried(method) if step % 2 == 0]
        best = self.best(method, fine=False)
        beyond = [steps[0] - 2] if best == steps[0] else [steps[-1] + 2] if best == steps[-1] else []
        return [step for step in beyond if LIMITS[0] <= step <= LIMITS[1]]
