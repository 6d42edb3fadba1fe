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
