"""AM-SGD and AM-AdamW against SGD, Nesterov and AdamW with tuned momentum on images: python -m recipes.studies.vision

The default task, scikit-learn's digits, takes some minutes on a CPU. The paper's tasks need a GPU and the data sets:

    python -m recipes.studies.vision --workers 2
    python -m recipes.studies.vision --task recipes/studies/vision/cifar10-resnet18.yaml --data-dir DIR --device cuda

Writes vision.jsonl and vision.md into --out. Finished runs are kept, so a second call continues.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from recipes.studies.ledger import Ledger
from recipes.studies.page import run_study, study_parser
from recipes.studies.vision.run import classify
from recipes.studies.vision.stages import AM_ADAMW, AM_SGD, read_task, report, sweep_of

TASKS = Path(__file__).resolve().parent


def study(options: argparse.Namespace, command: str) -> str:
    """Make the missing runs and write the page, or try some steps."""
    task = read_task(options.task)
    out = options.out or Path("runs/studies") / options.task.stem
    sweep = sweep_of(Ledger(out / "vision.jsonl"), task, options.device)
    runs = partial(classify, options.data_dir, options.try_steps)
    if options.try_steps:
        trials = {AM_SGD: task.sgd_rates[0], AM_ADAMW: task.adamw_rates[0]}
        return "\n".join(f"{method} {runs(sweep.config(method, lr, 0))}" for method, lr in trials.items())
    for configs in (sweep.sweep_configs, sweep.finalist_configs):
        sweep.ledger.run(configs(), runs, workers=options.workers)
    return report(sweep, task, out, command)


if __name__ == "__main__":
    parser = study_parser(__doc__, None)
    parser.add_argument("--task", type=Path, default=TASKS / "digits-resnet8.yaml", help="YAML of a task")
    parser.add_argument("--data-dir", type=Path, help="for CIFAR: folder in which its Python archive was unpacked")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--try-steps", type=int, metavar="N", help="only try N steps of AM-SGD and of AM-AdamW; nothing is kept"
    )
    run_study("vision", parser, study)
