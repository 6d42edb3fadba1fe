"""Run the programs of docs/start as their reader would, copied into an empty folder."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.python import PYTHON

ROOT = Path(__file__).resolve().parents[2]
START = ROOT / "docs" / "start"


def run_program(folder: Path, command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """Run ``python COMMAND`` in `folder`, which gets a copy of the program that the command names."""
    name = next(part for part in command if part.endswith(".py"))
    shutil.copy(START / name, folder / name)
    return run_python(folder, command, **variables)


def run_python(folder: Path, command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """Run ``python COMMAND`` in `folder`, which must succeed, on a machine without a GPU."""
    env = {key: value for key, value in os.environ.items() if key not in ("LOCAL_RANK", "RANK", "WORLD_SIZE")}
    env |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **variables}
    done = subprocess.run([PYTHON, *command], cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


def curves(folder: Path) -> dict[str, list[float]]:
    """Return tag -> values of all event files below `folder`."""
    found: dict[str, list[float]] = {}
    for path in folder.rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, []).extend(event.value for event in events.Scalars(tag))
    return found


def steps(folder: Path, ending: str) -> list[int]:
    """Return the points' steps, in order, of the tags with this ending."""
    found: list[int] = []
    for path in folder.rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        tags = [tag for tag in events.Tags()["scalars"] if tag.endswith(ending)]
        found += [event.step for tag in tags for event in events.Scalars(tag)]
    return sorted(found)


def betas(folder: Path) -> list[float]:
    """Return the points of the mean beta_t under any framework logger's prefix, or of a plain loop."""
    return [v for tag, values in curves(folder).items() if tag.endswith(("am/beta/mean", "beta")) for v in values]
