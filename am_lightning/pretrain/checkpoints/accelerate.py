"""Accelerate's checkpoints of a run: one folder for each, whole or not there."""

from __future__ import annotations

import shutil
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object

from am_lightning.pretrain.runtime.atomic_files import disk_error, sync_folder, write_failure
from am_lightning.pretrain.runtime.collective_errors import raising_together
from am_lightning.pretrain.runtime.errors import RecipeError

_CURE = "Free some space; --ckpt_path last goes on from the checkpoint before."


class AccelerateCheckpoints:
    """`step-N` folders that accelerator.save_state fills. Every process calls every method.

    Args:
        accelerator: with the model, the optimizer and whatever else is to be saved.
        folder: where they lie.
        keep: how many to keep, the newest; None keeps all.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, keep: int | None = None) -> None:
        self.accelerator, self.folder, self.keep = accelerator, folder, keep

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
        with self._together(target):
            if self.accelerator.is_main_process:
                for left in self.folder.glob(".step-*"):  # by a killed run
                    shutil.rmtree(left, ignore_errors=True)
                part.mkdir(parents=True)
        with self._together(target):
            self.accelerator.save_state(str(part))
        with self._together(target):
            if self.accelerator.is_main_process:
                replaced = part.with_suffix(".replaced")
                if target.exists():
                    target.rename(replaced)
                part.rename(target)
                sync_folder(self.folder)
                shutil.rmtree(replaced, ignore_errors=True)
                self._prune()

    def load(self, ckpt_path: str) -> Path | None:
        """Load "last", the newest; or a folder. Returns the folder; None where "last" finds none.

        Raises:
            RecipeError: there is no such folder.
        """
        path = self.newest() if ckpt_path == "last" else Path(ckpt_path)
        if path is None:
            return None
        if not path.is_dir():
            raise RecipeError(f"--ckpt_path {path}: there is no such folder. Those of this run are in {self.folder}")
        self.accelerator.load_state(str(path))
        return path

    def _together(self, target: Path) -> AbstractContextManager[None]:
        return raising_together(lambda words: gather_object([words]), partial(_refusal, target))

    def newest(self) -> Path | None:
        """The checkpoint with the most steps."""
        return max(self._all(), key=_step_of, default=None)

    def _all(self) -> list[Path]:
        return [path for path in self.folder.glob("step-*") if path.is_dir()]

    def _prune(self) -> None:
        if self.keep is not None:
            for old in sorted(self._all(), key=_step_of)[: -self.keep]:
                shutil.rmtree(old, ignore_errors=True)


def _refusal(target: Path, problem: BaseException) -> RecipeError | None:
    refused = disk_error(problem)
    return None if refused is None else write_failure(target, refused, _CURE)


def _step_of(path: Path) -> int:
    digits = path.name.removeprefix("step-")
    return int(digits) if digits.isdigit() else 0
