"""Checkpoints that survive a kill at any moment, and the errors for those that did not survive something else."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only

from am_lightning.recipes.errors import RecipeError
from am_lightning.recipes.files import disk_error, replacing, sync_folder, write_failure

LAST = "last.ckpt"
_CURE = "Free some space and give the same command with --ckpt_path last: the last good checkpoint is still there."


class AtomicCheckpointIO(TorchCheckpointIO):
    """torch.save and torch.load, where a file is whole or not there, and a broken one is named.

    Lightning's own writes to the system's folder of temporary files and moves from there, which is a copy, and not
    atomic, where that is another disk.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write beside `path`, flush to the disk, rename.

        Raises:
            RecipeError: the disk refuses; the file that was at `path` is still there.
        """
        if storage_options is not None:
            raise TypeError(f"storage_options is {storage_options!r}; AtomicCheckpointIO takes none")
        with replacing(Path(path), _CURE) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Raises: RecipeError: the file is missing or broken; names an older file that is whole, if there is one."""
        check_readable(Path(path))
        return super().load_checkpoint(path, *args, **kwargs)


def check_readable(path: Path, folder: Path | None = None) -> None:
    """Read all of a checkpoint and compare its checksums: torch.load alone does not see a flipped bit.

    Where it cannot be read, others are looked for in `folder`, by default its own.

    Raises:
        RecipeError: it is missing or broken; names an older file that is whole, if there is one.
    """
    if not path.is_file():
        raise RecipeError(f"--ckpt_path {path}: there is no such file. {_older(path, folder)}")
    damage = _damage(path)
    if damage:
        raise RecipeError(f"the checkpoint {path} is broken ({damage}). {_older(path, folder)}")


def saved_step(path: Path) -> int:
    """The number of optimizer steps that were done when `path` was written; reads little of the file."""
    try:
        return int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"])
    except (RuntimeError, OSError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise RecipeError(f"{path} is no checkpoint of this program ({error}). {_older(path)}") from error


def _damage(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            member = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        return f"{path.stat().st_size} bytes: {error}"
    return f"wrong checksum in {member}" if member else None


def _older(path: Path, folder: Path | None = None) -> str:
    """What to do instead: the newest whole checkpoint in `folder`, by default the same."""
    folder = folder or path.parent
    others = [p for p in folder.glob("*.ckpt") if not (path.exists() and p.samefile(path))]
    for other in sorted(others, key=lambda p: (p.stat().st_mtime_ns, p.name), reverse=True):
        if _damage(other) is None:
            return f"Go on from an older one: --ckpt_path {other}"
    return f"There is no other whole checkpoint in {folder}: start anew, without --ckpt_path."


class RunCheckpoint(ModelCheckpoint):
    """Checkpoints `step-N.ckpt` of a run and `last.ckpt`, which always is the newest of them.

    One is written every `every_n_train_steps` and one after the last step. `last.ckpt` is a hard link (a copy where
    the file system has none), replaced by a rename: whenever the process is killed, it is there and whole.

    Args:
        dirpath: their folder.
        every_n_train_steps: optimizer steps between two checkpoints.
        keep: how many to keep, the newest; None keeps all.
    """

    def __init__(self, dirpath: str | None = None, every_n_train_steps: int | None = None, keep: int | None = None):
        if keep is not None and keep < 1:
            raise RecipeError(f"checkpoint.keep is {keep}; allowed: a whole number >= 1, or null to keep all")
        if every_n_train_steps is not None and every_n_train_steps < 1:
            raise RecipeError(
                f"checkpoint.every_n_train_steps is {every_n_train_steps}; allowed: a whole number >= 1, or null"
            )
        super().__init__(
            dirpath=dirpath,
            filename="step-{step:06d}",
            auto_insert_metric_name=False,
            every_n_train_steps=every_n_train_steps,
            save_top_k=-1,
            save_last="link",
            enable_version_counter=False,
        )
        self.keep = keep

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if trainer.is_global_zero and stage == "fit":
            for leftover in Path(str(self.dirpath)).glob(".*.part"):  # of a killed process
                leftover.unlink(missing_ok=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The checkpoint after the very last step, where that is no multiple of the interval."""
        if not self._should_skip_saving_checkpoint(trainer) and trainer.global_step > 0:
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        restore_position(checkpoint, trainer)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the folder says it all. So a run can be moved, and resumed with another interval."""
        return {}

    def _save_last_checkpoint(self, trainer: L.Trainer, monitor_candidates: dict[str, torch.Tensor]) -> None:
        super()._save_last_checkpoint(trainer, monitor_candidates)
        self._prune()

    @staticmethod
    def _link_checkpoint(trainer: L.Trainer, filepath: str, linkpath: str) -> None:
        if trainer.is_global_zero:
            replace_with_link(Path(filepath), Path(linkpath))
        trainer.strategy.barrier()

    @rank_zero_only
    def _prune(self) -> None:
        if self.keep is not None:
            for old in sorted(Path(str(self.dirpath)).glob("step-*.ckpt"), key=_step_in_name)[: -self.keep]:
                old.unlink(missing_ok=True)


def _step_in_name(path: Path) -> int:
    digits = path.stem.removeprefix("step-")
    return int(digits) if digits.isdigit() else 0


def replace_with_link(target: Path, link: Path) -> None:
    """Make `link` a hard link to (or a copy of) `target`, in one step.

    Raises:
        RecipeError: the disk refuses; the old `link` is still there.
    """
    part = link.with_name(f".{link.name}.{os.getpid()}.part")
    try:
        part.unlink(missing_ok=True)
        try:
            os.link(target, part)
        except OSError:  # a file system without hard links
            shutil.copyfile(target, part)
        os.replace(part, link)
        part.unlink(missing_ok=True)  # rename leaves it where both are the same file already
        sync_folder(link.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise write_failure(link, disk_error(error) or error, _CURE) from error


def restore_position(checkpoint: dict[str, Any], trainer: L.Trainer) -> None:
    """Make the loop counters of a checkpoint fit this Trainer; changes `checkpoint`.

    Lightning counts micro-batches and takes the checkpoint's count as it is. Where accumulate_grad_batches has changed,
    the first step after the resume would get only a part of its micro-batches.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    batches = checkpoint["global_step"] * trainer.accumulate_grad_batches
    for counters in (progress["total"], progress["current"]):
        difference = batches - counters["ready"]
        for name in counters:
            counters[name] += difference
