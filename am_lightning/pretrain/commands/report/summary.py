"""The summary that a finished run prints."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from am_lightning.pretrain.callbacks.throughput import TrainingMonitor, perplexity
from am_lightning.pretrain.checkpoints.resume import LAST
from am_lightning.pretrain.commands.report.events import PATTERN, read_files
from am_lightning.pretrain.commands.report.plot import report_figure, save
from am_lightning.pretrain.commands.report.runs import RunData
from am_lightning.pretrain.data.text_data import TextData


@dataclass(frozen=True)
class RunResult:
    """A finished run."""

    root: Path  # the run's folder
    log_dir: Path | None  # folder of the event files; None without a TensorBoardLogger
    val_loss: float  # nats per token after the last step

    def drawn_as(self, name: str) -> RunData | None:
        """Return what a picture shows of the run; None without event files."""
        files = list(self.log_dir.glob(PATTERN)) if self.log_dir else []
        return RunData(name, self.root, {}, read_files(files)) if files else None

    @classmethod
    def of(cls, trainer: L.Trainer) -> RunResult:
        """Return the result of a Trainer that has just fitted and validated."""
        log_dir = next((Path(each.log_dir) for each in trainer.loggers if isinstance(each, TensorBoardLogger)), None)
        return cls(Path(trainer.default_root_dir), log_dir, float(trainer.callback_metrics["val/loss"]))


@rank_zero_only
def print_validation(loss: float, rows: int, **lines: str) -> None:
    """Print a loss in nats per token, the number of rows that it is the mean over, and further `lines` by heading."""
    text = f"{loss:.4f} nats per token (perplexity {perplexity(loss):.2f}) on {rows} held-out rows"
    shown = {"validation loss": text, **lines}
    print("\n" + "".join(f"  {name:<16} {line}\n" for name, line in shown.items()), flush=True)


@rank_zero_only
def print_summary(result: RunResult, trainer: L.Trainer, data: TextData, monitor: TrainingMonitor) -> None:
    """Print the figures of a finished run and the paths of its files; draw `summary.png` from the event files."""
    training = f"{trainer.global_step} steps were done already, none in this call"
    if monitor.steps_per_second is not None:
        rate = monitor.steps_per_second * data.batch_size * data.seq_len
        speed = f"{rate:,.0f} tokens per second".replace(",", " ")
        training = f"{trainer.global_step} steps, {monitor.seconds:.1f} seconds in this call, {speed}"
    lines = {"training": training}
    if drawn := result.drawn_as(""):
        picture = result.root / "summary.png"
        save(report_figure([drawn], curves=False), picture)
        lines |= {"curves": f'{_tensorboard()} --logdir "{result.log_dir}"', "picture": str(picture)}
    checkpoints = Path(getattr(trainer.checkpoint_callback, "dirpath", None) or result.root)
    lines |= {"checkpoint": str(checkpoints / LAST), "next": next_commands(result.root)}
    print_validation(result.val_loss, data.scored_rows, **lines)


def next_commands(root: Path) -> str:
    """Return a line with the commands that use the model of the run in `root`."""
    python = "python" if shutil.which("python") == sys.executable else sys.executable
    return f'{python} -m am_lightning.recipes sample "{root}" --prompt "def "; or export "{root}" DIR'


def _tensorboard() -> str:
    """Return the command, with its folder if the shell would not find it in an environment that is not activated."""
    beside = Path(sys.executable).with_name("tensorboard")
    return str(beside) if shutil.which("tensorboard") is None and beside.exists() else "tensorboard"
