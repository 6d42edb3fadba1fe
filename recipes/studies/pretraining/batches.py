"""The protocol of the batch study: what is compared at which batch, and in what order the runs are made.

Every cell (rows of a step x steps) goes through the same two stages:

1. ``tune``: every variant of every family over its learning rates, seed 0 (`Tuning`). AdamW has twelve variants (four
   momentums x three warmups), AM nine (three caps x three warmups), so AdamW gets at least as many runs.
2. ``compare``: the best variant of each family, and the named ones, at their best learning rates on five seeds that the
   tuning has not seen. A seed gives all methods the same initial weights and the same batches.

Then ``trace``: AM's beta_t of every step and tensor, and the gradient's noise, on one fresh seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from recipes.studies.ledger import Config, Ledger
from recipes.studies.pretraining.methods import Method
from recipes.studies.pretraining.stages import Scale
from recipes.studies.pretraining.tuning import Tuning

WARMUPS = (0.0, 0.05, 0.15)
FAMILIES: dict[str, Sequence[Method]] = {
    "AdamW": tuple(Method("adamw", beta1, warmup) for beta1 in (0.9, 0.8, 0.5, 0.95) for warmup in WARMUPS),
    "AM-AdamW": tuple(Method("am", cap, warmup) for cap in (0.89, 0.8, 0.95) for warmup in WARMUPS),
    "schedule-free AdamW": tuple(Method("schedulefree", 0.9, warmup) for warmup in WARMUPS),
    "RAdam": (Method("radam", 0.9), Method("radam", 0.8)),
}
CUSTOMARY = Method("adamw", 0.9, 0.05)
DEFAULT = Method("am", 0.89)  # of the callback
FRESH_SEEDS = (1, 2, 3, 4, 5)
TRACE_CAP, TRACE_SEED, PARTS = 0.89, 1, 8  # a step's rows are split into so many parts, whose gradients are compared
STAGES = ("tune", "compare", "trace")


def cells_of(steps: int, rows: int, batches: Sequence[int]) -> list[Scale]:
    """All cells, in the order in which they are run: `rows` a step x `steps`, then each other batch at as many steps
    and at as many tokens, the smaller batches first."""
    middle = Scale(steps=steps, batch_size=rows)
    others = [replace(middle, batch_size=batch) for batch in sorted(batches) if batch != rows]
    return [middle, *(cell for other in others for cell in (other, same_tokens(other, rows * steps)))]


def same_tokens(cell: Scale, rows: int) -> Scale:
    """The cell with so many steps that it sees `rows` in all."""
    return replace(cell, steps=rows // cell.batch_size)


def tuning_of(ledger: Ledger, cell: Scale) -> Tuning:
    """The first stage of a cell."""
    return Tuning(ledger, cell, FAMILIES)


def finalists(tuning: Tuning) -> list[Method]:
    """The best of each family, and of AM and AdamW without warmup; the customary AdamW, AM's default. None twice."""
    best = [tuning.best_of(family) for family in FAMILIES.values()]
    bare = [tuning.best_of([m for m in FAMILIES[name] if not m.warmup]) for name in ("AdamW", "AM-AdamW")]
    return list(dict.fromkeys([*best, *bare, CUSTOMARY, DEFAULT]))


def configs(stage: str, ledger: Ledger, cell: Scale) -> Iterator[Config]:
    """The runs that a stage of a cell still needs, a round of them: call it until it yields none.

    Raises:
        RecipeError: a stage before it is not complete.
    """
    tuning = tuning_of(ledger, cell)
    if stage == "tune":
        yield from tuning.missing()
        return
    if stage == "compare":
        methods = finalists(tuning)
        every = [tuning.config(method, tuning.best(method), seed) for seed in FRESH_SEEDS for method in methods]
    else:
        every = [trace_config(tuning)]
    yield from (config for config in every if config not in ledger)


def trace_config(tuning: Tuning) -> Config:
    """AM at its default cap with its best warmup and learning rate, with all that is measured beside it."""
    method = tuning.best_of([m for m in FAMILIES["AM-AdamW"] if m.beta1 == TRACE_CAP])
    cell = replace(tuning.scale, micro_batch_size=tuning.scale.batch_size // PARTS)
    return Tuning(tuning.ledger, cell, FAMILIES).config(method, tuning.best(method), TRACE_SEED) | {"traces": True}
