"""Find the newest whole checkpoint, and refuse damaged ones."""

from __future__ import annotations

import contextlib
import math
import os
import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from am_lightning.pretrain.checkpoints.manifest import damage, manifest_at
from am_lightning.pretrain.runtime.errors import RecipeError, first_line

LAST = "last.ckpt"
STEPS = "step-*.ckpt"
_NOT_OURS = (RuntimeError, OSError, EOFError, KeyError, TypeError, pickle.UnpicklingError)


def newest_whole(
    folder: Path, patterns: Sequence[str] = (STEPS, LAST), hint: str = "Start again without --ckpt_path."
) -> Path | None:
    """Return the newest whole checkpoint of a run, for ``--ckpt_path last``, or None if the run has no checkpoint.

    `last.ckpt` is returned if it is the newest. A warning names damaged checkpoints that are passed over.

    Args:
        folder: folder of the checkpoints.
        patterns: glob patterns of their names.
        hint: end of the error's text, which tells the user what to do.

    Raises:
        RecipeError: if all checkpoints are damaged.
        PermissionError: if this user may not read the folder.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.scandir(folder).close()  # glob finds nothing where it may not read, and the run would start again
    broken: dict[Path, str] = {}
    for path in newest_first(path for pattern in patterns for path in folder.glob(pattern)):
        found = damage(path)
        if found is None:
            for other, reason in broken.items():
                rank_zero_warn(f"the checkpoint {other} is broken ({reason}): resuming from {path}, the one before")
            return path
        broken[path] = found
    if broken:
        named = ", ".join(f"{path.name} ({reason})" for path, reason in broken.items())
        raise RecipeError(f"no checkpoint in {folder} is whole: {named}. {hint}")
    return None


def newest_first(paths: Iterable[Path]) -> list[Path]:
    """Sort checkpoints by the numbers of their manifests, then by step. Of links to one file, last.ckpt is kept.

    A kill may leave the newest without a manifest. So a single one without a manifest comes first if its step is beyond
    all others; otherwise those without a manifest come last. Broken links are left out.
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


def check_readable(path: Path, folder: Path | None = None, patterns: Sequence[str] = (STEPS, LAST)) -> None:
    """Read all of a checkpoint and compare its checksums, because torch.load does not notice a flipped bit.

    Args:
        path: the checkpoint.
        folder: folder in which the error looks for another whole one; default: that of `path`.
        patterns: glob patterns of their names.

    Raises:
        RecipeError: if `path` is missing or damaged.
    """
    there = path.exists()
    found = damage(path, ours=False) if there else None
    if there and not found:
        return
    folder = folder or path.parent
    others = [
        p for pattern in patterns for p in folder.glob(pattern) if p.exists() and not (there and p.samefile(path))
    ]
    whole = next((other for other in newest_first(others) if damage(other) is None), None)
    hint = f"Resume from an older one: --ckpt_path {whole}"
    if whole is None:
        hint = f"There is no other whole checkpoint in {folder}: start again without --ckpt_path."
    problem = f"--ckpt_path {path}: there is no such file or folder"
    if found:
        problem = f"the checkpoint {path} is broken ({found})"
    raise RecipeError(f"{problem}. {hint}")


def saved_step(path: Path) -> int:
    """Return the optimizer steps that were done when `path` was written. Reads a small part of the file.

    Raises:
        RecipeError: if `path` is not a checkpoint of pretrain.py.
    """
    try:
        return int(_contents(path)["global_step"])
    except _NOT_OURS as error:
        text = f"--ckpt_path {path} is not a checkpoint of this program; allowed: last, or a checkpoint"
        raise RecipeError(f"{text} ({first_line(error)})") from error


def _contents(path: Path) -> dict[str, Any]:
    """Load a file without reading its tensors, or the file beside Lightning's shards, or in DeepSpeed's folder."""
    files = [path] if path.is_file() else [path / "meta.pt", *path.glob("checkpoint/*model_states.pt")]
    file = next((file for file in files if file.exists()), files[0])
    return dict(torch.load(file, map_location="cpu", weights_only=True, mmap=True))


def _step_of(path: Path) -> int:
    """Return the step in the name of the file, or of the file that last.ckpt links to; else that in the file, or -1."""
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
    """Return 12 for step-000012.ckpt and checkpoint-12, and 0 for another name."""
    digits = path.stem.rpartition("-")[2]
    return int(digits) if digits.isdigit() else 0
