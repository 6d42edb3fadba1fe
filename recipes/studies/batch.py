r"""What adaptive memory buys as the batch grows: AM-AdamW against AdamW, schedule-free and RAdam, tuned at each batch.

    python -m recipes.studies.batch --workers 2 [--out DIR]

The protocol is in recipes/studies/pretraining/batches.py: at every batch, with as many steps and, apart, with as many
tokens, each method is tuned over its learning rates, momentums and warmups on one seed; the best of each family meet on
five fresh, paired seeds. Writes batch.jsonl, batch.md and figures into DIR. Finished runs are kept: a second call goes
on, and with --stages (nothing) only the page is made from them; those of docs/evidence with

    python -m recipes.studies.batch --begin-with docs/evidence/batch.jsonl.gz --stages
"""

from __future__ import annotations

import argparse
import gzip
import sys
from pathlib import Path

from am_lightning.pretrain.runtime.errors import RecipeError
from recipes.studies.ledger import Ledger
from recipes.studies.page import command_of
from recipes.studies.pretraining.batch_page import write
from recipes.studies.pretraining.batches import METHODS, STAGES, kinds_of, missing
from recipes.studies.pretraining.run import Pretraining, setup_of
from recipes.studies.pretraining.tuning import Tuning


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/studies/batch"), help="folder of results")
    parser.add_argument("--begin-with", type=Path, metavar="JSONL.GZ", help="runs of before, where --out has none yet")
    parser.add_argument("--steps", type=int, default=300, help="of the cells with as many steps")
    parser.add_argument("--rows", type=int, default=64, help="a step, in the cell that is of both kinds")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32, 64, 128], help="rows of a step, of all cells")
    parser.add_argument("--cells", nargs="+", metavar="ROWSxSTEPS", help="only these")
    parser.add_argument(
        "--methods", choices=METHODS, default="all", help="few: without cap and beta1 0.95 and warmup 15 %%"
    )
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, one CPU thread each")
    parser.add_argument("--stages", nargs="*", default=list(STAGES), choices=STAGES, metavar="STAGE", help=str(STAGES))
    options = parser.parse_args()
    try:
        if options.begin_with and not (options.out / "batch.jsonl").exists():
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "batch.jsonl").write_bytes(gzip.decompress(options.begin_with.read_bytes()))
        ledger = Ledger(options.out / "batch.jsonl", setup_of("laptop"))
        runs = Pretraining(str((options.out / "data").resolve()))
        kinds = kinds_of(options.steps, options.rows, options.batches)
        cells = list(dict.fromkeys(cell for kind in kinds.values() for cell in kind))
        for cell in cells:
            if options.cells and f"{cell.batch_size}x{cell.steps}" not in options.cells:
                continue
            tuning = Tuning(ledger, cell, METHODS[options.methods])
            for stage in options.stages:
                while configs := list(missing(stage, tuning)):
                    ledger.run(configs, runs, workers=options.workers)
        print(write(ledger, kinds, options.out, command_of("batch", parser, options)))
    except RecipeError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
