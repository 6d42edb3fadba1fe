"""Which checkpoint to go on from: the newest whole one, and errors that name it."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from am_lightning.pretrain.checkpoints.manifest import damage, manifest_at
from am_lightning.pretrain.runtime.errors import RecipeError

LAST = "last.ckpt"
STEPS = "step-*.ckpt"
_NOT_OURS = (RuntimeError, OSError, EOFError, KeyError, TypeError, pickle.UnpicklingError)
_METADATA = "meta.pt"  # Lightning's name for what is not sharded, in a folder of shards


def newest_whole(
    folder: Path, patterns: Sequence[str] = (STEPS, LAST), hint: str = "Start anew, without --ckpt_path."
) -> Path | None:
    """The newest whole checkpoint of a run, for ``--ckpt_path last``; None where the run has none yet.

    `last.ckpt` where it is the newest. Broken ones are passed over with a warning that names them and the one chosen.

    Args:
        folder: the run's checkpoints.
        patterns: of their names.
        hint: what to do where all are broken; ends the error's text.

    Raises:
        RecipeError: there are checkpoints, and all are broken.
    """
    broken: dict[Path, str] = {}
    for path in newest_first(path for pattern in patterns for path in folder.glob(pattern)):
        found = damage(path)
        if found is None:
            for other, reason in broken.items():
                rank_zero_warn(f"the checkpoint {other} is broken ({reason}): going on from {path}, the one before")
            return path
        broken[path] = found
    if broken:
        named = ", ".join(f"{path.name} ({reason})" for path, reason in broken.items())
        raise RecipeError(f"no checkpoint in {folder} is whole: {named}. {hint}")
    return None


def newest_first(paths: Iterable[Path]) -> list[Path]:
    """By the numbers of their manifests, then by step; each file once: last.ckpt stands for the one it links to.

    A kill leaves the very newest without a manifest: a single one without, whose step is beyond all others', comes
    first. Others without come last. A broken link counts for nothing.
    """
    known = [(manifest_at(path), _step_of(path), path.name == LAST, path) for path in paths if path.exists()]
    reached = max((step for manifest, step, *_ in known if manifest), default=-1)
    left = {step for manifest, step, *_ in known if not manifest}
    without = math.inf if len(left) == 1 and max(left) > reached else -1
    order = [(manifest.number if manifest else without, step, last, path) for manifest, step, last, path in known]
    unique: list[Path] = []
    for *_, path in sorted(order, reverse=True):
        if not any(path.samefile(other) for other in unique):
            unique.append(path)
    return unique


def check_readable(path: Path, folder: Path | None = None, pattern: str = "*.ckpt") -> None:
    """Read all of a checkpoint and compare its checksums: torch.load alone does not see a flipped bit.

    Where it cannot be read, others are looked for by `pattern` in `folder`, by default its own.

    Raises:
        RecipeError: it is missing or broken; names an older one that is whole, if there is one.
    """
    if not path.exists():
        raise RecipeError(f"--ckpt_path {path}: there is no such file. {_older(path, folder, pattern)}")
    found = damage(path, ours=False)
    if found:
        raise RecipeError(f"the checkpoint {path} is broken ({found}). {_older(path, folder, pattern)}")


def saved_step(path: Path) -> int:
    """The number of optimizer steps that were done when `path` was written; reads little of the file.

    Raises:
        RecipeError: it is no checkpoint of this program.
    """
    if path.is_dir() and not (path / _METADATA).exists():  # DeepSpeed's
        return step_in_name(path.resolve())
    try:
        return int(_contents(path)["global_step"])
    except _NOT_OURS as error:
        raise RecipeError(f"{path} is no checkpoint of this program ({error}). {_older(path)}") from error


def _contents(path: Path) -> dict[str, Any]:
    """Of a file, without its tensors; of a folder of shards what is in none."""
    folder = path.is_dir()
    file = path / _METADATA if folder else path
    return dict(torch.load(file, map_location="cpu", weights_only=True, mmap=not folder))


def _step_of(path: Path) -> int:
    """By its name; last.ckpt's is that of the file it links to, or from inside; -1 where it cannot be read."""
    if path.name != LAST or path.is_symlink():
        return step_in_name(path.resolve())
    for other in path.parent.glob(STEPS):
        if other.exists() and other.samefile(path):
            return step_in_name(other)
    try:
        return int(_contents(path)["global_step"])
    except _NOT_OURS:
        return -1


def step_in_name(path: Path) -> int:
    """12 for step-000012.ckpt and checkpoint-12; 0 for another name."""
    digits = path.stem.rpartition("-")[2]
    return int(digits) if digits.isdigit() else 0


def _older(path: Path, folder: Path | None = None, pattern: str = "*.ckpt") -> str:
    """What to do instead: the newest whole checkpoint in `folder`, by default the same."""
    folder = folder or path.parent
    others = [p for p in folder.glob(pattern) if not (path.exists() and p.exists() and p.samefile(path))]
    for other in newest_first(others):
        if damage(other) is None:
            return f"Go on from an older one: --ckpt_path {other}"
    return f"There is no other whole checkpoint in {folder}: start anew, without --ckpt_path."
