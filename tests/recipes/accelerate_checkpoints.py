"""Functions that each rank runs: checkpoints that are saved twice or on a full disk, and documents that are gone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState

from am_lightning.pretrain.checkpoints.accelerate import AccelerateCheckpoints
from am_lightning.pretrain.runtime.errors import RecipeError
from am_lightning.pretrain.runtime.run_config import read_run_config


@contextmanager
def fresh_accelerator() -> Iterator[Accelerator]:
    """Return an accelerator whose state does not affect what the rank runs next."""
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    try:
        yield Accelerator(cpu=True)
    finally:
        AcceleratorState._reset_state()
        PartialState._reset_state()


def save_one_step_twice(folder: str) -> tuple[list[str], bool]:
    """Return the folder's content, and whether a load restores what was saved last."""
    with fresh_accelerator() as accelerator:
        params = list(accelerator.prepare(torch.nn.Linear(3, 3)).requires_grad_(False).parameters())
        folders = AccelerateCheckpoints(accelerator, Path(folder))
        folders.take(Path(folder).parent, "last")
        for value in (1.0, 2.0):
            torch._foreach_zero_(params)
            torch._foreach_add_(params, value)
            folders.save(5)
        torch._foreach_zero_(params)
        assert folders.load("last") == Path(folder, "step-000005")
        return sorted(os.listdir(folder)), all(bool((param == 2).all()) for param in params)


def save_until_the_disk_is_full(folder: str) -> tuple[int, str]:
    """Return the number of checkpoints made, and the error."""
    with fresh_accelerator() as accelerator:
        accelerator.prepare(torch.nn.Linear(500, 500))  # 1 MB
        folders = AccelerateCheckpoints(accelerator, Path(folder))
        for step in range(1, 9):
            try:
                folders.save(step)
            except RecipeError as error:
                return step - 1, str(error)
        return 8, ""


def open_missing_documents(folder: str) -> tuple[int, str]:
    """Return torch's number of threads, and the error."""
    words = [f"--data.source={folder}/gone", f"--data.cache_dir={folder}", "--threads=2", "--trainer.accelerator=cpu"]
    settings = read_run_config(["--config=laptop", *words])
    with fresh_accelerator():
        torch.set_num_threads(1)  # as Accelerate does
        try:
            settings.open_data()
        except RecipeError as error:
            return torch.get_num_threads(), str(error)
        finally:
            torch.set_num_threads(1)
    return 0, ""
