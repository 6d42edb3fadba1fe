"""Faults in the heat map of beta_t: ``python -m recipes.studies.diagnoses [--out DIR] [--steps N]``.

Trains the laptop recipe without its warmup, at the learning rate 0.001, once without a fault and once with each, from
the same seed. Takes about eight minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import io
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from PIL import Image

from am_lightning.pretrain.commands.report.events import PATTERN, last_picture, read_files

ROOT = Path(__file__).resolve().parents[2]
_COLOURS = 128  # few colours keep the files of the docs' pictures small


class _Fault(L.Callback):
    """Acts on a block and a batch before a step.

    Args:
        step: first step that it changes, from 0.
        layer: block of the model.
    """

    def __init__(self, step: int, layer: int = 1) -> None:
        self.step, self.layer = step, layer

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            with torch.no_grad():
                self.act(pl_module.get_submodule(f"model.model.layers.{self.layer}"), batch)

    def act(self, block: torch.nn.Module, batch: torch.Tensor) -> None:
        raise NotImplementedError


class Exploding(_Fault):
    """Multiplies the block's output projections by 30."""

    def act(self, block: torch.nn.Module, batch: torch.Tensor) -> None:
        for name, param in block.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                param.mul_(30)


class Dead(_Fault):
    """Multiplies the outputs of the block's attention and MLP, and thereby their gradients, by a factor.

    Args:
        step: first step that it changes, from 0.
        layer: block of the model.
        left: factor, 0 to 1. 0 switches the block off.
    """

    def __init__(self, step: int, layer: int = 1, left: float = 0.0) -> None:
        super().__init__(step, layer)
        self.left = left

    def act(self, block: torch.nn.Module, batch: torch.Tensor) -> None:
        for part in (block.get_submodule("self_attn.o_proj"), block.get_submodule("mlp.down_proj")):
            part.register_forward_hook(lambda module, inputs, output: output * self.left)


class BadBatch(_Fault):
    """Replaces a batch.

    Args:
        step: step of the batch, from 0.
        token: token that fills the batch. None: random tokens.
    """

    def __init__(self, step: int, token: int | None = None) -> None:
        super().__init__(step)
        self.token = token

    def act(self, block: torch.nn.Module, batch: torch.Tensor) -> None:
        noise = torch.randint(int(batch.max()) + 1, batch.shape, generator=torch.Generator().manual_seed(0))
        batch.copy_(noise if self.token is None else torch.full_like(noise, self.token))


def _acting(kind: str, **arguments: float) -> tuple[str, ...]:
    added = f"--trainer.callbacks+=recipes.studies.diagnoses.{kind}", "--trainer.callbacks.step={third}"
    return (*added, *(f"--trainer.callbacks.{name}={value}" for name, value in arguments.items()))


_WITHOUT_WARMUP = "--model.warmup_fraction=0", "--model.optimizer.lr=0.001"
_TOO_HIGH, _WARMUP = "--model.optimizer.lr=0.03", "--model.warmup_fraction=0.33"
# Name of the picture -> title in the table, and arguments of ``pretrain.py fit``; {third} is a third of the steps.
RUNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "healthy": ("no fault", ()),
    "warmup": ("warmup over the first third", (_WARMUP,)),
    "learning-rate": ("30 times the learning rate", (_TOO_HIGH,)),
    "warmup-too-high": ("30 times the learning rate, warmup over the first third", (_TOO_HIGH, _WARMUP)),
    "exploding": ("block 1 explodes after a third", _acting("Exploding")),
    "dead": ("block 1 dies after a third", _acting("Dead")),
    "faint": ("block 1 fades to 1e-4 after a third", _acting("Dead", left=1e-4)),
    "bad-batch": ("one batch after a third is one byte repeated", _acting("BadBatch", token=ord("#"))),
    "noise-batch": ("one batch after a third is random bytes", _acting("BadBatch")),
}


def train(arguments: Sequence[str], folder: Path, steps: int, extra: list[str]) -> str:
    """Train, and return the summary of beta_t at the end of the run.

    Raises:
        RuntimeError: if the run failed.
    """
    program, config = ROOT / "recipes" / "pretrain.py", ROOT / "recipes" / "configs" / "laptop.yaml"
    given = [argument.format(third=steps // 3) for argument in arguments]
    options = [f"--trainer.max_steps={steps}", f"--trainer.default_root_dir={folder}", "--data.source=stdlib"]
    options += _WITHOUT_WARMUP
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    command = [sys.executable, str(program), "fit", "--config", str(config), *options, *quiet, *given, *extra]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = re.search(r"AdaptiveMemory, am: (.*)", done.stdout + done.stderr)
    if done.returncode or not found:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return found[1]


def main(args: list[str] | None = None) -> None:
    """Run all, and write ``NAME.png`` and ``diagnoses.md`` into ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/diagnoses"), help="folder of pictures and table")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of a run (%(default)s)")
    parser.add_argument("--only", nargs="*", choices=RUNS, help="only these runs")
    options, extra = parser.parse_known_args(args)
    rows = ["| run | validation loss | beta_t |", "|---|---|---|"]
    for name in options.only or RUNS:
        title, arguments = RUNS[name]
        folder = (options.out / "runs" / name).resolve()
        line = train(arguments, folder, options.steps, extra)
        picture = last_picture(sorted(folder.rglob(PATTERN)), "am/beta/layers")
        assert picture is not None
        image = Image.open(io.BytesIO(picture)).convert("RGB").quantize(_COLOURS)
        image.save(options.out / f"{name}.png", optimize=True)
        loss = read_files((folder / "logs").glob(PATTERN))["final/val_loss"].last
        rows.append(f"| {title} | {loss:.3f} | {line} |")
        print(rows[-1], flush=True)
    (options.out / "diagnoses.md").write_text("\n".join([*rows, ""]))


if __name__ == "__main__":
    main()
