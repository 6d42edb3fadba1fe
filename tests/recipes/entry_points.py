"""Run a recipe on two processes through each of its programs and engines, and read what it logged."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from tests.huggingface.events import scalars_in
from tests.ports import free_port
from tests.python import PYTHON
from tests.recipes.commands import RECIPES

ROOT = Path(__file__).resolve().parents[2]
ZERO = RECIPES / "configs" / "deepspeed"

Curve = dict[int, tuple[float, float]]  # step -> loss over all rows of the step, mean of beta_t over the tensors


@dataclass(frozen=True)
class EntryPoint:
    """A program, and the settings and variables that select the engine."""

    program: str
    settings: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)
    launcher: str | None = None  # in recipes/launch/; None: plain torchrun

    @property
    def lightning(self) -> bool:
        return self.program in ("pretrain.py", "lightning_fsdp2.py")


def _lightning(strategy: str, program: str = "pretrain.py", **options: object) -> EntryPoint:
    settings = ["--trainer.devices", "2", "--trainer.strategy", strategy]
    for key, value in options.items():
        settings += [f"--trainer.strategy.{key}", str(value)]
    return EntryPoint(program, tuple(settings))


def _accelerate(config: str) -> EntryPoint:
    variables = {"ACCELERATE_CONFIG": str(RECIPES / "launch" / "accelerate" / config), "ACCELERATE_USE_CPU": "true"}
    return EntryPoint("pretrain_accelerate.py", variables=variables, launcher="accelerate.sh")


def _deepspeed(stage: int) -> dict[str, str]:
    return {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(ZERO / f"zero{stage}.json"),
    }


ENTRY_POINTS = {
    "Lightning DDP": _lightning("ddp"),
    "Lightning FSDP2": _lightning(
        "lightning.pytorch.strategies.ModelParallelStrategy",
        "lightning_fsdp2.py",
        data_parallel_size=2,
        tensor_parallel_size=1,
    ),
    "Lightning DeepSpeed": _lightning("tests.deepspeed.entry_points.OnCPU", config=ZERO / "zero2.json"),
    "Accelerate DDP": _accelerate("ddp.yaml"),
    "Accelerate FSDP2": EntryPoint("accelerate_fsdp2.py"),
    "Accelerate DeepSpeed": _accelerate("deepspeed.yaml"),
    "Accelerate DeepSpeed 3": EntryPoint("pretrain_accelerate.py", variables=_deepspeed(3)),
    "HF Trainer DDP": EntryPoint("pretrain_hf_trainer.py"),
}


def launch(entry: EntryPoint, recipe: str, root: Path, settings: list[str]) -> subprocess.CompletedProcess[str]:
    """Train `recipe` on two processes; a first start of DeepSpeed compiles its operator, which takes minutes."""
    path = RECIPES / entry.program
    if not path.exists():
        path = Path(__file__).parent / entry.program
    port, variables = str(free_port()), _environment(entry)
    if entry.launcher is None:
        command = [PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += [str(path), "fit", "--config", recipe, "--trainer.default_root_dir", str(root)]
    else:
        command = [str(RECIPES / "launch" / entry.launcher)]
        variables |= {"PROGRAM": str(path), "CONFIG": recipe, "RUN_DIR": str(root), "PYTHON": PYTHON}
        variables |= {"NODES": "1", "GPUS_PER_NODE": "2", "MASTER_PORT": port, "MAX_RESTARTS": "0"}
    command += [*settings, *entry.settings, "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=900)


def _environment(entry: EntryPoint) -> dict[str, str]:
    launched = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {
        **{key: value for key, value in os.environ.items() if key not in launched},
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "TOKENIZERS_PARALLELISM": "false",
        **entry.variables,
    }


def curve_of(entry: EntryPoint, root: Path) -> Curve:
    """Return what a run logged by step; Lightning counts steps from 0 when it logs."""
    curves, shift = scalars_in(root / "logs"), int(entry.lightning)
    return {step + shift: (loss, curves["am/beta/mean"][step]) for step, loss in curves["train/loss"].items()}
