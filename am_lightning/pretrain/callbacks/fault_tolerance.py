"""FaultTolerance: turns signals into a checkpoint at the end of a step, a SLURM requeue and an exit status."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn

from am_lightning.lightning.patched_methods import PatchedMethods
from am_lightning.pretrain.checkpoints import RunCheckpoint
from am_lightning.pretrain.checkpoints.resume import LAST
from am_lightning.pretrain.runtime.collectives import Agreement, limit_waits
from am_lightning.pretrain.runtime.errors import require, require_counts
from am_lightning.pretrain.runtime.stop_signals import SIGNALS, Stopped, StopSignals, end_process

_INTERACTIVE = ("bash", "zsh", "interactive")


class FaultTolerance(L.Callback):
    """On SIGINT (Ctrl-C), SIGTERM or SIGUSR1, saves at the end of the optimizer step and ends the run on all ranks.

    The handler only notes the signal. At the end of a step one all-reduce of an integer tells all ranks, whichever was
    signalled. So no collective is interrupted, and the checkpoint is that of an unbroken run. Several ranks on
    accelerators read the answer one step later, so that the host does not wait for the device. They read it at once in
    the last step, before a validation and where the Trainer logs. Then all ranks save and leave `fit` with ``Stopped``:
    status 130 after SIGINT, 143 after SIGTERM, 138 after SIGUSR1 (128 + the number of the signal). They also do so at
    the end of training, if a signal has come since. After SIGUSR1 in a SLURM job, rank 0 runs `scontrol requeue` first.

    A second SIGINT after more than 1 s, or SIGTERM after more than 5 s, ends the process at once. Outside training, and
    in `validate`, any signal does, because there is nothing to save; a SLURM job is requeued before.

    Lightning's own handlers are not installed. On SIGTERM they start a collective, and on SIGUSR1 under SLURM they save
    in the middle of a step. Lightning's broadcast before every batch is left out, too.

    Args:
        check_every_n_steps: optimizer steps between two agreements (default: 1). Each is an all-reduce of 4 bytes, and
            free for a single process. Raise it if a step takes less than about 10 ms.
        requeue: run `scontrol requeue` after SIGUSR1 in a SLURM batch job (default: True).
        hang_timeout_s: seconds that a collective waits for another rank before the run ends with an error; default:
            that of the strategy (30 minutes). Must be longer than a checkpoint and the preparation of the data take.
        flight_recorder: let NCCL keep the last 2000 collectives of each rank (default: True). They are written to
            `default_root_dir`/flight_recorder, for `torchfrtrace`, if one times out. Environment variables that are
            already set are not changed.

    Raises:
        RecipeError: if an argument is out of range.
        Stopped: from `fit`, on every rank.
    """

    def __init__(
        self,
        check_every_n_steps: int = 1,
        requeue: bool = True,
        hang_timeout_s: float | None = None,
        flight_recorder: bool = True,
    ) -> None:
        require_counts("fault_tolerance", check_every_n_steps=check_every_n_steps)
        positive = hang_timeout_s is None or hang_timeout_s > 0
        require(positive, "fault_tolerance.hang_timeout_s", hang_timeout_s, "> 0, or null")
        self.check_every_n_steps, self.requeue = check_every_n_steps, requeue
        self.hang_timeout_s, self.flight_recorder = hang_timeout_s, flight_recorder
        self._signals = StopSignals(self._end_at_once, self._tell)
        self._agreed: signal.Signals | None = None
        self._agreement: Agreement | None = None
        self._last_step = 0
        self._trainer: L.Trainer  # the Trainer of the fit, set before signals are received
        self._replacements = PatchedMethods()

    @staticmethod
    def prepare(trainer: L.Trainer) -> None:
        """Call it between Trainer(...) and fit: `hang_timeout_s` and `flight_recorder` are read as the process group
        starts, and signals are handled from here on, while the data may be prepared."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, FaultTolerance):
                callback._watch_for_hangs(trainer)
                callback._take_signals(trainer)

    def _watch_for_hangs(self, trainer: L.Trainer) -> None:
        if self.hang_timeout_s is not None and hasattr(trainer.strategy, "_timeout"):  # DDP, FSDP, DeepSpeed, ...
            trainer.strategy._timeout = timedelta(seconds=self.hang_timeout_s)
        several = isinstance(trainer.strategy, ParallelStrategy)
        if self.flight_recorder and several and trainer.strategy.root_device.type == "cuda":
            _record_collectives(Path(trainer.default_root_dir, "flight_recorder"))

    # ------------------------------------------------------------------ handlers
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Take the signals. Lightning would take them later, just before it trains or validates."""
        self._replacements.undo()
        self._replacements.add(trainer._signal_connector, "register_signal_handlers", lambda original: None)
        self._replacements.add(trainer.fit_loop.epoch_loop, "_broadcast_sigterm_tensor", lambda original: None)
        self._take_signals(trainer)

    def _take_signals(self, trainer: L.Trainer) -> None:
        self._trainer, self._signals.later = trainer, False
        if self._agreed is not None:  # this process has caught the Stopped of an earlier fit
            self._agreed = None
            self._signals.forget()
        if not self._signals.take():
            rank_zero_warn("FaultTolerance: fit does not run in the main thread, so signals cannot be handled")

    def _tell(self, number: int) -> None:
        if self._agreed is None and self._trainer.is_global_zero:
            name = signal.Signals(number).name
            with contextlib.suppress(OSError):  # nobody may read stderr any more, and this thread must not end
                os.write(2, f"{name}: stopping with a checkpoint at the end of this step\n".encode())

    def _end_at_once(self, number: int, why: str) -> None:
        """End the process. Outside training, rank 0 requeues a job first, and SLURM then ends the other ranks.

        Other ranks do not end before that, because SLURM would end rank 0 with them. If rank 0 got no signal, all ranks
        agree after the first step.
        """
        if not self._signals.later and number == signal.SIGUSR1 and self._in_batch_job():
            if not self._trainer.is_global_zero:
                return
            self._requeue()
        _kill_ranks_of(self._trainer)
        end_process(number, why)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set the timeout of all process groups. Those of a device mesh do not take it from the strategy."""
        limit_waits(self.hang_timeout_s)

    # ------------------------------------------------------------------ agreeing and saving
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Ask once, so that the connections of the group exist before the first step."""
        self._agreement = Agreement(trainer.strategy.root_device, trainer.world_size)
        self._agreement.ask(0, now=True)
        self._last_step = trainer.global_step
        self._signals.later = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save after whole steps only. A part of an accumulated gradient is in no checkpoint."""
        step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        if step == self._last_step or self._agreed is not None:
            return
        self._last_step = step
        waits_anyway = bool(every and step % every == 0) or step == trainer.max_steps or trainer.is_last_batch
        asks, now = step % self.check_every_n_steps == 0, waits_anyway or _validation_is_near(trainer)
        self._agreed = self._ask(asks=asks, now=now)
        if self._agreed is not None:
            self._save(trainer, at_end=False)

    def _ask(self, *, asks: bool, now: bool) -> signal.Signals | None:
        """Collective. Return the signal that the ranks agreed on. ``asks``: report those of this rank, too."""
        assert self._agreement is not None
        mine = max((SIGNALS.index(signal.Signals(n)) + 1 for n in self._signals.received), default=0)
        found = self._agreement.ask(mine if asks else None, now=now)
        return SIGNALS[found - 1] if found else None

    def _save(self, trainer: L.Trainer, *, at_end: bool) -> None:
        callback = trainer.checkpoint_callback
        if not isinstance(callback, RunCheckpoint):
            trainer.save_checkpoint(Path(getattr(callback, "dirpath", None) or trainer.default_root_dir, LAST))
        elif at_end:
            callback.save_unless_saved(trainer)
        else:
            callback.save_at_batch_end = True  # its hook runs after those of all other callbacks

    # ------------------------------------------------------------------ leaving
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Leave here and not in the hook that saves: loggers get the values of the step after that one."""
        self._leave(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._leave(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Ask about a signal in a last step that was not `max_steps`, or in the validation after it."""
        if self._signals.later and self._agreed is None:
            self._agreed = self._ask(asks=True, now=True)
            if self._agreed is not None:
                self._save(trainer, at_end=True)
        self._leave(trainer)
        self._signals.later = False

    def _leave(self, trainer: L.Trainer) -> None:
        """Raise Stopped on all ranks together if they agreed on a signal."""
        if self._agreed is None:
            return
        if isinstance(trainer.checkpoint_callback, RunCheckpoint):
            trainer.checkpoint_callback.wait()
        if trainer.is_global_zero:
            text = f"stopped by {self._agreed.name} at step {self._last_step}; --ckpt_path last resumes from there"
            print(text, file=sys.stderr, flush=True)
            if self._agreed == signal.SIGUSR1 and self._in_batch_job():
                self._requeue()
        trainer.strategy.barrier("FaultTolerance")  # SLURM ends the whole step as soon as one of its processes ends
        raise Stopped(0 if _is_lightnings_child(trainer) else 128 + self._agreed)

    def _in_batch_job(self) -> bool:
        return self.requeue and "SLURM_JOB_ID" in os.environ and os.environ.get("SLURM_JOB_NAME") not in _INTERACTIVE

    def _requeue(self) -> None:
        job = os.environ["SLURM_JOB_ID"]
        if "SLURM_ARRAY_JOB_ID" in os.environ:
            job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
        scontrol = shutil.which("scontrol") or "scontrol"
        try:
            result = subprocess.run([scontrol, "requeue", job], capture_output=True, text=True, timeout=60)
            problem = result.stderr.strip() if result.returncode else None
        except (OSError, subprocess.TimeoutExpired) as error:
            problem = str(error)
        told = f"not requeued ({problem}): submit it with --requeue, or again by hand" if problem else "requeued"
        print(f"SLURM job {job}: {told}", file=sys.stderr, flush=True)

    # ------------------------------------------------------------------ putting things back
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Do what Lightning leaves out after an exception: end the ranks that it started, and tear down."""
        if isinstance(exception, Exception):  # Stopped is no Exception: all ranks raise it and end by themselves
            _kill_ranks_of(trainer)
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._replacements.undo()
        if self._agreed is None:  # a second signal to a process that is leaving is not a new one
            self._signals.later = False
            self._signals.give_back()


def _kill_ranks_of(trainer: L.Trainer) -> None:
    """End the ranks that Lightning has started from this process. One of them may hang."""
    if trainer.strategy.launcher is not None:
        with contextlib.suppress(OSError):
            trainer.strategy.launcher.kill(signal.SIGKILL)


def _record_collectives(folder: Path) -> None:
    """Set the variables that are read when a process group starts. torch 2.6 and 2.7 know the old names only, and newer
    releases warn about them."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    recent = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9)
    for name, old, value in (
        ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE", "2000"),
        ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE", str(folder / "rank_")),  # torch appends the rank
    ):
        if not {name, old} & os.environ.keys():
            os.environ[name if recent else old] = value


def _validation_is_near(trainer: L.Trainer) -> bool:
    """Return whether a validation may begin before the next step ends. At the end of an epoch, is_last_batch is set."""
    every = trainer.val_check_batch
    if not every or math.isinf(every):
        return False
    loop = trainer.fit_loop
    batches = loop.total_batch_idx if trainer.check_val_every_n_epoch is None else loop.batch_idx
    return any((batches + 1 + more) % every == 0 for more in range(trainer.accumulate_grad_batches))


def _is_lightnings_child(trainer: L.Trainer) -> bool:
    """Return whether rank 0 has started this process, which must end with 0 then: otherwise Lightning kills rank 0."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    return environment is not None and not environment.creates_processes_externally and environment.local_rank() > 0
