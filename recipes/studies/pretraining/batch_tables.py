"""Tables of the batch study, from its ledger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from recipes.studies.intervals import Interval, paired
from recipes.studies.pretraining.batches import (
    CUSTOMARY,
    DEFAULT,
    FRESH_SEEDS,
    PARTS,
    best_of,
    finalists,
    trace_config,
)
from recipes.studies.pretraining.methods import Method
from recipes.studies.pretraining.momentum import EARLY, at_cap
from recipes.studies.pretraining.noise import noise_scale
from recipes.studies.pretraining.stages import Scale
from recipes.studies.pretraining.tuning import Tuning, rate_at
from recipes.studies.sweep import bold, mean_and_sd
from recipes.studies.tables import markdown

ROOM = 0.1  # nats per token above the least loss of a cell that a learning rate may cost and still count as usable


def name_of(cell: Scale) -> str:
    """A cell's name in tables."""
    return f"{cell.batch_size} rows x {cell.steps} steps"


def fresh(tuning: Tuning, method: Method) -> dict[int, float]:
    """Seed -> validation loss at the method's best learning rate, of the seeds that the tuning has not seen."""
    step = tuning.best(method)
    return {seed: tuning.value(method, step, seed) for seed in FRESH_SEEDS}


def summary_table(tunings: Sequence[Tuning]) -> str:
    """For every cell: the best AdamW and the best AM of its tuning, and AM minus AdamW on the fresh seeds; the same of
    those without warmup. Each column's intervals hold all at once."""
    rows = []
    for tuning in tunings:
        cells = [name_of(tuning.scale)]
        for warmup in (True, False):
            pair = _rivals(tuning, warmup=warmup)
            cells += [f"{_short(method)} {mean_and_sd(list(fresh(tuning, method).values()))}" for method in pair]
            cells.append(str(gain(tuning, warmup=warmup, comparisons=len(tunings))))
        rows.append(cells)
    names = ["best AdamW", "best AM-AdamW", "AM minus AdamW"]
    return markdown(["cell", *names, *(f"{name}, no warmup" for name in names)], rows)


def gain(tuning: Tuning, *, warmup: bool, comparisons: int) -> Interval:
    """The best AM minus the best AdamW, paired over the fresh seeds; without `warmup`, of those that have none."""
    adamw, ours = _rivals(tuning, warmup=warmup)
    return paired(fresh(tuning, ours), fresh(tuning, adamw), comparisons=comparisons)


def _rivals(tuning: Tuning, *, warmup: bool) -> list[Method]:
    return [best_of(tuning, family, warmup=warmup) for family in ("AdamW", "AM-AdamW")]


def finalists_table(tuning: Tuning) -> str:
    """Fresh seeds: every finalist, and the best AM minus it with a 95 % interval, alone and with those of all rows."""
    methods = finalists(tuning)
    ours = best_of(tuning, "AM-AdamW")
    losses = {method: fresh(tuning, method) for method in methods}
    rows = []
    for method in sorted(methods, key=lambda method: float(np.mean(list(losses[method].values())))):
        alone, together = (paired(losses[ours], losses[method], comparisons=m) for m in (1, len(methods) - 1))
        cells = ["", ""] if method == ours else [str(alone), f"± {together.half_width:.3f}"]
        rate = f"{rate_at(tuning.best(method)):g}"
        rows.append([str(method), rate, mean_and_sd(list(losses[method].values())), *cells])
    seeds = len(FRESH_SEEDS)
    header = ["method", "lr", f"validation loss, mean (sd) of {seeds} seeds", f"{ours} minus it", "corrected"]
    return markdown(header, rows)


def tuning_table(tuning: Tuning) -> str:
    """Validation loss of every variant at every learning rate that was tried, seed 0; the best of each in bold."""
    methods = [method for family in tuning.families.values() for method in family]
    steps = sorted({step for method in methods for step in tuning.tried(method)})
    rows = []
    for method in methods:
        tried, best = tuning.tried(method), tuning.best(method)
        rows.append([str(method), *(bold(tried[step], step == best) if step in tried else "" for step in steps)])
    return markdown(["seed 0", *(f"{rate_at(step):g}" for step in steps)], rows)


def rates_table(tunings: Sequence[Tuning]) -> str:
    """The largest learning rate that ends within ROOM of the cell's least loss of the tuning, interpolated between the
    rates that were tried: for the best of each family and the named ones."""
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
        best = (tuning.best_of(family) for family in tuning.families.values())
        least = min(tuning.value(method, tuning.best(method)) for method in best)
        found = (method if isinstance(method, Method) else best_of(tuning, method) for method in names.values())
        rows.append([name_of(tuning.scale), *(_usable(tuning, method, least + ROOM) for method in found)])
    return markdown(["cell", *names], rows)


def momentum_table(tunings: Sequence[Tuning]) -> str:
    """What beta_t did at AM's default cap, and how noisy the gradient was, in a run of each cell."""
    rows = []
    for tuning in tunings:
        result = tuning.ledger[trace_config(tuning)]
        betas, norms = np.array(result["betas"])[1:], np.array(result["noise"])
        cap, border = trace_config(tuning)["method"]["beta1"], max(1, round(EARLY * tuning.scale.steps))
        cells = [f"{at_cap(part, cap).mean():.0%}" for part in (betas[:border], betas[border:])]
        cells += [f"{part.mean():.2f}" for part in (betas[:border], betas[border:])]
        size = tuning.scale.batch_size
        scales = [noise_scale(part[:, 0], part[:, 1], size // PARTS, size) for part in (norms[:border], norms[border:])]
        rows.append([name_of(tuning.scale), *cells, *(f"{scale:.0f}" for scale in scales)])
    parts = f"first {EARLY:.0%}", "later"
    header = [
        "cell",
        *(f"{what}, {part}" for what in ("at cap", "mean beta_t", "noise scale (rows)") for part in parts),
    ]
    return markdown(header, rows)


def _usable(tuning: Tuning, method: Method, loss: float) -> str:
    rate = tuning.largest_usable(method, loss)
    beyond = rate == rate_at(max(tuning.tried(method)))  # as far as was tried
    return "none" if np.isnan(rate) else f"{'>= ' if beyond else ''}{rate:.2g}"


def _short(method: Method) -> str:
    return f"{method.beta1:g}" + (f" w{method.warmup:.0%}" if method.warmup else "")
