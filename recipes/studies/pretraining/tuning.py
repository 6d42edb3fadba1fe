"""Tuning of learning rates on one seed: a grid of factors of two that grows until the best lies inside, then finer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

from am_lightning.pretrain.runtime.errors import RecipeError
from recipes.studies.ledger import Config, Ledger
from recipes.studies.pretraining.methods import Method
from recipes.studies.pretraining.run import Scale
from recipes.studies.sweep import Sweep

Families = Mapping[str, Sequence[Method]]  # variants of each family by its name
RATES = tuple(float(f"{1e-3 * 2 ** (step / 2):.3g}") for step in range(-6, 13))  # 1.25e-4 to 6.4e-2
COARSE = RATES[::2]
START = COARSE[2:6]  # 5e-4, 1e-3, 2e-3, 4e-3
# Nats per token: a variant this close to the best of its family, or of those without warmup if it has none, is
# tuned in factors of sqrt(2).
CLOSE = 0.05


def without_warmup(methods: Sequence[Method]) -> list[Method]:
    """Return the methods that have no warmup."""
    return [method for method in methods if not method.warmup]


class Tuning(Sweep[Method]):
    """The learning rates that were tried at one scale, and the next ones.

    Args:
        ledger: ledger of the finished runs.
        scale: batch and steps.
        families: variants of each family by its name. All variants of all families are tuned by the same rule.
    """

    def __init__(self, ledger: Ledger, scale: Scale, families: Families) -> None:
        methods = [method for family in families.values() for method in family]
        super().__init__(ledger, methods, lambda method: RATES, scale.config, "val_loss", "validation loss")
        self.scale, self.families = scale, families

    def missing(self) -> Iterator[Config]:
        """Yield the runs of the next round, and nothing if all learning rates are tuned.

        A round is a function of the runs that are in the ledger, so an interrupted study makes the same choices.
        """
        for family in self.families.values():
            rates = [(method, lr) for method in family for lr in self._coarse(method)]
            if not rates:
                groups = (family, without_warmup(family))
                close = dict.fromkeys(near for group in groups for near in self.near_best(group, CLOSE, fine=False))
                rates = [(method, lr) for method in close for lr in self._fine(method)]
            yield from (self.config(method, lr, self.sweep_seed) for method, lr in rates)

    def best_rate(self, method: Method, *, fine: bool = True) -> float:
        """Return the learning rate with the lowest loss; without ``fine``, of those that are factors of two apart.

        Raises:
            RecipeError: if no learning rate was tried.
        """
        tried = {lr: loss for lr, loss in self.tried(method).items() if fine or lr in COARSE}
        if not tried:
            raise RecipeError(f"no run of {method} at {self.scale} yet")
        return min(tried, key=lambda lr: tried[lr])

    def best_loss(self, method: Method, *, fine: bool = True) -> float:
        """Return the loss at `best_rate`."""
        return self.tried(method)[self.best_rate(method, fine=fine)]

    def best_of(self, methods: Sequence[Method]) -> Method:
        """Return the variant with the lowest loss at its best learning rate."""
        return min(methods, key=self.best_loss)

    def near_best(self, methods: Sequence[Method], margin: float, *, fine: bool = True) -> list[Method]:
        """Return the variants whose loss at their best learning rate is within `margin` of the lowest."""
        losses = {method: self.best_loss(method, fine=fine) for method in methods}
        return [method for method, loss in losses.items() if loss <= min(losses.values()) + margin]

    def largest_usable(self, method: Method, loss: float) -> float:
        """Return the largest learning rate that ends at ``loss`` or lower, interpolated between those that were tried.

        The result is the largest rate that was tried if it does, and nan if none does.
        """
        tried = list(self.tried(method).items())
        if tried[-1][1] <= loss:
            return tried[-1][0]
        for (low, before), (high, after) in reversed(list(pairwise(tried))):
            if before <= loss:
                share = (loss - before) / (after - before) if math.isfinite(after) else 0.0
                return low * float((high / low) ** share)
        return math.nan

    def _coarse(self, method: Method) -> Sequence[float]:
        """Return the rates that have to be tried before the best is known to lie inside the coarse grid."""
        tried = [lr for lr in self.tried(method) if lr in COARSE]
        if first := [lr for lr in START if lr not in tried]:
            return first
        place = COARSE.index(self.best_rate(method, fine=False))
        if COARSE[place] == tried[0]:
            return COARSE[:place][-1:]
        return COARSE[place + 1 :][:1] if COARSE[place] == tried[-1] else ()

    def _fine(self, method: Method) -> list[float]:
        place, tried = RATES.index(self.best_rate(method, fine=False)), self.tried(method)
        return [lr for lr in RATES[max(0, place - 1) : place + 2] if lr not in tried]
