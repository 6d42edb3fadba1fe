"""The page of the batch study, from its ledger: the tables and figures of the cells that are complete."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from am_lightning.pretrain.runtime.errors import RecipeError
from recipes.studies.ledger import Ledger
from recipes.studies.page import figure, write_page
from recipes.studies.pretraining.batch_figures import draw_gains, draw_momentum, draw_sensitivity
from recipes.studies.pretraining.batch_tables import (
    ROOM,
    finalists_table,
    momentum_table,
    name_of,
    rates_table,
    summary_table,
    tuning_table,
)
from recipes.studies.pretraining.batches import STAGES, configs, tuning_of
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


def write(ledger: Ledger, cells: Sequence[Scale], folder: Path, command: str) -> str:
    """Write ``batch.md`` and its figures into `folder`; the text of the former."""
    tunings = [tuning_of(ledger, cell) for cell in cells]
    tuned, compared, traced = (
        [tuning for tuning in tunings if _is_complete(ledger, tuning.scale, STAGES[: number + 1])]
        for number in range(3)
    )
    folder.mkdir(parents=True, exist_ok=True)
    parts = [_left(tunings, compared)]
    if compared:
        parts.append(f"## Summary\n\nMean (sd) of five seeds; w: warmup.\n\n{summary_table(compared)}")
        draw_gains(folder / "batch-gains.png", _kinds(compared))
        parts.append(figure("batch-gains.png", "AM minus AdamW over the batch"))
    if tuned:
        draw_sensitivity(folder / "batch-learning-rates.png", tuned)
        parts.append(
            figure("batch-learning-rates.png", "Validation loss over the learning rate, a panel for each cell")
        )
        parts.append(f"## The largest learning rate within {ROOM:g} of the cell's least loss\n\n{rates_table(tuned)}")
    if traced:
        draw_momentum(folder / "batch-momentum.png", next(iter(_kinds(traced).values())))
        parts.append(f"## beta_t and the gradient's noise, AM at cap 0.89\n\n{momentum_table(traced)}")
        parts.append(figure("batch-momentum.png", "beta_t over the steps, a line for each batch"))
    parts += [f"## Finalists: {name_of(tuning)}\n\n{finalists_table(tuning)}" for tuning in compared]
    parts += [f"## Tuning: {name_of(tuning)}\n\n{tuning_table(tuning)}" for tuning in tuned]
    return write_page(folder / "batch.md", "Momentum and the batch", command, ledger.made(), _PROTOCOL, parts)


def _is_complete(ledger: Ledger, cell: Scale, stages: Sequence[str]) -> bool:
    try:
        return not any(True for stage in stages for _ in configs(stage, ledger, cell))
    except RecipeError:
        return False


def _kinds(tunings: Sequence[Tuning]) -> dict[str, Sequence[Tuning]]:
    """The cells with as many steps as the first, and those with as many tokens, by batch; the first is in both."""
    first = tunings[0].scale
    kinds = {
        f"{first.steps} steps": [t for t in tunings if t.scale.steps == first.steps],
        f"{first.steps * first.batch_size} rows in all": [
            t for t in tunings if t.scale.steps * t.scale.batch_size == first.steps * first.batch_size
        ],
    }
    by_batch = {kind: sorted(found, key=lambda t: t.scale.batch_size) for kind, found in kinds.items()}
    return {kind: found for number, (kind, found) in enumerate(by_batch.items()) if number == 0 or len(found) > 1}


def _left(tunings: Sequence[Tuning], compared: Sequence[Tuning]) -> str:
    left = [name_of(tuning) for tuning in tunings if tuning not in compared]
    return "Every cell is complete." if not left else f"Not complete, so not in the summary: {'; '.join(left)}."
