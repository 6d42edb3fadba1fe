"""Accelerate's checkpoints of a run: a folder for each, whole or not there; and the choice of one, by all processes."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.distributed.checkpoint.stateful import Stateful

from am_lightning.pretrain.checkpoints.atomic import prune, publish_folder
from am_lightning.pretrain.checkpoints.ranks import Ranks
from am_lightning.pretrain.checkpoints.resume import check_readable, newest_first, newest_whole
from am_lightning.pretrain.runtime.errors import RecipeError
from am_lightning.pretrain.runtime.run_lock import hold

_STATES = "states.pt"


class AccelerateCheckpoints:
    """`step-N` folders that accelerator.save_state fills, with a manifest of sizes and SHA-256. Every process calls
    every method.

    Args:
        accelerator: with the model and the optimizer.
        folder: where they lie.
        keep: how many to keep, the newest; None keeps all.
        states: what else is saved, by name, of tensors and plain values. In a file of ours: what is registered with the
            accelerator is loaded as a pickle, which may run code.
        model: the model's description, saved with the states and loaded before its weights, so that it can refuse them.
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
        """Write `step-N` beside its place, then rename it: a kill at any moment leaves no half folder of that name.

        Raises:
            RecipeError: on all processes, where the disk of one refuses; the checkpoints before are untouched.
        """
        target = self.folder / f"step-{step:06d}"
        part = self.folder / f".{target.name}.part"
        ranks = _ranks(self.accelerator)
        with ranks.saving(target, part):
            if ranks.first:
                for left in self.folder.glob(".step-*"):  # by a killed run
                    shutil.rmtree(left, ignore_errors=True)
                part.mkdir(parents=True)
        with ranks.saving(target, part):
            self.accelerator.save_state(str(part))
            states = {name: of.state_dict() for name, of in self.states.items()}  # may be collective
            if ranks.first:
                if self.model is not None:
                    states["model"] = self.model.state_dict()
                torch.save(states, part / _STATES)
        with ranks.saving(target, part):
            if ranks.first:
                publish_folder(part, target)
                prune(self._all(), self.keep)
        return target

    def load(self, ckpt_path: str) -> Path | None:
        """Load "last", the newest that is whole; or a folder. Returns the folder; None where "last" finds none.

        Raises:
            RecipeError: there is no such folder, or none is whole.
        """
        path = chosen(self.accelerator, ckpt_path, self.folder, "step-*")
        if path is not None:
            if not (path / _STATES).exists():
                raise RecipeError(f"--ckpt_path {path} is no checkpoint of this program: it has no {_STATES}")
            found = torch.load(path / _STATES, map_location="cpu", weights_only=True)
            if self.model is not None:
                self.model.load_state_dict(found["model"])
            self.accelerator.load_state(str(path))
            for name, of in self.states.items():
                of.load_state_dict(found[name])
        return path

    def newest(self) -> Path | None:
        """The checkpoint that was written last."""
        return next(iter(newest_first(self._all())), None)

    def _all(self) -> list[Path]:
        return [path for path in self.folder.glob("step-*") if path.is_dir()]


def chosen(accelerator: Accelerator, ckpt_path: str, folder: Path, pattern: str) -> Path | None:
    """Collective. The folder that ``--ckpt_path`` means; the main process reads it, all get its choice.

    Args:
        accelerator: of the processes.
        ckpt_path: "last", for the newest whole one of `folder` (None if there is none yet); or a folder.
        folder: the run's checkpoints.
        pattern: of their names.

    Raises:
        RecipeError: on all processes, where it is missing or broken; names an older one that is whole.
    """

    def choose() -> Path | None:
        if ckpt_path == "last":
            return newest_whole(folder, [pattern])
        if not Path(ckpt_path).is_dir():
            raise RecipeError(f"--ckpt_path {ckpt_path}: there is no such folder. Those of this run are in {folder}")
        check_readable(Path(ckpt_path), folder, pattern)
        return Path(ckpt_path)

    return _ranks(accelerator).decide(choose)


def hold_together(accelerator: Accelerator, folder: Path) -> None:
    """Collective. Say that this run writes the checkpoints in `folder`. RecipeError, on all processes: another does."""
    _ranks(accelerator).decide(partial(hold, folder))


def _ranks(accelerator: Accelerator) -> Ranks:
    return Ranks(accelerator.num_processes, accelerator.is_main_process)
