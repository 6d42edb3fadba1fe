r"""Whether AM's gain holds for a larger model: AM-AdamW and AdamW at beta1 0.8, on a Llama twice as deep and wide.

    python -m recipes.studies.larger --workers 2 [--out DIR]

The methods are AM and AdamW at the momentum that was best for the laptop recipe's Llama with a warmup of 15 %
(recipes.studies.batch), with it and without one.
At each batch every method is tuned over its learning rates on one seed, and compared on five fresh, paired seeds.
Writes larger.jsonl and larger.md into DIR. Finished runs are kept, so a second call continues, and --write makes the
page from the cells that are complete.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from recipes.studies.ledger import Ledger
from recipes.studies.page import add_begin_with, run_study, study_parser, write_page
from recipes.studies.pretraining.batches import FOUR
from recipes.studies.pretraining.run import Scale, pretrain, setup_of
from recipes.studies.pretraining.tuning import Tuning

RECIPE = "recipes/studies/pretraining/larger.yaml"
_PROTOCOL = (
    "The laptop recipe's Llama twice as deep and twice as wide (6.45 M parameters, bytes, rows of 128), cosine to a"
    " tenth, weight decay 0.1, clipping at 1, beta2 0.95. Every method is tuned on seed 0, over learning rates a factor"
    " of two apart until the best lies inside, then a factor of sqrt 2 around it, and compared on seeds 1 to 5, in"
    " pairs with the same initial weights and batches. Losses are nats per token on held-out rows after the last step."
    " Intervals are Student's, 95 %; in parentheses corrected for the comparisons that were planned (Bonferroni): AM"
    " and AdamW with a warmup, and both without one, at each batch. The methods were chosen after the small model's"
    " runs on the same data and seeds had been seen. Not run: another beta1 or cap, another warmup, schedule-free and"
    " RAdam."
)


def study(options: argparse.Namespace, command: str) -> str:
    """Make the missing runs and write the page."""
    ledger = Ledger.begun_with(options.begin_with, options.out / "larger.jsonl", setup_of(RECIPE))
    runs = partial(pretrain, str((options.out / "data").resolve()))
    parts, comparisons = [], 2 * len(options.batches)  # with a warmup, and without
    for rows in options.batches:
        tuning = Tuning(ledger, Scale(RECIPE, options.steps, rows), FOUR)
        if not options.write:
            while configs := list(tuning.missing()):
                ledger.run(configs, runs, workers=options.workers)
            ledger.run(tuning.finalist_configs(), runs, workers=options.workers)
        parts += cell(tuning, comparisons)
    return write_page(options.out / "larger.md", "A larger model", command, ledger.made(), _PROTOCOL, parts)


def cell(tuning: Tuning, comparisons: int) -> list[str]:
    """Return the tables of a cell, or that it is not complete. Intervals are also corrected for `comparisons`."""
    if not tuning.has_all(tuning.missing()) or not tuning.has_all(tuning.finalist_configs()):
        return [f"Not complete: {tuning.scale}."]
    differences = tuning.differences_table(tuning.methods, comparisons=comparisons)
    return [f"## {tuning.scale}", tuning.finalists_table(), differences, tuning.sweep_table()]


if __name__ == "__main__":
    parser = study_parser(__doc__, Path("runs/studies/larger"))
    add_begin_with(parser)
    parser.add_argument("--steps", type=int, default=300, help="steps of a run; default: %(default)s")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32], help="rows of a step, of each cell")
    parser.add_argument("--write", action="store_true", help="only make the page from finished runs")
    run_study("larger", parser, study)
