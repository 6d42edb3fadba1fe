"""The page of the batch study, from its ledger: tables and figures of the cells that are complete."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from recipes.studies.ledger import Ledger
from recipes.studies.page import write_page
from recipes.studies.pretraining.batch_figures import draw_gains, draw_momentum, draw_one_cell, draw_sensitivity
from recipes.studies.pretraining.batch_tables import (
    ROOM,
    finalists_table,
    layers_table,
    momentum_table,
    pairs_table,
    rates_table,
    summary_table,
)
from recipes.studies.pretraining.batches import METHODS, NEAR, STAGES, missing, traceable
from recipes.studies.pretraining.run import Scale
from recipes.studies.pretraining.tuning import CLOSE, Tuning

_PROTOCOL = (
    "The laptop recipe's Llama (0.86 M parameters, bytes, rows of 128), cosine to a tenth, weight decay 0.1, clipping"
    " at 1, beta2 0.95. In every cell each variant of each family is tuned on seed 0, over learning rates a factor of"
    f" two apart until the best lies inside, and, where it is within {CLOSE:g} of the best of its family, or without"
    " warmup of the best without warmup, a factor of sqrt 2 around it. Then the best of each family, all that are"
    f" within {NEAR:g} of it, and the named methods are compared on seeds 1 to 5, in pairs with the same initial"
    " weights and batches."
    " Losses are nats per token on held-out rows after the last step. Intervals are Student's, 95 %; those of the"
    " summary, for all cells that are planned, and those called corrected hold all at once (Bonferroni). Five methods"
    " are AdamW and AM at 0.8, with a warmup of 15 % and without one, and AdamW 0.65 without one. Few methods are"
    " without beta1 0.65 and 0.95, cap 0.95, a warmup of 15 % and RAdam 0.8; warm methods are without beta1 0.5 and"
    " 0.95, cap 0.95, a warmup of 5 % (except AdamW 0.9), AdamW 0.9 without a warmup, schedule-free with less than"
    " 15 %, and RAdam 0.9."
)

Kinds = Mapping[str, Sequence[Scale]]


def write(ledger: Ledger, kinds: Kinds, folder: Path, command: str) -> str:
    """Write ``batch.md`` and its figures into `folder`, and return the text of the page.

    Args:
        ledger: ledger of the study.
        kinds: cells of each kind (`kinds_of`).
        folder: folder of the page. It is created.
        command: command that makes the page.
    """
    cells = list(dict.fromkeys(cell for kind in kinds.values() for cell in kind))
    tuned, compared, traced = (_complete(ledger, cells, STAGES[: number + 1]) for number in range(len(STAGES)))
    traced = {cell: tuning for cell, tuning in traced.items() if traceable(tuning)}
    comparisons = 2 * len(cells)  # two for each cell, complete or not: with any warmup, and without
    folder.mkdir(parents=True, exist_ok=True)
    parts = [_scope(cells, compared)]
    if compared:
        table = summary_table(list(compared.values()), comparisons)
        parts.append(f"## Summary\n\nMean (sd) of five seeds; w: warmup.\n\n{table}")
        draw_gains(folder / "batch-gains.png", _by_kind(kinds, compared), comparisons)
        parts.append("![AM minus AdamW over the batch](batch-gains.png)")
        table = pairs_table(list(compared.values()), comparisons)
        planned = "In parentheses: corrected as the summary is. All that it does not have were chosen afterwards."
        parts.append(f"## Pairs\n\n{planned}\n\n{table}")
    if tuned:
        tunings = list(tuned.values())
        draw_sensitivity(folder / "batch-learning-rates.png", tunings)
        draw_one_cell(folder / "batch-smallest.png", tunings[0])  # for docs/evidence.md
        parts.append("![Validation loss over the learning rate, a panel for each cell](batch-learning-rates.png)")
        parts.append(f"## The largest learning rate within {ROOM:g} of the lowest loss\n\n{rates_table(tunings)}")
    if traced:
        alike = next(iter(_by_kind(kinds, traced).values()))
        draw_momentum(folder / "batch-momentum.png", alike)
        table = momentum_table(list(traced.values()))
        parts.append(f"## beta_t and the gradient's noise\n\nAM at cap 0.89 with its best warmup, seed 1.\n\n{table}")
        parts.append("![beta_t over the steps, a line for each batch](batch-momentum.png)")
        parts.append(f"Share of beta_t at the cap in the figure's runs, by kind of layer.\n\n{layers_table(alike)}")
    parts += [f"## Finalists: {tuning.scale}\n\n{finalists_table(tuning)}" for tuning in compared.values()]
    parts += [f"## Tuning: {tuning.scale}\n\n{tuning.sweep_table()}" for tuning in tuned.values()]
    return write_page(folder / "batch.md", "Momentum and the batch", command, ledger.made(), _PROTOCOL, parts)


def _complete(ledger: Ledger, cells: Sequence[Scale], stages: Sequence[str]) -> dict[Scale, Tuning]:
    """Return the tuning of each cell whose `stages` are complete, with the longest list of methods."""
    found = {}
    for cell in cells:
        for families in METHODS.values():
            tuning = Tuning(ledger, cell, families)
            if all(tuning.has_all(missing(stage, tuning)) for stage in stages):
                found[cell] = tuning
    return found


def _by_kind(kinds: Kinds, found: Mapping[Scale, Tuning]) -> Mapping[str, Sequence[Tuning]]:
    """Return the found cells by kind: the kinds with two cells or more, or all kinds if there are none."""
    some = {kind: [found[cell] for cell in cells if cell in found] for kind, cells in kinds.items()}
    several = {kind: tunings for kind, tunings in some.items() if len(tunings) > 1}
    return several or {kind: tunings for kind, tunings in some.items() if tunings}


def _scope(cells: Sequence[Scale], compared: Mapping[Scale, Tuning]) -> str:
    """Return which cells the page has, and with which methods."""
    words = []
    for name, families in METHODS.items():
        here = [str(tuning.scale) for tuning in compared.values() if tuning.families is families]
        if here:
            words.append(f"With {name} methods: {'; '.join(here)}.")
    left = [str(cell) for cell in cells if cell not in compared]
    return " ".join([*words, *([f"Not complete: {'; '.join(left)}."] if left else [])])
