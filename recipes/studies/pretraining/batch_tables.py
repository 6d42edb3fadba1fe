"""Tables of the batch study, from its ledger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from recipes.studies.page import markdown
from recipes.studies.pretraining.batches import (
    CUSTOMARY,
    DEFAULT,
    PARTS,
    TRACE_CAP,
    best_of,
    finalists,
    leader,
    trace_config,
)
from recipes.studies.pretraining.methods import Method
from recipes.studies.pretraining.results import EARLY, EARLY_AND_LATE, by_kind, early_and_late
from recipes.studies.pretraining.run import noise_scale
from recipes.studies.pretraining.tuning import Tuning
from recipes.studies.sweep import Interval, difference, mean_and_sd, paired

ROOM = 0.1  # nats per token that a usable learning rate may end above the lowest loss of a cell

# The differences that docs/evidence.md speaks of, which were chosen after results had been seen.
PAIRS = (
    *((Method("am", 0.8, warmup), Method("adamw", 0.8, warmup)) for warmup in (0.15, 0.05, 0.0)),
    (Method("am", 0.8, 0.05), Method("adamw", 0.8, 0.15)),
    (Method("am", 0.8), Method("adamw", 0.5)),
    (Method("am", 0.8), Method("adamw", 0.65)),
    (Method("am", 0.8), Method("adamw", 0.8, 0.05)),
    (Method("am", 0.8), Method("adamw", 0.8, 0.15)),
    (Method("am", 0.8), Method("radam", 0.8)),
    (Method("am", 0.8, 0.15), Method("radam", 0.8)),
    (Method("am", 0.8, 0.15), Method("schedulefree", 0.9, 0.15)),
    (DEFAULT, CUSTOMARY),
    (DEFAULT, Method("adamw", 0.65)),
    (DEFAULT, Method("adamw", 0.8)),
    (DEFAULT, Method("adamw", 0.8, 0.15)),
    (DEFAULT, Method("am", 0.8)),
    (Method("am", 0.89, 0.15), Method("am", 0.8, 0.15)),
    (Method("am", 0.89, 0.15), Method("adamw", 0.8, 0.15)),
    *(
        (Method(kind, beta1, warmup), Method(kind, beta1, shorter))
        for kind, beta1 in (("am", 0.8), ("am", 0.89), ("adamw", 0.8), ("adamw", 0.65))
        for warmup, shorter in ((0.15, 0.0), (0.15, 0.05), (0.05, 0.0))
    ),
)


def summary_table(tunings: Sequence[Tuning], comparisons: int) -> str:
    """Return the best AdamW, the best AM and their difference on the fresh seeds for each cell, also without warmup.

    Args:
        tunings: the cells that are complete.
        comparisons: number of intervals that are corrected together, including those of cells that are not complete.
    """
    rows = []
    for tuning in tunings:
        cells = [str(tuning.scale)]
        for warmup in (True, False):
            pair = _rivals(tuning, warmup=warmup)
            cells += [f"{_short(method)} {mean_and_sd(tuning.fresh(method).values())}" for method in pair]
            cells.append(str(gain(tuning, warmup=warmup, comparisons=comparisons)))
        rows.append(cells)
    names = ["best AdamW", "best AM-AdamW", "AM minus AdamW"]
    return markdown(["cell", *names, *(f"{name}, no warmup" for name in names)], rows)


def gain(tuning: Tuning, *, warmup: bool, comparisons: int) -> Interval:
    """Return the best AM minus the best AdamW, paired over the fresh seeds; without `warmup`, the best without it."""
    adamw, ours = _rivals(tuning, warmup=warmup)
    return paired(tuning.fresh(ours), tuning.fresh(adamw), comparisons=comparisons)


def _rivals(tuning: Tuning, *, warmup: bool) -> list[Method]:
    return [best_of(tuning, family, warmup=warmup) for family in ("AdamW", "AM-AdamW")]


def finalists_table(tuning: Tuning) -> str:
    """Return each finalist's loss, and the loss of the best and of the default AM minus it, with 95 % intervals.

    Each interval is given uncorrected, and corrected for the number of intervals in its column.
    """
    methods = finalists(tuning)
    ours = [method for method in dict.fromkeys([best_of(tuning, "AM-AdamW"), DEFAULT]) if method in methods]
    losses = {method: tuning.fresh(method) for method in methods}
    rows = []
    for method in sorted(methods, key=lambda method: float(np.mean(list(losses[method].values())))):
        cells = []
        for am in ours:
            alone, together = (paired(losses[am], losses[method], comparisons=m) for m in (1, len(methods) - 1))
            cells += ["", ""] if method == am else [str(alone), f"± {together.half_width:.3f}"]
        rows.append([str(method), f"{tuning.best_rate(method):g}", mean_and_sd(losses[method].values()), *cells])
    seeds = len(tuning.fresh_seeds)
    header = ["method", "lr", f"{tuning.unit}, mean (sd) of {seeds} seeds"]
    return markdown([*header, *(title for am in ours for title in (f"{am} minus it", "corrected"))], rows)


def pairs_table(tunings: Sequence[Tuning], comparisons: int) -> str:
    """Return the differences of PAIRS on the fresh seeds of each cell in which both are finalists.

    Args:
        tunings: the cells that are complete.
        comparisons: number of intervals that are corrected together in the widths in parentheses.
    """
    losses = [{method: tuning.fresh(method) for method in finalists(tuning)} for tuning in tunings]
    rows = []
    for first, second in PAIRS:
        cells = [
            difference(found[first], found[second], comparisons=comparisons) if {first, second} <= found.keys() else ""
            for found in losses
        ]
        if any(cells):
            rows.append([f"{first} minus {second}", *cells])
    return markdown(["difference", *(str(tuning.scale) for tuning in tunings)], rows)


def rates_table(tunings: Sequence[Tuning]) -> str:
    """Return the largest learning rate that ends within ROOM of the lowest loss, interpolated between the rates.

    Each cell has two rows: the lowest loss is that of the cell, or that of the method itself. The columns are the best
    variant of each family and the named methods.
    """
    names: Mapping[str, Method | str] = {
        str(CUSTOMARY): CUSTOMARY,
        "best AdamW": "AdamW",
        str(DEFAULT): DEFAULT,
        "best AM-AdamW": "AM-AdamW",
        "best schedule-free AdamW": "schedule-free AdamW",
        "best RAdam": "RAdam",
    }
    rows = []
    for tuning in tunings:
        lowest = min(map(tuning.best_loss, tuning.methods))
        found = [leader(tuning, name) for name in names.values()]
        rows.append([f"{tuning.scale}, of the cell", *(_usable(tuning, each, lowest) for each in found)])
        own = (_usable(tuning, each, tuning.best_loss(each)) if each else "" for each in found)
        rows.append([f"{tuning.scale}, of the method", *own])
    return markdown(["cell, and whose lowest loss", *names], rows)


def momentum_table(tunings: Sequence[Tuning]) -> str:
    """Return beta_t at AM's default cap and the noise of the gradient, in a run of each cell."""
    rows = []
    for tuning in tunings:
        result, border, size = tuning.ledger[trace_config(tuning)], _early(tuning), tuning.scale.batch_size
        norms = np.array(result["noise"])
        cells = early_and_late(np.array(result["betas"])[1:], TRACE_CAP, border)
        scales = [noise_scale(part[:, 0], part[:, 1], size // PARTS, size) for part in (norms[:border], norms[border:])]
        rows.append([str(tuning.scale), *cells, *(f"{scale:.0f}" for scale in scales)])
    columns = ("at cap", "mean beta_t", "noise scale (rows)")
    return markdown(["cell", *(f"{name}, {part}" for name in columns for part in EARLY_AND_LATE)], rows)


def layers_table(tunings: Sequence[Tuning]) -> str:
    """Return the share of beta_t at the cap in each kind of layer, in the run of `momentum_table`."""
    header = ["kind"]
    shares: dict[str, list[str]] = {}
    for tuning in tunings:
        result = tuning.ledger[trace_config(tuning)]
        header += [f"{tuning.scale.batch_size} rows, {part}" for part in EARLY_AND_LATE]
        for kind, betas in by_kind(result["names"], np.array(result["betas"])[1:]).items():
            shares.setdefault(kind, [kind]).extend(early_and_late(betas, TRACE_CAP, _early(tuning))[:2])
    return markdown(header, list(shares.values()))


def _early(tuning: Tuning) -> int:
    return max(1, round(EARLY * tuning.scale.steps))


def _usable(tuning: Tuning, method: Method | None, lowest: float) -> str:
    if method is None:
        return ""
    lr = tuning.largest_usable(method, lowest + ROOM)
    beyond = lr == max(tuning.tried(method))
    return "none" if np.isnan(lr) else f"{'>= ' if beyond else ''}{lr:.2g}"


def _short(method: Method) -> str:
    return f"{method.beta1:g}" + (f" w{method.warmup:.0%}" if method.warmup else "")
