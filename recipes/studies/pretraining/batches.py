"""The protocol of the batch study: what is compared at which batch, and in what order the runs are made.

Every cell (rows of a step x steps) goes through the same two stages:

1. ``tune``: every variant of every family over its learning rates, seed 0 (`Tuning`). In ``few``, AdamW has six
   variants (three momentums x two warmups) and AM has four (two caps x two warmups). In ``all``, AdamW has fifteen
   (five x three) and AM nine (three x three). ``warm`` is for cells that are too expensive for ``all``: a warmup of
   15 % or none, and AdamW 0.9 with 5 %; AdamW has six variants and AM four. ``five`` has AM and AdamW at 0.8, with a
   warmup of 15 % and without one, and AdamW 0.65 without one. So AdamW gets at least as many runs. ``all`` continues
   from the shorter lists.
2. ``compare``: the best variant of each family, those within NEAR of it, the same of the shorter lists, and the named
   ones, at their best learning rates on five seeds that the tuning has not seen. A seed gives all methods the same
   initial weights and batches.

Then ``trace``: AM's beta_t of every step and tensor, and the gradient's noise, on one fresh seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from recipes.studies.ledger import Config
from recipes.studies.pretraining.methods import Method
from recipes.studies.pretraining.run import Scale
from recipes.studies.pretraining.tuning import Families, Tuning, without_warmup

WARMUPS = (0.0, 0.05, 0.15)
# Chosen when the other cells were known, for those that cost most: the best momentum with the longest warmup.
FOUR: Families = {
    "AdamW": tuple(Method("adamw", 0.8, warmup) for warmup in (0.15, 0.0)),
    "AM-AdamW": tuple(Method("am", 0.8, warmup) for warmup in (0.15, 0.0)),
}
FIVE: Families = {**FOUR, "AdamW": (*FOUR["AdamW"], Method("adamw", 0.65))}  # its best momentum without a warmup
FEW: Families = {
    "AdamW": tuple(Method("adamw", beta1, warmup) for beta1 in (0.9, 0.8, 0.5) for warmup in (0.0, 0.05)),
    "AM-AdamW": tuple(Method("am", cap, warmup) for cap in (0.89, 0.8) for warmup in (0.0, 0.05)),
    "schedule-free AdamW": tuple(Method("schedulefree", 0.9, warmup) for warmup in (0.0, 0.05)),
    "RAdam": (Method("radam", 0.9),),
}
# Chosen after 8 and 32 rows: the longest warmup or none, AdamW's and AM's two best momentums, the customary beta1.
WARM: Families = {
    "AdamW": (
        *(Method("adamw", 0.9, warmup) for warmup in (0.05, 0.15)),
        *(Method("adamw", beta1, warmup) for beta1 in (0.8, 0.65) for warmup in (0.0, 0.15)),
    ),
    "AM-AdamW": tuple(Method("am", cap, warmup) for cap in (0.89, 0.8) for warmup in (0.0, 0.15)),
    "schedule-free AdamW": (Method("schedulefree", 0.9, 0.15),),
    "RAdam": (Method("radam", 0.8),),
}
ALL: Families = {
    "AdamW": tuple(Method("adamw", beta1, warmup) for beta1 in (0.9, 0.8, 0.65, 0.5, 0.95) for warmup in WARMUPS),
    "AM-AdamW": tuple(Method("am", cap, warmup) for cap in (0.89, 0.8, 0.95) for warmup in WARMUPS),
    "schedule-free AdamW": tuple(Method("schedulefree", 0.9, warmup) for warmup in WARMUPS),
    "RAdam": (Method("radam", 0.9), Method("radam", 0.8)),
}
METHODS = {"five": FIVE, "few": FEW, "warm": WARM, "all": ALL}
CUSTOMARY = Method("adamw", 0.9, 0.05)
DEFAULT = Method("am", 0.89)  # the callback's default
NEAR = 0.02  # nats per token: one seed cannot decide between variants this close together
TRACE_CAP, TRACE_SEED = 0.89, 1
PARTS = 8  # micro-batches of a traced step, whose gradients are compared
STAGES = ("tune", "compare", "trace")


def kinds_of(steps: int, rows: int, batches: Sequence[int]) -> dict[str, list[Scale]]:
    """Return the cells of each kind, by batch: equal steps, and as many tokens as `steps` steps of `rows` rows have."""
    return {
        f"{steps} steps": [Scale(steps=steps, batch_size=batch) for batch in sorted(batches)],
        f"{steps * rows} rows in all": [
            Scale(steps=steps * rows // batch, batch_size=batch) for batch in sorted(batches)
        ],
    }


def finalists(tuning: Tuning) -> list[Method]:
    """Return the best of each family and those near it, AM and AdamW also without warmup, and the named methods.

    Those of the shorter lists are among them, so that a cell whose other methods are added later keeps its rows.
    """
    rivals = [tuning.families[name] for name in ("AdamW", "AM-AdamW")]
    groups = [*tuning.families.values(), *map(without_warmup, rivals)]
    shorter = [[method for family in families.values() for method in family] for families in METHODS.values()]
    groups += [[method for method in group if method in methods] for methods in shorter for group in groups]
    best = [method for group in groups if group for method in tuning.near_best(group, NEAR)]
    named = [method for method in (CUSTOMARY, DEFAULT) if method in tuning.methods]
    return list(dict.fromkeys([*best, *named]))


def best_of(tuning: Tuning, family: str, *, warmup: bool = True) -> Method:
    """Return the best variant of a family; without `warmup`, of the variants that have none."""
    methods = tuning.families[family]
    return tuning.best_of(methods if warmup else without_warmup(methods))


def leader(tuning: Tuning, name: Method | str) -> Method | None:
    """Return a method or the best variant of a family, or None if it is not among the methods."""
    if isinstance(name, Method):
        return name if name in tuning.methods else None
    return best_of(tuning, name) if name in tuning.families else None


def missing(stage: str, tuning: Tuning) -> Iterator[Config]:
    """Yield a round of the runs that a stage of a cell still needs. Call it until it yields none.

    Raises:
        RecipeError: if a stage before it is not complete.
    """
    if stage == "tune":
        yield from tuning.missing()
    elif stage == "compare" or traceable(tuning):
        runs = tuning.finalist_configs(finalists(tuning)) if stage == "compare" else [trace_config(tuning)]
        yield from (config for config in runs if config not in tuning.ledger)


def traceable(tuning: Tuning) -> list[Method]:
    """Return AM's variants at its default cap, the best of which is traced. ``five`` has none."""
    return [method for method in tuning.families["AM-AdamW"] if method.beta1 == TRACE_CAP]


def trace_config(tuning: Tuning) -> Config:
    """Return the run of AM at its default cap, best warmup and learning rate, with beta_t and the noise recorded."""
    method = tuning.best_of(traceable(tuning))
    cell = replace(tuning.scale, micro_batch_size=tuning.scale.batch_size // PARTS)
    return cell.config(method, tuning.best_rate(method), TRACE_SEED, traces=True)
