"""RunCheckpoint: when a run's checkpoints are written, how many are kept, and which one a resumed run goes on from."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any
from weakref import proxy

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from am_lightning.lightning.patched_methods import PatchedMethods
from am_lightning.pretrain.checkpoints.atomic import prune, remove, replace_with_link
from am_lightning.pretrain.checkpoints.manifest import manifest_of, write_manifest
from am_lightning.pretrain.checkpoints.ranks import Ranks
from am_lightning.pretrain.checkpoints.resume import LAST, STEPS, check_readable, newest_first, newest_whole
from am_lightning.pretrain.checkpoints.writer import CheckpointWriter
from am_lightning.pretrain.runtime import run_lock
from am_lightning.pretrain.runtime.errors import require_counts


class RunCheckpoint(ModelCheckpoint):
    """Checkpoints `step-N.ckpt` of a run and `last.ckpt`, which always is the newest of them.

    One is written every `every_n_train_steps` and one after the last step. Each is a file or, where the strategy saves
    shards, a folder; it appears under its name only when it is whole, with a manifest of sizes and SHA-256. `last.ckpt`
    is a link (hard to a file, symbolic to a folder), replaced by a rename: whenever the process is killed, it is there
    and whole.

    ``ckpt_path="last"`` goes on from the newest checkpoint that is whole: rank 0 reads it, and the one before where it
    is broken, and all ranks load the one it chose. Checkpoints are loaded with ``weights_only=True``.

    Args:
        dirpath: their folder.
        every_n_train_steps: optimizer steps between two checkpoints.
        keep: how many to keep, the newest; None keeps all.
        asynchronous: train on while a checkpoint is written; costs its size in CPU memory.

    Attributes:
        save_at_batch_end: another callback sets it, on all ranks, for a checkpoint at the end of this batch.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        every_n_train_steps: int | None = None,
        keep: int | None = None,
        asynchronous: bool = False,
    ) -> None:
        require_counts("checkpoint", keep=keep, every_n_train_steps=every_n_train_steps)
        super().__init__(
            dirpath=dirpath,
            filename="step-{step:06d}",
            auto_insert_metric_name=False,
            every_n_train_steps=every_n_train_steps,
            save_top_k=-1,
            save_last="link",
            enable_version_counter=False,
        )
        self.keep, self.asynchronous = keep, asynchronous
        self.save_at_batch_end = False
        self._last_is_wanted = False  # ckpt_path="last"
        self._writer: CheckpointWriter | None = None
        self._replacements = PatchedMethods()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._undo()
        connector = trainer._checkpoint_connector
        self._replacements.add(connector, "resume_start", functools.partial(self._resume, trainer))
        if stage == "fit":
            self._writer = CheckpointWriter(trainer, self.asynchronous, self._publish)
            self._writer.ranks.decide(self._take_folder)

    def _take_folder(self) -> None:
        """RecipeError: another run writes to this folder."""
        run_lock.hold(Path(str(self.dirpath)))
        for leftover in Path(str(self.dirpath)).glob(".*.part"):  # of a killed process
            remove(leftover)

    # ------------------------------------------------------------------ when
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self.save_at_batch_end:
            self.save_at_batch_end = False
            self.save_unless_saved(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The checkpoint after the very last step, where that is no multiple of the interval."""
        self.save_unless_saved(trainer)
        self.wait()

    def wait(self) -> None:
        """On all ranks: until the checkpoint that is under way is there, or its error is raised."""
        if self._writer is not None:
            self._writer.wait()

    def save_unless_saved(self, trainer: L.Trainer) -> None:
        """On all ranks, where a fit has ended or a batch ends."""
        if not self._should_skip_saving_checkpoint(trainer) and trainer.global_step > 0:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    # ------------------------------------------------------------------ writing
    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        if self._writer is None:
            raise RuntimeError("RunCheckpoint.setup() has not run")
        self._writer.save(Path(filepath))
        self._last_global_step_saved, self._last_checkpoint_saved = trainer.global_step, filepath
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))

    def _save_last_checkpoint(self, trainer: L.Trainer, monitor_candidates: dict[str, torch.Tensor]) -> None:
        """Nothing: last.ckpt follows where a checkpoint is whole, see _publish."""

    def _publish(self, path: Path) -> None:
        """On rank 0, perhaps in the background: last.ckpt becomes `path`, and the oldest go."""
        replace_with_link(path, path.with_name(LAST))
        prune(path.parent.glob(STEPS), self.keep)

    # ------------------------------------------------------------------ resuming
    def _find_last_checkpoints(self, trainer: L.Trainer) -> set[str]:
        """Lightning asks for it where ckpt_path is "last"; which one it will be is decided when all ranks are there."""
        self._last_is_wanted = True
        folder = Path(str(self.dirpath or Path(trainer.default_root_dir, "checkpoints")))
        return {str(path) for path in newest_first([*folder.glob(STEPS), *folder.glob(LAST)])[:1]}

    def _resume(self, trainer: L.Trainer, original: Any, path: Any = None, weights_only: bool | None = None) -> None:
        """Lightning's resume_start, with the checkpoint that rank 0 chose."""
        last, self._last_is_wanted = self._last_is_wanted, False

        def choose() -> str | None:
            folder = Path(str(self.dirpath))
            if last:
                found = newest_whole(folder)
                if found and found.name != LAST and trainer.state.fn == "fit":
                    # A kill has cut off its publication, or last.ckpt is broken: the run continues from this one.
                    if found.is_file() and not manifest_of(found).exists():
                        write_manifest(found)
                    replace_with_link(found, found.with_name(LAST))
                return found and str(found)
            if path:
                check_readable(Path(path), folder)
            return path and str(path)

        chosen = Ranks(trainer.world_size, trainer.is_global_zero).decide(choose)
        original(chosen, weights_only=True)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Make the loop counters fit this Trainer.

        Lightning counts micro-batches and takes the checkpoint's count as it is. Where accumulate_grad_batches has
        changed, the first step after the resume would get only a part of its micro-batches.
        """
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        batches = checkpoint["global_step"] * trainer.accumulate_grad_batches
        for counters in (progress["total"], progress["current"]):
            difference = batches - counters["ready"]
            for name in counters:
                counters[name] += difference

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the folder says it all. So a run can be moved, and resumed with another interval."""
        return {}

    # ------------------------------------------------------------------ leaving
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        if self._writer is not None:
            self._writer.close()
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._undo()
        if stage == "fit":
            run_lock.release(Path(str(self.dirpath)))

    def _undo(self) -> None:
        self._writer = None
        self._replacements.undo()
