"""FaultTolerance: a signal becomes a checkpoint at a step's end, a requeue under SLURM, and an exit status."""

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
from am_lightning.pretrain.checkpoints import LAST, RunCheckpoint
from am_lightning.pretrain.runtime.collective_errors import Agreement, limit_waits
from am_lightning.pretrain.runtime.errors import require, require_counts
from am_lightning.pretrain.runtime.stop_signals import SIGNALS, StopSignals, end_process

_INTERACTIVE = ("bash", "zsh", "interactive")


class Stopped(SystemExit):
    """Training was stopped by a signal after a checkpoint was written; `code` is the process's exit status."""


class FaultTolerance(L.Callback):
    """Turns SIGINT (Ctrl-C), SIGTERM and SIGUSR1 into a checkpoint at the end of an optimizer step, then ends the run
    on all ranks.

    A handler only notes the signal. At the end of a step the ranks agree by one all-reduce of an integer, whichever of
    them was signalled; so no collective is torn apart, and what the checkpoint holds is what an unbroken run held
    there. Several ranks on accelerators know the answer at the end of the next step, so that the host never waits for
    the device (at once in the last step, before a validation, and where the Trainer logs). Then all ranks save, and
    leave `fit` with ``Stopped``: status 130 after SIGINT, 143 after SIGTERM, 138 after SIGUSR1 (128 + the signal's
    number, the shell's convention); so they do where training ends, for a signal that came since. After SIGUSR1 in a
    SLURM job rank 0 runs `scontrol requeue` before anyone leaves. A second SIGINT more than 1 s, or SIGTERM more than
    5 s, after the first ends the process at once. Before training starts and after it has ended, in `validate` too,
    there is nothing to save: the process ends at once, after `scontrol requeue` where that is asked for.

    It takes the place of Lightning's own handlers (SIGTERM: a collective inside the handler; SIGUSR1 under SLURM: a
    checkpoint inside the handler, in the middle of a step) and of its broadcast before every batch.

    Args:
        check_every_n_steps: optimizer steps between two agreements. Each costs an all-reduce of 4 bytes; raise it where
            steps take less than about 10 ms. One process agrees with itself at no cost.
        requeue: run `scontrol requeue` after SIGUSR1 in a SLURM batch job.
        hang_timeout_s: seconds that a collective may wait for another rank; then the run ends with an error. None: the
            strategy's own (30 minutes). Above what a checkpoint, and the preparation of the data, take.
        flight_recorder: NCCL's flight recorder: each rank keeps its last 2000 collectives, and writes them below
            `default_root_dir`/flight_recorder when one times out; `torchfrtrace` reads them. Variables of the
            environment that are set already stay.

    Raises:
        RecipeError: an argument is out of range.
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
        self._trainer: L.Trainer | None = None
        self._replacements = PatchedMethods()

    @staticmethod
    def prepare(trainer: L.Trainer) -> None:
        """Between Trainer(...) and fit: what must be known before the process group starts, the two last arguments.

        Signals are handled from here on, to the end of fit: the data may be prepared in between.
        """
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
        """Take the signals; Lightning would take them later, just before it trains or validates."""
        self._replacements.undo()
        self._replacements.add(trainer._signal_connector, "register_signal_handlers", _nothing)
        self._replacements.add(trainer.fit_loop.epoch_loop, "_broadcast_sigterm_tensor", _nothing)
        self._take_signals(trainer)

    def _take_signals(self, trainer: L.Trainer) -> None:
        """Once in a process; also what came before."""
        self._trainer, self._signals.later = trainer, False
        if self._agreed is not None:  # a fit of this process was stopped, which went on nevertheless
            self._agreed = None
            self._signals.forget()
        if not self._signals.take():
            rank_zero_warn("FaultTolerance: fit does not run in the main thread, so that signals cannot be handled")

    def _tell(self, number: int) -> None:
        if self._agreed is None and self._is_first_rank():
            name = signal.Signals(number).name
            with contextlib.suppress(OSError):  # nobody reads stderr any more; the thread must live on
                os.write(2, f"{name}: stopping with a checkpoint at the end of this step\n".encode())

    def _end_at_once(self, number: int, why: str) -> None:
        """Outside training there is nothing to save, and preparing the data may take longer than the scheduler waits.

        Where the job is to be requeued, rank 0 does it, and with the job SLURM ends the others: one that ended before
        would take rank 0 with it. If rank 0 was not signalled, all agree after the first step.
        """
        if not self._signals.later and number == signal.SIGUSR1 and self._in_batch_job():
            if not self._is_first_rank():
                return
            self._requeue()
        launcher = self._trainer.strategy.launcher if self._trainer else None
        if launcher is not None:
            with contextlib.suppress(OSError):
                launcher.kill(signal.SIGKILL)  # the ranks that this process has started
        end_process(number, why)

    def _is_first_rank(self) -> bool:
        return self._trainer is None or self._trainer.is_global_zero

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """All process groups are there: a device mesh's have the default timeout, whatever the strategy's is."""
        limit_waits(self.hang_timeout_s)

    # ------------------------------------------------------------------ agreeing and saving
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The first question makes the group's connections, which a step need not wait for then."""
        self._agreement = Agreement(trainer.strategy.root_device, trainer.world_size)
        self._agreement.ask(0, now=True)
        self._last_step = trainer.global_step
        self._signals.later = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Whole steps only: a part of an accumulated gradient is in no checkpoint."""
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        if self._agreed is None:
            self._agreed = self._agree(trainer)
            if self._agreed is not None:
                self._save(trainer)

    def _agree(self, trainer: L.Trainer) -> signal.Signals | None:
        step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        due = step % self.check_every_n_steps == 0
        waits_anyway = bool(every and step % every == 0) or step == trainer.max_steps or trainer.is_last_batch
        return self._ask(asks=due, now=waits_anyway or _validation_is_near(trainer))

    def _ask(self, *, asks: bool, now: bool) -> signal.Signals | None:
        """Collective. ``asks``: say which signals came, too; else only hear what was said before."""
        assert self._agreement is not None
        mine = max((SIGNALS.index(signal.Signals(n)) + 1 for n in self._signals.received), default=0)
        found = self._agreement.ask(mine if asks else None, now=now)
        return SIGNALS[found - 1] if found else None

    def _save(self, trainer: L.Trainer, *, at_end: bool = False) -> None:
        callback = trainer.checkpoint_callback
        if isinstance(callback, RunCheckpoint):
            if at_end:
                callback.save_unless_saved(trainer)
            else:
                callback.save_at_batch_end = True  # its turn comes after all other callbacks'
        else:
            folder = getattr(callback, "dirpath", None) or trainer.default_root_dir
            trainer.save_checkpoint(Path(folder) / LAST)

    # ------------------------------------------------------------------ leaving
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Not in the hook that saves: the loggers get the step's point after it."""
        self._leave(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._leave(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A last question: of the last step, where it was another than `max_steps`, and of the validation after it."""
        if self._signals.later and self._agreed is None:
            self._agreed = self._ask(asks=True, now=True)
            if self._agreed is not None:
                self._save(trainer, at_end=True)
        self._leave(trainer)
        self._signals.later = False

    def _leave(self, trainer: L.Trainer) -> None:
        """All ranks together, where a signal was agreed on."""
        if self._agreed is None:
            return
        if isinstance(trainer.checkpoint_callback, RunCheckpoint):
            trainer.checkpoint_callback.wait()
        if trainer.is_global_zero:
            print(
                f"stopped by {self._agreed.name} at step {self._last_step}; --ckpt_path last goes on from there",
                file=sys.stderr,
                flush=True,
            )
            if self._agreed == signal.SIGUSR1 and self._in_batch_job():
                self._requeue()
        trainer.strategy.barrier("FaultTolerance")  # SLURM ends the whole step as soon as one of its processes ends
        raise Stopped(0 if _is_lightnings_child(trainer) else 128 + self._agreed)

    def _in_batch_job(self) -> bool:
        """Whether SIGUSR1 means a requeue."""
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
        """Lightning makes no teardown after an exception; and it leaves the ranks that it started to themselves."""
        launcher = trainer.strategy.launcher
        if launcher is not None and isinstance(exception, Exception):  # not Stopped: those write and leave as we do
            with contextlib.suppress(OSError):
                launcher.kill(signal.SIGKILL)  # one of them may be what hangs
        self._restore()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._restore()

    def _restore(self) -> None:
        self._replacements.undo()
        if self._agreed is None:  # a process that is leaving takes no second signal for a fresh one
            self._signals.later = False
            self._signals.give_back()


def _record_collectives(folder: Path) -> None:
    """Read when a process group starts. torch 2.6 and 2.7 know the old names alone, of which newer ones warn."""
    size, file = "TORCH_FR_BUFFER_SIZE", "TORCH_FR_DUMP_TEMP_FILE"
    old = {size: "TORCH_NCCL_TRACE_BUFFER_SIZE", file: "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"}
    values = {size: "2000", file: str(folder / "rank_")}  # the rank's number follows
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    folder.mkdir(parents=True, exist_ok=True)
    recent = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9)
    for name, value in values.items():
        if not {name, old[name]} & os.environ.keys():
            os.environ[name if recent else old[name]] = value


def _validation_is_near(trainer: L.Trainer) -> bool:
    """It may begin before the next step ends. At an epoch's end the batch is the last one, which all ranks know."""
    every = trainer.val_check_batch
    if not every or math.isinf(every):
        return False
    loop = trainer.fit_loop
    batches = loop.total_batch_idx if trainer.check_val_every_n_epoch is None else loop.batch_idx
    return any((batches + 1 + more) % every == 0 for more in range(trainer.accumulate_grad_batches))


def _nothing(original: Any) -> None:
    pass


def _is_lightnings_child(trainer: L.Trainer) -> bool:
    """One of the processes that rank 0 has started. It must end with 0: Lightning kills rank 0 where one does not."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    return environment is not None and not environment.creates_processes_externally and environment.local_rank() > 0
