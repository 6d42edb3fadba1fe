r"""AM-AdamW without warmup against tuned AdamW, RAdam and schedule-free.

    python -m recipes.studies.pretraining [--out DIR]

The protocol is in recipes/studies/pretraining/stages.py: a sweep on one seed, then paired runs on fresh
seeds, four times the batch, three times the steps, and the traces of beta_t. The validation loss counts at the end of
training. Writes warmup.jsonl, warmup.md and figures into DIR; finished runs are kept, so a second call goes on.

    python -m recipes.studies.pretraining --workers 2    # the laptop recipe, on a CPU
    python -m recipes.studies.pretraining --recipe 60m --steps 10000 --batch-size 512 --micro-batch-size 64 \
        --device cuda --out runs/studies/60m
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from am_lightning.pretrain.runtime.errors import RecipeError
from recipes.studies.ledger import Ledger
from recipes.studies.page import command_of
from recipes.studies.pretraining.report import report
from recipes.studies.pretraining.run import Pretraining, setup_of
from recipes.studies.pretraining.stages import STAGES, Scale, configs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/studies/warmup"), help="folder of results")
    parser.add_argument("--recipe", default="laptop", help="a recipe's name, or a YAML")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=8, help="rows of a step")
    parser.add_argument("--micro-batch-size", type=int, metavar="N", help="rows at once, where the batch is too large")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, one CPU thread each")
    parser.add_argument("--stages", nargs="*", default=list(STAGES), metavar="STAGE", help=", ".join(STAGES))
    options = parser.parse_args()
    try:
        scale = Scale(options.recipe, options.steps, options.batch_size, options.device, options.micro_batch_size)
        ledger = Ledger(options.out / "warmup.jsonl", setup_of(options.recipe))
        runs = Pretraining(str((options.out / "data").resolve()))
        for stage in options.stages:
            ledger.run(configs(stage, scale, ledger), runs, workers=options.workers)
        print(report(ledger, scale, options.out, command_of("pretraining", parser, options)))
    except RecipeError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
