"""The page of the batch study, from its ledger: the tables and figures of the cells that are complete."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from am_lightning.pretrain.runtime.errors import RecipeError
from recipes.studies.ledger import Ledger
from recipes.studies.page import figure, write_page
from recipes.studies.pretraining.batch_figures import draw_gains, draw_momentum, draw_one_cell, draw_sensitivity
from recipes.studies.pretraining.batch_tables import (
    ROOM,
    finalists_table,
    momentum_table,
    name_of,
    rates_table,
    summary_table,
    tuning_table,
)
from recipes.studies.pretraining.batches import METHODS, STAGES, missing
from recipes.studies.pretraining.stages import Scale
from recipes.studies.pretraining.tuning import CLOSE, Tuning

_PROTOCOL = (
    "The laptop recipe's Llama (0.86 M parameters, bytes, rows of 128), cosine to a tenth, weight decay 0.1, clipping"
    " at 1, beta2 0.95. In every cell each variant of each family is tuned on seed 0, over learning rates a factor of"
    f" two apart until the best lies inside, and, where it is within {CLOSE:g} of its family's best, a factor of sqrt 2"
    " around it; then the finalists meet on seeds 1 to 5, paired: same initial weights, same batches. Losses are nats"
    " per token on held-out rows after the last step. Intervals are Student's, 95 %; those of the summary, and those"
    " called corrected, hold all at once (Bonferroni)."
)


Kinds = Mapping[str, Sequence[Scale]]


def write(ledger: Ledger, kinds: Kinds, folder: Path, command: str) -> str:
    """Write ``batch.md`` and its figures into `folder`; the text of the former.

    Args:
        ledger: of the study.
        kinds: the cells of each kind (`kinds_of`).
        folder: of the page; it is made.
        command: that makes the page.
    """
    cells = list(dict.fromkeys(cell for kind in kinds.values() for cell in kind))
    tuned, compared, traced = (_complete(ledger, cells, STAGES[: number + 1]) for number in range(len(STAGES)))
    folder.mkdir(parents=True, exist_ok=True)
    parts = [_scope(cells, compared)]
    if compared:
        parts.append(f"## Summary\n\nMean (sd) of five seeds; w: warmup.\n\n{summary_table(list(compared.values()))}")
        draw_gains(folder / "batch-gains.png", _by_kind(kinds, compared))
        parts.append(figure("batch-gains.png", "AM minus AdamW over the batch"))
    if tuned:
        tunings = list(tuned.values())
        draw_sensitivity(folder / "batch-learning-rates.png", tunings)
        draw_one_cell(folder / "batch-smallest.png", tunings[0])  # docs/evidence.md begins with it
        parts.append(
            figure("batch-learning-rates.png", "Validation loss over the learning rate, a panel for each cell")
        )
        parts.append(f"## The largest learning rate within {ROOM:g} of the cell's least loss\n\n{rates_table(tunings)}")
    if traced:
        draw_momentum(folder / "batch-momentum.png", next(iter(_by_kind(kinds, traced).values())))
        table = momentum_table(list(traced.values()))
        parts.append(f"## beta_t and the gradient's noise, AM at cap 0.89\n\n{table}")
        parts.append(figure("batch-momentum.png", "beta_t over the steps, a line for each batch"))
    parts += [f"## Finalists: {name_of(tuning.scale)}\n\n{finalists_table(tuning)}" for tuning in compared.values()]
    parts += [f"## Tuning: {name_of(tuning.scale)}\n\n{tuning_table(tuning)}" for tuning in tuned.values()]
    return write_page(folder / "batch.md", "Momentum and the batch", command, ledger.made(), _PROTOCOL, parts)


def _complete(ledger: Ledger, cells: Sequence[Scale], stages: Sequence[str]) -> dict[Scale, Tuning]:
    """Of the cells whose `stages` are complete, the tuning: with all methods where those are, else with few."""
    found = {}
    for cell in cells:
        for families in METHODS.values():
            tuning = Tuning(ledger, cell, families)
            if _is_complete(tuning, stages):
                found[cell] = tuning
    return found


def _is_complete(tuning: Tuning, stages: Sequence[str]) -> bool:
    try:
        return not any(True for stage in stages for _ in missing(stage, tuning))
    except RecipeError:
        return False


def _by_kind(kinds: Kinds, found: Mapping[Scale, Tuning]) -> Mapping[str, Sequence[Tuning]]:
    """Those of the cells that were found, by kind; kinds of which there are two at least, or the first."""
    some = {kind: [found[cell] for cell in cells if cell in found] for kind, cells in kinds.items()}
    several = {kind: tunings for kind, tunings in some.items() if len(tunings) > 1}
    return several or {kind: tunings for kind, tunings in some.items() if tunings}


def _scope(cells: Sequence[Scale], compared: Mapping[Scale, Tuning]) -> str:
    """Which cells are here, and with which methods."""
    words = []
    for name, families in METHODS.items():
        here = [name_of(tuning.scale) for tuning in compared.values() if tuning.families is families]
        if here:
            words.append(f"With {name} methods: {'; '.join(here)}.")
    left = [name_of(cell) for cell in cells if cell not in compared]
    return " ".join([*words, *([f"Not complete: {'; '.join(left)}."] if left else [])])
