"""Commands of the recipe with a model small enough for a test, and helpers to compare the results."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.python import PYTHON

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
PRETRAIN = RECIPES / "pretrain.py"

TINY = {
    "model.hidden_size": 32,
    "model.intermediate_size": 64,
    "model.num_heads": 2,
    "model.num_layers": 2,
    "model.seq_len": 32,
    "data.val_rows": 8,
    "data.final_val_rows": 16,
    "data.val_batch_size": 8,
    "trainer.accelerator": "cpu",
    "trainer.enable_progress_bar": "false",
    "trainer.enable_model_summary": "false",
}


def arguments(root: Path, source: Path, steps: int, *extra: str, command: str = "fit") -> list[str]:
    """Return arguments of pretrain.py: the laptop recipe with a tiny model, `steps` steps, in the folder `root`."""
    settings = {
        **TINY,
        "trainer.devices": 1,
        "trainer.val_check_interval": 5,
        "data.source": source,
        "trainer.max_steps": steps,
        "trainer.default_root_dir": root,
    }
    args = [command, "--config", str(RECIPES / "configs" / "laptop.yaml")]
    for key, value in settings.items():
        args += [f"--{key}", str(value)]
    return [*args, *extra]


def run(args: list[str], cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run pretrain.py in a process of its own."""
    return subprocess.run(
        [PYTHON, str(PRETRAIN), *args],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        timeout=240,
    )


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


def differences(left: Any, right: Any, where: str = "") -> list[str]:
    """Return where two nested states differ in a bit."""
    if isinstance(left, torch.Tensor):
        same = isinstance(right, torch.Tensor) and left.dtype == right.dtype and torch.equal(left, right)
        return [] if same else [where]
    if isinstance(left, dict):
        if not isinstance(right, dict) or left.keys() != right.keys():
            return [where]
        return [place for key in left for place in differences(left[key], right[key], f"{where}.{key}")]
    if isinstance(left, (list, tuple)):
        if len(left) != len(right):
            return [where]
        pairs = enumerate(zip(left, right, strict=True))
        return [place for i, (a, b) in pairs for place in differences(a, b, f"{where}[{i}]")]
    return [] if left == right else [f"{where}: {left} {right}"]


def training_state(path: Path) -> dict[str, Any]:
    """Return the weights, optimizer and schedule of a checkpoint, which must not depend on interruptions."""
    checkpoint = load(path)
    return {key: checkpoint[key] for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step")}


def final_state(root: Path, step: int) -> dict[str, Any]:
    """Return all tensors of the checkpoint of the last step, by file; a file of Lightning's holds them all."""
    (path,) = [path for path in (root / "checkpoints").glob(f"*-*{step}*") if "manifest" not in path.name]
    if path.is_file():
        found = load(path)
        return {key: found[key] for key in ("state_dict", "optimizer_states", "lr_schedulers")}
    tensors = {file.name: load_file(file) for file in path.glob("*.safetensors")}
    return tensors | {file.name: load(file) for file in path.glob("optimizer.*")}
