"""What each rank runs: checkpoints of Accelerate's on a disk that becomes full."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState

from am_lightning.recipes.errors import RecipeError
from am_lightning.recipes.state_folders import StateFolders


def save_one_step_twice(folder: str) -> tuple[list[str], bool]:
    """What lies in the folder, and whether a load gives what was saved last."""
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    accelerator = Accelerator(cpu=True)
    try:
        prepared = accelerator.prepare(torch.nn.Linear(3, 3))
        folders = StateFolders(accelerator, Path(folder))
        for value in (1.0, 2.0):
            prepared.requires_grad_(False).apply(lambda layer, v=value: [p.fill_(v) for p in layer.parameters(False)])
            folders.save(5)
        for param in prepared.parameters():
            param.fill_(0.0)
        assert folders.load("last") == Path(folder, "step-000005")
        return sorted(os.listdir(folder)), all(bool((param == 2).all()) for param in prepared.parameters())
    finally:
        AcceleratorState._reset_state()
        PartialState._reset_state()


def save_until_the_disk_is_full(folder: str) -> tuple[int, str]:
    """How many checkpoints were made, and the error."""
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    accelerator = Accelerator(cpu=True)
    try:
        accelerator.prepare(torch.nn.Linear(500, 500))  # 1 MB
        folders = StateFolders(accelerator, Path(folder))
        for step in range(1, 9):
            try:
                folders.save(step)
            except RecipeError as error:
                return step - 1, str(error)
        return 8, ""
    finally:
        AcceleratorState._reset_state()
        PartialState._reset_state()
