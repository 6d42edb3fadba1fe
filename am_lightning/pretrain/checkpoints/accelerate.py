"""Accelerate's checkpoints of a run: a folder for each, whole or not there; and the choice of one, by all processes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from am_lightning.pretrain.checkpoints.manifest import sync_files, write_manifest
from am_lightning.pretrain.checkpoints.resume import check_readable, newest_first, newest_whole
from am_lightning.pretrain.runtime.atomic_files import disk_error, sync_folder, write_failure
from am_lightning.pretrain.runtime.collective_errors import raising_together
from am_lightning.pretrain.runtime.errors import RecipeError
from am_lightning.pretrain.runtime.run_lock import hold

_CURE = "Free some space; --ckpt_path last goes on from the checkpoint before."
_STATES = "states.pt"


class Stateful(Protocol):
    """What has a state of tensors and plain values, as torch.load(weights_only=True) takes them."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Any) -> Any: ...


class AccelerateCheckpoints:
    """`step-N` folders that accelerator.save_state fills, with a manifest of sizes and SHA-256. Every process calls
    every method.

    Args:
        accelerator: with the model and the optimizer.
        folder: where they lie.
        keep: how many to keep, the newest; None keeps all.
        states: what else is saved, by name. In a file of ours: what is registered with the accelerator is loaded as a
            pickle, which may run code.
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

        One of that name goes aside before and away after, so that there is none for the time of two renames only.

        Raises:
            RecipeError: on all processes, where the disk of one refuses; the checkpoints before are untouched.
        """
        target = self.folder / f"step-{step:06d}"
        part = self.folder / f".{target.name}.part"
        try:
            self._write(part, target)
        except RecipeError:
            if self.accelerator.is_main_process:
                shutil.rmtree(part, ignore_errors=True)  # a full disk needs the space
            raise
        return target

    def _write(self, part: Path, target: Path) -> None:
        together = partial(_together, partial(_refusal, target))
        with together():
            if self.accelerator.is_main_process:
                for left in self.folder.glob(".step-*"):  # by a killed run
                    shutil.rmtree(left, ignore_errors=True)
                part.mkdir(parents=True)
        with together():
            self.accelerator.save_state(str(part))
            states = {name: of.state_dict() for name, of in self.states.items()}  # may be collective
            if self.accelerator.is_main_process:
                if self.model is not None:
                    states["model"] = self.model.state_dict()
                torch.save(states, part / _STATES)
        with together():
            if self.accelerator.is_main_process:
                sync_files(part)
                write_manifest(part)
                replaced = part.with_suffix(".replaced")
                if target.exists():
                    target.rename(replaced)
                part.rename(target)
                sync_folder(self.folder)
                shutil.rmtree(replaced, ignore_errors=True)
                prune(self._all(), self.keep)

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
    found: list[Path | None] = [None]
    with _together():
        if accelerator.is_main_process:
            if ckpt_path == "last":
                found = [newest_whole(folder, [pattern])]
            elif not Path(ckpt_path).is_dir():
                raise RecipeError(
                    f"--ckpt_path {ckpt_path}: there is no such folder. Those of this run are in {folder}"
                )
            else:
                check_readable(Path(ckpt_path), folder, pattern)
                found = [Path(ckpt_path)]
    broadcast_object_list(found)
    return found[0]


def hold_together(accelerator: Accelerator, folder: Path) -> None:
    """Collective. Say that this run writes the checkpoints in `folder`. RecipeError, on all processes: another does."""
    with _together():
        if accelerator.is_main_process:
            hold(folder)


def prune(checkpoints: list[Path], keep: int | None) -> None:
    """Remove all but the `keep` newest; None keeps all."""
    for old in newest_first(checkpoints)[keep:] if keep is not None else []:
        shutil.rmtree(old, ignore_errors=True)


def _together(*refusal_of: Callable[[BaseException], RecipeError | None]) -> AbstractContextManager[None]:
    """What one process raises, all raise."""
    return raising_together(lambda words: gather_object([words]), *refusal_of)


def _refusal(target: Path, problem: BaseException) -> RecipeError | None:
    refused = disk_error(problem)
    return None if refused is None else write_failure(target, refused, _CURE)
