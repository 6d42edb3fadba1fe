"""What a finished run tells its user: a few lines, and where to look."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import lightning as L
from lightning.pytorch.utilities import rank_zero_only

from am_lightning.pretrain.callbacks.throughput import TrainingMonitor
from am_lightning.pretrain.checkpoints import LAST
from am_lightning.pretrain.commands.report.events import read_curves
from am_lightning.pretrain.commands.report.plot import draw
from am_lightning.pretrain.commands.report.runs import RunData
from am_lightning.pretrain.data.text_data import TextData


@dataclass(frozen=True)
class RunResult:
    """Figures of a finished run.

    Attributes:
        root: the run's folder.
        log_dir: of the event file; None without a logger.
        steps: optimizer steps done in all.
        val_loss: nats per token after the last step; `perplexity` is its exponential.
        val_rows: rows that were scored.
        seconds: of training in this process, validations included.
        tokens_per_second: of training alone, all processes together; None where no step was taken.
    """

    root: Path
    log_dir: Path | None
    steps: int
    val_loss: float
    perplexity: float
    val_rows: int
    seconds: float
    tokens_per_second: float | None

    def validation(self) -> str:
        """The validation's figures in words."""
        loss = f"{self.val_loss:.4f} nats per token (perplexity {self.perplexity:.2f})"
        return f"{loss} on {self.val_rows} held-out rows"

    def drawn_as(self, name: str) -> RunData | None:
        """What a picture shows of the run; None without a logger."""
        if self.log_dir is None:
            return None
        return RunData(name, self.root, {}, read_curves(self.log_dir), self.val_loss)

    @classmethod
    def of(cls, trainer: L.Trainer, data: TextData, monitor: TrainingMonitor) -> RunResult:
        """Read the figures off a Trainer that has just fitted and validated."""
        rate = monitor.steps_per_second
        return cls(
            root=Path(trainer.default_root_dir),
            log_dir=Path(trainer.log_dir) if trainer.loggers and trainer.log_dir else None,
            steps=trainer.global_step,
            val_loss=float(trainer.callback_metrics["val/loss"]),
            perplexity=float(trainer.callback_metrics["val/perplexity"]),
            val_rows=data.scored_rows,
            seconds=monitor.seconds,
            tokens_per_second=None if rate is None else rate * data.batch_size * data.seq_len,
        )


@rank_zero_only
def print_validation(result: RunResult) -> None:
    """Print the figures of `validate`."""
    print(f"\n  {'validation loss':<16} {result.validation()}\n", flush=True)


@rank_zero_only
def print_summary(result: RunResult) -> None:
    """Print the figures and where things are; draw `summary.png` from the event file."""
    lines = [("validation loss", result.validation())]
    if result.tokens_per_second is None:
        lines.append(("training", f"{result.steps} steps were done already, none in this call"))
    else:
        speed = f"{result.tokens_per_second:,.0f} tokens per second".replace(",", " ")
        lines.append(("training", f"{result.steps} steps, {result.seconds:.1f} seconds in this call, {speed}"))
    if drawn := result.drawn_as(""):
        draw(result.root / "summary.png", [drawn])
        lines.append(("curves", f'{_tensorboard()} --logdir "{result.log_dir}"'))
        lines.append(("picture", str(result.root / "summary.png")))
    lines.append(("checkpoint", str(result.root / "checkpoints" / LAST)))
    lines.append(("next", next_commands(result.root)))
    print("\n" + "\n".join(f"  {name:<16} {text}" for name, text in lines) + "\n", flush=True)


def next_commands(root: Path) -> str:
    """What the model of the run in `root` can be used with now, in a line."""
    python = "python" if shutil.which("python") == sys.executable else sys.executable
    return f'{python} -m am_lightning.recipes sample "{root}" --prompt "def "; or export "{root}" DIR'


def _tensorboard() -> str:
    """The command, with its folder where the shell would not find it: an environment that is not activated."""
    beside = Path(sys.executable).with_name("tensorboard")
    return str(beside) if shutil.which("tensorboard") is None and beside.exists() else "tensorboard"
