"""The page of the warmup study: the tables of the stages that are complete, and the figures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from am_lightning.pretrain.runtime.errors import RecipeError
from recipes.studies.ledger import Ledger
from recipes.studies.page import figure, write_page
from recipes.studies.pretraining import figures, momentum, results
from recipes.studies.pretraining.stages import Scale, configs

Table = Callable[[Ledger, Scale], str]
_TABLES: dict[str, list[tuple[str, Table]]] = {
    "sweep": [("Validation loss over the learning rate, one seed", results.sweep_table)],
    "finalists": [
        ("Fresh seeds, each method at its best learning rate", results.finalists_table),
        ("Paired differences, 95 % intervals; negative: AM is better", results.differences_table),
        ("Spikes of the training loss", results.spikes_table),
    ],
    "batch": [("A larger batch", results.batch_table)],
    "long": [("A longer run", results.long_table)],
    "beta": [
        ("beta_t by kind of layer", momentum.kinds_table),
        ("The tensors that dip most", momentum.dips_table),
        ("Ablations", momentum.ablations_table),
        ("beta_t and the batch", momentum.batch_effect),
    ],
}
_FIGURES = {
    "sweep": ("warmup-learning-rates.png", figures.draw_sweep, "Validation loss over the learning rate"),
    "finalists": ("warmup-curves.png", figures.draw_curves, "Training loss over the steps"),
    "beta": ("beta-heatmap.png", figures.draw_heatmap, "beta_t, layers by steps"),
}


def report(ledger: Ledger, scale: Scale, folder: Path, command: str) -> str:
    """Write ``warmup.md`` and the figures of the stages that are complete into `folder`; the text of the former."""
    parts = []
    for stage, tables in _TABLES.items():
        if not _is_complete(ledger, stage, scale):
            continue
        parts += [f"## {title}\n\n{table(ledger, scale)}" for title, table in tables]
        if stage in _FIGURES:
            name, draw, says = _FIGURES[stage]
            folder.mkdir(parents=True, exist_ok=True)
            draw(folder / name, ledger, scale)
            parts.append(figure(name, says))
    protocol = (
        f"Recipe {scale.recipe}, {scale.steps} steps of {scale.batch_size} rows on {scale.device}. Seed 0 picks each"
        " method's learning rate; seeds 1 to 5 (1 to 3 for the longer run, 0 and 1 for the larger batch) compare."
        " Losses are nats per token on held-out rows after the last step."
    )
    title = "Warmup, learning rates and momentum"
    return write_page(folder / "warmup.md", title, command, ledger.made(), protocol, parts)


def _is_complete(ledger: Ledger, stage: str, scale: Scale) -> bool:
    try:
        return all(config in ledger for config in configs(stage, scale, ledger))
    except RecipeError:  # a stage that needs the sweep first
        return False
