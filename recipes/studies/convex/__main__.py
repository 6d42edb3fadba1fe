"""Full-batch logistic regression and diagonal quadratics: python -m recipes.studies.convex [--out DIR] [--workers N]

AM-MGD (lambda 0; exact and first-order loss gap) against gradient descent, heavy ball and Nesterov at a grid of step
sizes, on data sets that scikit-learn ships. Everything is deterministic: float64, x_0 = 0, no sampling, so there are no
seeds and no intervals. Writes convex.jsonl, convex.md and convex-*.png into DIR. A second call draws them again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from am_lightning.pretrain.runtime.errors import require
from recipes.studies.convex.protocol import configs, run
from recipes.studies.convex.results import report
from recipes.studies.ledger import Ledger
from recipes.studies.page import run_study, study_parser


def study(options: argparse.Namespace, command: str) -> str:
    """Make the missing runs and write the page."""
    require(options.steps >= 1, "--steps", options.steps, "a whole number >= 1")
    ledger = Ledger(options.out / "convex.jsonl")
    ledger.run(configs(options.steps), run, workers=options.workers)
    return report(ledger, options.out, steps=options.steps, command=command)


if __name__ == "__main__":
    parser = study_parser(__doc__, Path("runs/studies/convex"))
    parser.add_argument("--steps", type=int, default=500, help="gradient steps of a run")
    run_study("convex", parser, study)
