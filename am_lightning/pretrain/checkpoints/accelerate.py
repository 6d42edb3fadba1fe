"""Checkpoint folders of Accelerate and the HF Trainer: they are whole or missing, and all processes choose one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.checkpoint.stateful import Stateful

from am_lightning.pretrain.checkpoints.atomic import prune, publish_folder
from am_lightning.pretrain.checkpoints.ranks import decide, is_first, together
from am_lightning.pretrain.checkpoints.resume import newest_first
from am_lightning.pretrain.checkpoints.run_folder import ACCELERATE_STEPS, chosen, protect_earlier_run, take_folder
from am_lightning.pretrain.runtime.errors import RecipeError


@dataclass
class CheckpointFolders:
    """The checkpoint folders of a run, each with a manifest. All processes call each method."""

    folder: Path  # folder of the checkpoints
    pattern: str  # glob pattern of their names
    file: str  # name of the file in each that holds the states of objects
    keep: int | None  # number of newest checkpoints to keep; None: all
    identity: Mapping[str, Stateful]  # objects by name that refuse a checkpoint of another model or of other data

    @property
    def part(self) -> Path:
        """Folder of the checkpoint that is not complete."""
        return self.folder / ".checkpoint.part"

    def take(self, root: Path, ckpt_path: str | None) -> None:
        """Lock the folder for this run, and protect an earlier run in it.

        Args:
            root: folder of the run.
            ckpt_path: what the run resumes from; None if it begins at step 0, and an earlier run in `root` is moved.

        Raises:
            RecipeError: on all processes, if another run writes to the folder or would lose its checkpoints.
        """

        def take() -> None:
            take_folder(self.folder)
            protect_earlier_run(root, self.folder, ckpt_path)

        decide(take)

    @contextmanager
    def writing(self, name: str, states: Mapping[str, Stateful] | None = None) -> Iterator[Path]:
        """Let the block write the folder that it gets, add `states` to it, and move it to `name` when it is whole.

        Raises:
            RecipeError: on all processes, if the disk of one refuses. Older checkpoints are unchanged.
        """
        target, part = self.folder / name, self.part / name
        with together(target, self.part):
            if is_first():
                shutil.rmtree(self.part, ignore_errors=True)
                part.mkdir(parents=True)
        with together(target, self.part):
            yield part
            saved = {key: of.state_dict() for key, of in (dict(states or {}) | dict(self.identity)).items()}
            if is_first():
                torch.save(saved, part / self.file)
        with together(target, self.part):
            if is_first():
                publish_folder(part, target)
                shutil.rmtree(self.part)
                prune(self.folder.glob(self.pattern), self.keep)

    def choose(self, ckpt_path: str) -> tuple[Path | None, dict[str, Any]]:
        """Return the folder that ``--ckpt_path`` names, and the states in it. The first process chooses it.

        Args:
            ckpt_path: a folder, or "last" for the newest whole one, which is None if there is no checkpoint.

        Raises:
            RecipeError: on all processes, if the folder is missing, damaged, or of another program, model or data.
        """
        path = decide(lambda: chosen(ckpt_path, self.folder, [self.pattern]))
        if path is None:
            return None, {}
        if not (path / self.file).exists():
            raise RecipeError(f"--ckpt_path {path} is not a checkpoint of this program: it has no {self.file}")
        saved: dict[str, Any] = torch.load(path / self.file, map_location="cpu", weights_only=True)
        for name, of in self.identity.items():
            of.load_state_dict(saved[name])
        return path, saved

    def newest(self) -> Path | None:
        """Return the checkpoint that was written last."""
        return next(iter(newest_first(self.folder.glob(self.pattern))), None)


class AccelerateCheckpoints(CheckpointFolders):
    """Writes and loads `step-N` folders of accelerator.save_state.

    Args:
        accelerator: the Accelerator that has prepared the model and the optimizer.
        folder, keep, identity: as in CheckpointFolders.
        states: further objects to save by name, whose states are tensors and plain values. They have a file of their
            own, because Accelerate loads objects that are registered with it as pickles, which may run code.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        keep: int | None = None,
        states: Mapping[str, Stateful] | None = None,
        identity: Mapping[str, Stateful] | None = None,
    ) -> None:
        super().__init__(folder, ACCELERATE_STEPS, "states.pt", keep, identity or {})
        self.accelerator, self.states = accelerator, dict(states or {})

    def save(self, step: int) -> Path:
        """Write `step-N`. RecipeError: on all processes, if the disk of one refuses."""
        with self.writing(f"step-{step:06d}", self.states) as part:
            self.accelerator.save_state(str(part))
        return self.folder / part.name

    def load(self, ckpt_path: str) -> Path | None:
        """Load what ``choose`` finds. Return the folder, or None if "last" finds no checkpoint.

        Raises:
            RecipeError: as ``choose`` does, and if another engine of Accelerate wrote the folder.
        """
        path, saved = self.choose(ckpt_path)
        if path is not None:
            try:
                self.accelerator.load_state(str(path))
            except FileNotFoundError as error:  # every engine has files of its own
                raise RecipeError(
                    f"{path} has no {Path(error.filename or '').name}: resume with the engine of Accelerate that wrote"
                    " it (DDP, FSDP2 or DeepSpeed)"
                ) from error
            self.accelerator.step = 0  # micro-batches of the step: accumulate_grad_batches may have changed
            for name, of in self.states.items():
                of.load_state_dict(saved[name])
        return path
