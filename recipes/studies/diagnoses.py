"""What faults look like in the heat map of beta_t: ``python -m recipes.studies.diagnoses [--out DIR] [--steps N]``.

The laptop recipe, once as it is and once with each fault, from the same seed. About eight minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from PIL import Image

from am_lightning.pretrain.commands.report.events import PATTERN, last_picture, read_curves

ROOT = Path(__file__).resolve().parents[2]
_SHADES = 128  # of the pictures in the docs


class _Fault(L.Callback):
    """Acts before a step.

    Args:
        step: the first that it changes, from 0.
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
    """The block's output projections become 30 times as large."""

    def act(self, block: torch.nn.Module, batch: torch.Tensor) -> None:
        for name, param in block.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                param.mul_(30)


class Dead(_Fault):
    """The block's attention and MLP are switched off: their outputs, and so their gradients, are zero.

    Args:
        step: the first that it changes, from 0.
        layer: block of the model.
        left: the share of the outputs that is left, 0 to 1; also of the gradients.
    """

    def __init__(self, step: int, layer: int = 1, left: float = 0.0) -> None:
        super().__init__(step, layer)
        self.left = left

    def act(self, block: torch.nn.Module, batch: torch.Tensor) -> None:
        for part in (block.get_submodule("self_attn.o_proj"), block.get_submodule("mlp.down_proj")):
            part.register_forward_hook(lambda module, inputs, output: output * self.left)


class BadBatch(_Fault):
    """One batch is not text.

    Args:
        step: of the batch, from 0.
        token: that alone is in it; None: random tokens.
    """

    def __init__(self, step: int, token: int | None = None) -> None:
        super().__init__(step)
        self.token = token

    def act(self, block: torch.nn.Module, batch: torch.Tensor) -> None:
        noise = torch.randint(int(batch.max()) + 1, batch.shape, generator=torch.Generator().manual_seed(0))
        batch.copy_(noise if self.token is None else torch.full_like(noise, self.token))


class Run(NamedTuple):
    """One run.

    Attributes:
        name: of the picture.
        title: in the table.
        arguments: of ``pretrain.py fit``; ``{third}`` is a third of the steps.
    """

    name: str
    title: str
    arguments: tuple[str, ...]


def _acting(kind: str, **arguments: float) -> tuple[str, ...]:
    added = f"--trainer.callbacks+=recipes.studies.diagnoses.{kind}", "--trainer.callbacks.step={third}"
    return (*added, *(f"--trainer.callbacks.{name}={value}" for name, value in arguments.items()))


_TOO_HIGH, _WARMUP = "--model.optimizer.lr=0.03", "--model.warmup_fraction=0.33"
RUNS = (
    Run("healthy", "the recipe as it is", ()),
    Run("warmup", "warmup over the first third", (_WARMUP,)),
    Run("learning-rate", "30 times the learning rate", (_TOO_HIGH,)),
    Run("warmup-too-high", "30 times the learning rate, warmup over the first third", (_TOO_HIGH, _WARMUP)),
    Run("exploding", "block 1 explodes after a third", _acting("Exploding")),
    Run("dead", "block 1 dies after a third", _acting("Dead")),
    Run("faint", "block 1 fades to 1e-4 after a third", _acting("Dead", left=1e-4)),
    Run("bad-batch", "one batch after a third is one byte repeated", _acting("BadBatch", token=ord("#"))),
    Run("noise-batch", "one batch after a third is random bytes", _acting("BadBatch")),
)


def train(run: Run, folder: Path, steps: int, extra: list[str]) -> str:
    """Train, and return the line that the run ends with.

    Raises:
        RuntimeError: the run failed.
    """
    program, config = ROOT / "recipes" / "pretrain.py", ROOT / "recipes" / "configs" / "laptop.yaml"
    given = [argument.format(third=steps // 3) for argument in run.arguments]
    options = [f"--trainer.max_steps={steps}", f"--trainer.default_root_dir={folder}", "--data.source=stdlib"]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    command = [sys.executable, str(program), "fit", "--config", str(config), *options, *quiet, *given, *extra]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = re.search(r"AdaptiveMemory, am: (.*)", done.stdout + done.stderr)
    if done.returncode or not found:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return found[1]


def save_picture(folder: Path, path: Path) -> None:
    """The run's last heat map, in so few colours that the file is small."""
    picture = last_picture(sorted(folder.rglob(PATTERN)), "am/beta/layers")
    assert picture is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(io.BytesIO(picture)).convert("RGB").quantize(_SHADES).save(path, optimize=True)


def main(args: list[str] | None = None) -> None:
    """Run all, write ``NAME.png`` and ``diagnoses.md`` into ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/diagnoses"), help="folder of pictures and table")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of a run (%(default)s)")
    parser.add_argument("--only", nargs="*", choices=[run.name for run in RUNS], help="these runs alone")
    options, extra = parser.parse_known_args(args)
    rows = ["| run | validation loss | beta_t |", "|---|---|---|"]
    for run in RUNS:
        if options.only and run.name not in options.only:
            continue
        folder = (options.out / "runs" / run.name).resolve()
        line = train(run, folder, options.steps, extra)
        save_picture(folder, options.out / f"{run.name}.png")
        loss = read_curves(folder / "logs")["final/val_loss"].last
        rows.append(f"| {run.title} | {loss:.3f} | {line} |")
        print(rows[-1], flush=True)
    (options.out / "diagnoses.md").write_text("\n".join([*rows, ""]))


if __name__ == "__main__":
    main()
