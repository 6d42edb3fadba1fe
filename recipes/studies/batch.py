r"""What adaptive memory gains as the batch grows: AM-AdamW against AdamW, schedule-free and RAdam, tuned at each batch.

    python -m recipes.studies.batch --workers 2 [--out DIR]

The protocol is in recipes/studies/pretraining/batches.py: at every batch, with equal steps and separately with equal
tokens, each method is tuned over its learning rates, momentums and warmups on one seed; the best of each family are
compared on five fresh, paired seeds. Writes batch.jsonl, batch.md and figures into DIR. Finished runs are kept, so a
second call continues, and --stages without a stage only makes the page from them. The page of docs/evidence:

    python -m recipes.studies.batch --begin-with docs/evidence/batch.jsonl.gz --stages
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from recipes.studies.ledger import Ledger
from recipes.studies.page import add_begin_with, run_study, study_parser
from recipes.studies.pretraining.batch_page import write
from recipes.studies.pretraining.batches import METHODS, STAGES, kinds_of, missing
from recipes.studies.pretraining.run import pretrain, setup_of
from recipes.studies.pretraining.tuning import Tuning


def study(options: argparse.Namespace, command: str) -> str:
    """Make the missing runs of the stages and write the page."""
    ledger = Ledger.begun_with(options.begin_with, options.out / "batch.jsonl", setup_of("laptop"))
    runs = partial(pretrain, str((options.out / "data").resolve()))
    kinds = kinds_of(options.steps, options.rows, options.batches)
    for cell in dict.fromkeys(cell for kind in kinds.values() for cell in kind):
        if options.cells and f"{cell.batch_size}x{cell.steps}" not in options.cells:
            continue
        tuning = Tuning(ledger, cell, METHODS[options.methods])
        for stage in options.stages:
            while configs := list(missing(stage, tuning)):
                ledger.run(configs, runs, workers=options.workers)
    return write(ledger, kinds, options.out, command)


if __name__ == "__main__":
    parser = study_parser(__doc__, Path("runs/studies/batch"))
    add_begin_with(parser)
    parser.add_argument("--steps", type=int, default=300, help="steps of the cells with equal steps")
    parser.add_argument("--rows", type=int, default=64, help="rows of a step in the cell that both kinds share")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32, 64, 128], help="rows of a step, of all cells")
    parser.add_argument("--cells", nargs="+", metavar="ROWSxSTEPS", help="only these cells")
    parser.add_argument(
        "--methods",
        choices=METHODS,
        default="all",
        help="few: at most 5 %% of warmup; warm: none or 15 %%; five: 0.8 only, and AdamW 0.65",
    )
    parser.add_argument("--stages", nargs="*", default=list(STAGES), choices=STAGES, metavar="STAGE", help=str(STAGES))
    run_study("batch", parser, study)
