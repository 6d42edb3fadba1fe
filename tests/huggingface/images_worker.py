"""A picture in each reporting callback of a Trainer and each tracker of Accelerate, in a process of its own.

These packages read the environment when they are imported, so ``set_up`` must come first.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

ENDS = {"wandb": "finish", "comet_ml": "end"}  # their callbacks leave these until the process ends
TAG, STEP = "am/beta/layers", 30


def set_up(folder: Path) -> None:
    """Write everything below ``folder``, and nothing to a network."""
    os.chdir(folder)
    os.environ |= {
        "WANDB_MODE": "offline",
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "MLFLOW_TRACKING_URI": (folder / "mlruns").as_uri(),
        "COMET_START_ONLINE": "false",
        "COMET_OFFLINE_DIRECTORY": str(folder),
        "COMET_DISABLE_AUTO_LOGGING": "1",
        "CLEARML_OFFLINE_MODE": "1",
        "CLEARML_CACHE_DIR": str(folder),
        "CLEARML_LOG_MODEL": "FALSE",
        "TRACKIO_DIR": str(folder),
        "SWANLAB_MODE": "offline",
        "SWANLAB_LOG_DIR": str(folder),
        "HF_HUB_OFFLINE": "1",
    }


def trainer(report_to: str, folder: Path) -> list[bool]:
    """Return what ``report_image`` returned for each callback before training, and during a log call."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from am_lightning.huggingface.images import report_image
    from tests.huggingface.trainer_runs import Tokens, make_model
    from tests.loggers.pictures import IMAGE

    torch.manual_seed(0)
    sent = []

    class Send(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs and state.global_step == 2:
                reporters = [callback for callback in run.callback_handler.callbacks if callback is not self]
                sent.extend(report_image(reporter, f"train/{TAG}", IMAGE, 2) for reporter in reporters)

    options: dict[str, Any] = {"max_steps": 3, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True}
    args = TrainingArguments(str(folder / "out"), report_to=report_to, use_cpu=True, run_name="run", **options)
    run = Trainer(make_model(), args, train_dataset=Tokens(), callbacks=[Send()])
    before = [report_image(callback, TAG, IMAGE, 0) for callback in run.callback_handler.callbacks]
    run.train()
    return [any(before), any(sent)]


def accelerator(log_with: str, folder: Path) -> list[bool]:
    """Return what ``track_image`` returned, with a scalar before and after it."""
    from accelerate import Accelerator

    from am_lightning.huggingface.images import track_image
    from tests.loggers.pictures import IMAGE

    run = Accelerator(cpu=True, log_with=log_with, project_dir=folder)
    run.init_trackers("project")
    run.log({"a": 1.0}, step=STEP)
    sent = [track_image(tracker, TAG, IMAGE, STEP) for tracker in run.trackers]
    run.log({"a": 2.0}, step=STEP + 1)
    run.end_training()
    return sent


if __name__ == "__main__":
    kind, name, given = sys.argv[1:]
    set_up(Path(given))
    if name == "swanlab" and kind == "trainer":  # its get_run raises where transformers 5.24 expects None
        import swanlab

        swanlab.init(project="project")
    returned = {"trainer": trainer, "accelerator": accelerator}[kind](name, Path(given))
    if kind == "trainer" and name in ENDS:
        getattr(importlib.import_module(name), ENDS[name])()
    print("\nreturned", json.dumps(returned))
