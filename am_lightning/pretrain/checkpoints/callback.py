"""RunCheckpoint: writes the checkpoints of a run, removes old ones and chooses the one that a run resumes from."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any
from weakref import proxy

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from am_lightning.lightning.patched_methods import PatchedMethods
from am_lightning.pretrain.checkpoints.atomic import prune, replace_with_link
from am_lightning.pretrain.checkpoints.manifest import manifest_of, write_manifest
from am_lightning.pretrain.checkpoints.ranks import decide
from am_lightning.pretrain.checkpoints.resume import LAST, STEPS, newest_first
from am_lightning.pretrain.checkpoints.run_folder import chosen, take_folder
from am_lightning.pretrain.checkpoints.writer import CheckpointWriter
from am_lightning.pretrain.runtime import run_lock
from am_lightning.pretrain.runtime.errors import require_counts


class RunCheckpoint(ModelCheckpoint):
    """Writes the checkpoints `step-N.ckpt` of a run, and `last.ckpt`, a link to the newest.

    A checkpoint is written every `every_n_train_steps` steps and after the last step. It is a file, or a folder if the
    strategy saves shards. It gets its name when it is whole, with a manifest of sizes and SHA-256. `last.ckpt` is a
    hard link to a file or a symbolic link to a folder. It is replaced by a rename, so that it is whole whenever the
    process is killed.

    ``ckpt_path="last"`` resumes from the newest whole checkpoint. Rank 0 reads it, passes over damaged ones, and all
    ranks load its choice. Checkpoints are loaded with ``weights_only=True``.

    Args:
        dirpath: folder of the checkpoints; default: `checkpoints` in the Trainer's default_root_dir.
        every_n_train_steps: optimizer steps between two checkpoints.
        keep: number of newest checkpoints to keep; default: all.
        asynchronous: continue the training while a checkpoint is written (default: False). It takes the size of the
            checkpoint in CPU memory.

    Attributes:
        save_at_batch_end: whether to save at the end of this batch. Another callback sets it on all ranks.
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
            enable_version_counter=False,
        )
        self.keep, self.asynchronous = keep, asynchronous
        self.save_at_batch_end = False
        self._last_is_wanted = False  # ckpt_path="last"
        self._writer: CheckpointWriter | None = None
        self._replacements = PatchedMethods()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.dirpath is None:
            self.dirpath = str(Path(trainer.default_root_dir, "checkpoints"))
        super().setup(trainer, pl_module, stage)
        self._undo()
        connector = trainer._checkpoint_connector
        self._replacements.add(connector, "resume_start", functools.partial(self._resume, trainer))
        if stage == "fit":
            self._writer = CheckpointWriter(trainer, self.asynchronous, self._publish)
            decide(lambda: take_folder(Path(str(self.dirpath))))

    # ------------------------------------------------------------------ saving
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self.save_at_batch_end:
            self.save_at_batch_end = False
            self.save_unless_saved(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save after the last step, which need not be a multiple of the interval."""
        self.save_unless_saved(trainer)
        self.wait()

    def wait(self) -> None:
        """Collective. Wait until the checkpoint in progress is written, or raise its error."""
        if self._writer is not None:
            self._writer.wait()

    def save_unless_saved(self, trainer: L.Trainer) -> None:
        """Collective. Save at the end of a batch or of a fit, unless this step is saved."""
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

    def _publish(self, path: Path) -> None:
        """Let last.ckpt link to `path`, and remove old checkpoints; on rank 0, in a thread if asynchronous."""
        replace_with_link(path, path.with_name(LAST))
        prune(path.parent.glob(STEPS), self.keep)

    # ------------------------------------------------------------------ resuming
    def _find_last_checkpoints(self, trainer: L.Trainer) -> set[str]:
        """Note that ckpt_path is "last", in which case Lightning calls this. _resume chooses later, on all ranks."""
        self._last_is_wanted = True
        folder = Path(str(self.dirpath or Path(trainer.default_root_dir, "checkpoints")))
        return {str(path) for path in newest_first([*folder.glob(STEPS), *folder.glob(LAST)])[:1]}

    def _resume(self, trainer: L.Trainer, original: Any, path: Any = None, weights_only: bool | None = None) -> None:
        """Call Lightning's resume_start with the checkpoint that rank 0 has chosen."""
        last, self._last_is_wanted = self._last_is_wanted, False

        def choose() -> str | None:
            found = chosen("last" if last else str(path), Path(str(self.dirpath))) if last or path else None
            if last and found and found.name != LAST and trainer.state.fn == "fit":
                # A kill came before _publish, or last.ckpt is damaged.
                if found.is_file() and not manifest_of(found).exists():
                    write_manifest(found)
                replace_with_link(found, found.with_name(LAST))
            return str(found) if found else None

        original(decide(choose), weights_only=True)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adapt the loop counters to this Trainer.

        Lightning restores the number of micro-batches. If accumulate_grad_batches has changed, the first step after the
        resume would get only a part of its micro-batches.
        """
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        batches = checkpoint["global_step"] * trainer.accumulate_grad_batches
        for counters in (progress["total"], progress["current"]):
            difference = batches - counters["ready"]
            for name in counters:
                counters[name] += difference

    def state_dict(self) -> dict[str, Any]:
        """Return no state, so that a run can be moved, and resumed with another interval."""
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
