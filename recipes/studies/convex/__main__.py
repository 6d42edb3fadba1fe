"""Full-batch logistic regression and diagonal quadratics: python -m recipes.studies.convex [--out DIR] [--workers N]

AM-MGD (lambda 0; exact and first-order loss gap) against gradient descent, heavy ball and Nesterov at a grid of step
sizes, on data sets that scikit-learn ships. Everything is deterministic: float64, x_0 = 0, no sampling, so there are no
seeds and no intervals. Writes convex.jsonl, convex.md and convex-*.png into DIR; a second call draws them again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from am_lightning.pretrain.runtime.errors import RecipeError
from recipes.studies.convex.protocol import study
from recipes.studies.convex.results import report
from recipes.studies.page import command_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/studies/convex"), help="folder of results")
    parser.add_argument("--steps", type=int, default=500, help="gradient steps of a run")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, one thread each")
    options = parser.parse_args()
    try:
        ledger = study(options.out / "convex.jsonl", steps=options.steps, workers=options.workers)
        command = command_of("convex", parser, options)
        print(report(ledger, options.out, steps=options.steps, command=command))
    except RecipeError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
