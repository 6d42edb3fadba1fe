"""The page of the batch study, from its ledger: the cells that are complete."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from recipes.studies.ledger import Ledger
from recipes.studies.page import write_page
from recipes.studies.pretraining.batches import FAMILIES, configs, tuning_of
from recipes.studies.pretraining.stages import Scale
from recipes.studies.pretraining.tuning import Tuning, rate_at
from recipes.studies.tables import markdown


def write(ledger: Ledger, cells: Sequence[Scale], folder: Path, command: str) -> str:
    """Write ``batch.md`` into `folder`; its text."""
    parts = []
    for cell in cells:
        if any(configs("tune", ledger, cell)):
            continue
        parts.append(f"## {cell.batch_size} rows, {cell.steps} steps\n\n{tuning_table(tuning_of(ledger, cell))}")
    return write_page(folder / "batch.md", "Momentum and the batch", command, ledger.made(), "", parts)


def tuning_table(tuning: Tuning) -> str:
    """Validation loss of every variant at every learning rate that was tried, seed 0; the best of each in bold."""
    methods = [method for family in FAMILIES.values() for method in family]
    steps = sorted({step for method in methods for step in tuning.tried(method)})
    rows = []
    for method in methods:
        tried, best = tuning.tried(method), tuning.best(method)
        cells = ["" if s not in tried else f"**{tried[s]:.3f}**" if s == best else f"{tried[s]:.3f}" for s in steps]
        rows.append([str(method), *cells])
    return markdown(["seed 0", *(f"{rate_at(step):g}" for step in steps)], rows)
