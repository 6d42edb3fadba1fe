"""Checkpoints of a run with Accelerate: folders that are whole or missing, and the choice of one by all processes."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.distributed.checkpoint.stateful import Stateful

from am_lightning.pretrain.checkpoints.atomic import prune, publish_folder
from am_lightning.pretrain.checkpoints.ranks import Ranks
from am_lightning.pretrain.checkpoints.resume import check_readable, newest_first, newest_whole
from am_lightning.pretrain.checkpoints.run_folder import (
    ACCELERATE_STEPS,
    protect_earlier_run,
    refuse_checkpoints_of_others,
)
from am_lightning.pretrain.runtime.errors import RecipeError
from am_lightning.pretrain.runtime.run_lock import hold

_STATES = "states.pt"


class AccelerateCheckpoints:
    """Writes and loads `step-N` folders of accelerator.save_state with a manifest. All processes call each method.

    Args:
        accelerator: the Accelerator that has prepared the model and the optimizer.
        folder: folder of the checkpoints.
        keep: number of newest checkpoints to keep; default: all.
        states: further objects to save by name, whose states are tensors and plain values. They have a file of their
            own, because Accelerate loads objects that are registered with it as pickles, which may run code.
        model: description of the model. It is loaded before the weights, so that it can refuse them.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        keep: int | None = None,
        states: Mapping[str, Stateful] | None = None,
        model: Stateful | None = None,
    ) -> None:
        self.accelerator, self.folder, self.keep = accelerator, folder, keep
        self.states, self.model = dict(states or {}), model

    def save(self, step: int) -> Path:
        """Write a folder, and rename it to `step-N` when it is whole.

        Raises:
            RecipeError: on all processes, if the disk of one refuses. Older checkpoints are unchanged.
        """
        target = self.folder / f"step-{step:06d}"
        part = self.folder / f".{target.name}.part"
        ranks = _ranks(self.accelerator)
        with ranks.together(target, part):
            if ranks.first:
                for left in self.folder.glob(".step-*"):  # left by a killed run
                    shutil.rmtree(left, ignore_errors=True)
                part.mkdir(parents=True)
        with ranks.together(target, part):
            self.accelerator.save_state(str(part))
            states = {name: of.state_dict() for name, of in self.states.items()}  # may be collective
            if ranks.first:
                if self.model is not None:
                    states["model"] = self.model.state_dict()
                torch.save(states, part / _STATES)
        with ranks.together(target, part):
            if ranks.first:
                publish_folder(part, target)
                prune(self.folder.glob(ACCELERATE_STEPS), self.keep)
        return target

    def load(self, ckpt_path: str) -> Path | None:
        """Load a folder, or the newest whole one for "last". Return the folder, or None if "last" finds no checkpoint.

        Raises:
            RecipeError: if the folder does not exist, or no checkpoint is whole.
        """
        path = chosen(self.accelerator, ckpt_path, self.folder, ACCELERATE_STEPS)
        if path is not None:
            if not (path / _STATES).exists():
                raise RecipeError(f"--ckpt_path {path} is not a checkpoint of this program: it has no {_STATES}")
            found = torch.load(path / _STATES, map_location="cpu", weights_only=True)
            if self.model is not None:
                self.model.load_state_dict(found["model"])
            try:
                self.accelerator.load_state(str(path))
            except FileNotFoundError as error:  # every engine has files of its own
                raise RecipeError(
                    f"{path} has no {Path(error.filename or '').name}: resume with the engine of Accelerate that wrote"
                    " it (DDP, FSDP2 or DeepSpeed)"
                ) from error
            self.accelerator.step = 0  # micro-batches of the step: accumulate_grad_batches may have changed
            for name, of in self.states.items():
                of.load_state_dict(found[name])
        return path

    def newest(self) -> Path | None:
        """Return the checkpoint that was written last."""
        return next(iter(newest_first(self.folder.glob(ACCELERATE_STEPS))), None)


def chosen(accelerator: Accelerator, ckpt_path: str, folder: Path, pattern: str) -> Path | None:
    """Collective. Return the folder that ``--ckpt_path`` names. The main process reads and chooses it.

    Args:
        accelerator: the Accelerator of the processes.
        ckpt_path: a folder, or "last" for the newest whole one in `folder`, which is None if there is no checkpoint.
        folder: folder of the checkpoints.
        pattern: glob pattern of their names.

    Raises:
        RecipeError: on all processes, if the folder is missing or damaged.
    """

    def choose() -> Path | None:
        if ckpt_path == "last":
            found = newest_whole(folder, [pattern])
            if found is None:
                refuse_checkpoints_of_others(folder, pattern)
            return found
        if not Path(ckpt_path).is_dir():
            raise RecipeError(f"--ckpt_path {ckpt_path}: there is no such folder. Those of this run are in {folder}")
        check_readable(Path(ckpt_path), folder, pattern)
        return Path(ckpt_path)

    return _ranks(accelerator).decide(choose)


def hold_together(accelerator: Accelerator, folder: Path, root: Path, ckpt_path: str | None) -> None:
    """Collective. Lock the folder of the checkpoints for this run, and protect an earlier run in it.

    Args:
        accelerator: the Accelerator of the processes.
        folder: folder of the checkpoints.
        root: folder of the run.
        ckpt_path: what the run resumes from; None if it begins at step 0, and an earlier run in `root` is moved away.

    Raises:
        RecipeError: on all processes, if another run writes to the folder or would lose its checkpoints.
    """

    def take() -> None:
        hold(folder)
        protect_earlier_run(root, folder, ckpt_path)

    _ranks(accelerator).decide(take)


def _ranks(accelerator: Accelerator) -> Ranks:
    return Ranks(accelerator.num_processes, accelerator.is_main_process)
