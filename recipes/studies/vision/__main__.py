"""AM-SGD and AM-AdamW against SGD, Nesterov and AdamW with tuned momentum on images: python -m recipes.studies.vision

The default task, scikit-learn's digits, takes some minutes on a CPU. The paper's tasks need a GPU and the data sets:

    python -m recipes.studies.vision --workers 2
    python -m recipes.studies.vision --task recipes/studies/vision/cifar10-resnet18.yaml --data-dir DIR --device cuda

Writes vision.jsonl and vision.md into --out; finished runs are kept, so a second call goes on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from am_lightning.pretrain.runtime.errors import RecipeError
from recipes.studies.ledger import Ledger
from recipes.studies.page import command_of
from recipes.studies.vision.run import Classification
from recipes.studies.vision.stages import AM_ADAMW, AM_SGD, report, sweep_of
from recipes.studies.vision.task import read_task

TASKS = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", type=Path, default=TASKS / "digits-resnet8.yaml", help="a YAML")
    parser.add_argument("--data-dir", type=Path, help="for CIFAR: the folder its Python archive was unpacked in")
    parser.add_argument("--out", type=Path, help="folder of results; default: runs/studies/NAME OF THE TASK")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, one CPU thread each")
    parser.add_argument(
        "--try-steps", type=int, metavar="N", help="only a trial: N steps of AM-SGD and of AM-AdamW, nothing is kept"
    )
    options = parser.parse_args()
    try:
        task = read_task(options.task)
        out = options.out or Path("runs/studies") / options.task.stem
        sweep = sweep_of(Ledger(out / "vision.jsonl"), task, options.device)
        if options.try_steps:
            for method, rates in ((AM_SGD, task.sgd_rates), (AM_ADAMW, task.adamw_rates)):
                print(method, Classification(options.data_dir, options.try_steps)(sweep.config(method, rates[0], 0)))
            return
        runs = Classification(options.data_dir)
        sweep.ledger.run(sweep.sweep_configs(), runs, workers=options.workers)
        sweep.ledger.run(sweep.finalist_configs(), runs, workers=options.workers)
        print(report(sweep, task, out, command_of("vision", parser, options)))
    except RecipeError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
