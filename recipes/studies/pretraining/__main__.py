r"""AM-AdamW without warmup against tuned AdamW, RAdam and schedule-free.

    python -m recipes.studies.pretraining [--out DIR]

The protocol is in recipes/studies/pretraining/stages.py: a sweep on one seed, then paired runs on fresh seeds, four
times the batch, three times the steps, and the traces of beta_t. The validation loss counts at the end of training.
Writes warmup.jsonl, warmup.md and figures into DIR. Finished runs are kept, so a second call continues.

    python -m recipes.studies.pretraining --workers 2    # the laptop recipe, on a CPU
    python -m recipes.studies.pretraining --recipe 60m --steps 10000 --batch-size 512 --micro-batch-size 64 \
        --device cuda --out runs/studies/60m
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from recipes.studies.ledger import Ledger
from recipes.studies.page import run_study, study_parser
from recipes.studies.pretraining.report import report
from recipes.studies.pretraining.run import Scale, pretrain, setup_of
from recipes.studies.pretraining.stages import STAGES, Study


def study(options: argparse.Namespace, command: str) -> str:
    """Make the missing runs of the stages and write the page."""
    scale = Scale(options.recipe, options.steps, options.batch_size, options.device, options.micro_batch_size)
    found = Study(Ledger(options.out / "warmup.jsonl", setup_of(options.recipe)), scale)
    runs = partial(pretrain, str((options.out / "data").resolve()))
    for stage in options.stages:
        found.ledger.run(found.configs(stage), runs, workers=options.workers)
    return report(found, options.out, command)


if __name__ == "__main__":
    parser = study_parser(__doc__, Path("runs/studies/warmup"))
    parser.add_argument("--recipe", default="laptop", help="name of a recipe, or a YAML")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=8, help="rows of a step")
    parser.add_argument("--micro-batch-size", type=int, metavar="N", help="rows at once, if the batch is too large")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--stages", nargs="*", default=list(STAGES), metavar="STAGE", help=", ".join(STAGES))
    run_study("pretraining", parser, study)
