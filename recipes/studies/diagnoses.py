"""What faults look like in the heat map of beta_t: ``python -m recipes.studies.diagnoses [--out DIR] [--steps N]``.

The laptop recipe, once as it is and once with each fault, from the same seed. About four minutes on two idle cores.
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


class _From(L.Callback):
    """Acts on the model from a step on.

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
                self.act(pl_module.get_submodule(f"model.model.layers.{self.layer}"))

    def act(self, block: torch.nn.Module) -> None:
        raise NotImplementedError


class Exploding(_From):
    """The block's output projections become 30 times as large."""

    def act(self, block: torch.nn.Module) -> None:
        for name, param in block.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                param.mul_(30)


class Dead(_From):
    """The block's attention and MLP are switched off: their outputs, and so their gradients, are zero."""

    def act(self, block: torch.nn.Module) -> None:
        for part in (block.get_submodule("self_attn.o_proj"), block.get_submodule("mlp.down_proj")):
            part.register_forward_hook(lambda module, inputs, output: output * 0)


class Fault(NamedTuple):
    """One run.

    Attributes:
        name: of the picture.
        title: in the table.
        arguments: of ``pretrain.py fit``; ``{third}`` is a third of the steps.
    """

    name: str
    title: str
    arguments: tuple[str, ...]


def _acting(kind: str) -> tuple[str, ...]:
    return (f"--trainer.callbacks+=recipes.studies.diagnoses.{kind}", "--trainer.callbacks.step={third}")


FAULTS = (
    Fault("healthy", "the recipe as it is", ()),
    Fault("warmup", "warmup over the first third", ("--model.warmup_fraction=0.33",)),
    Fault("learning-rate", "learning rate 30 times too high", ("--model.optimizer.lr=0.03",)),
    Fault("exploding", "block 1 explodes after a third", _acting("Exploding")),
    Fault("dead", "block 1 dies after a third", _acting("Dead")),
)


def train(fault: Fault, folder: Path, steps: int, extra: list[str]) -> str:
    """Train, and return the line that the run ends with.

    Raises:
        RuntimeError: the run failed.
    """
    program, config = ROOT / "recipes" / "pretrain.py", ROOT / "recipes" / "configs" / "laptop.yaml"
    given = [argument.format(third=steps // 3) for argument in fault.arguments]
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
    parser.add_argument("--only", nargs="*", choices=[fault.name for fault in FAULTS], help="these runs alone")
    options, extra = parser.parse_known_args(args)
    rows = ["| run | validation loss | beta_t |", "|---|---|---|"]
    for fault in FAULTS:
        if options.only and fault.name not in options.only:
            continue
        folder = (options.out / "runs" / fault.name).resolve()
        line = train(fault, folder, options.steps, extra)
        save_picture(folder, options.out / f"{fault.name}.png")
        loss = read_curves(folder / "logs")["final/val_loss"].last
        rows.append(f"| {fault.title} | {loss:.3f} | {line} |")
        print(rows[-1], flush=True)
    (options.out / "diagnoses.md").write_text("\n".join([*rows, ""]))


if __name__ == "__main__":
    main()
