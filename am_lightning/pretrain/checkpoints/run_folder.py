"""The folder of a run: where its checkpoints are, and what protects an earlier run that is in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from am_lightning.pretrain.checkpoints.atomic import remove
from am_lightning.pretrain.checkpoints.resume import LAST, STEPS, check_readable, newest_whole
from am_lightning.pretrain.runtime.atomic_files import write_failure
from am_lightning.pretrain.runtime.errors import RecipeError
from am_lightning.pretrain.runtime.run_lock import hold

ACCELERATE_STEPS = "step-*[0-9]"  # not the step-N.ckpt of pretrain.py
TRAINER_STEPS = "checkpoint-*"
# A run's files, which a new run in the same folder moves away first.
_FILES = ("checkpoints", "logs", "summary.png", "compare", "compare.png", "report.html", "report.png")
# The program that writes checkpoints of these names.
_WRITERS = {
    STEPS: "pretrain.py",
    ACCELERATE_STEPS: "pretrain_accelerate.py",
    TRAINER_STEPS: "pretrain_hf_trainer.py",
}


def checkpoint_folder(config: Any) -> Path:
    """Return the folder of the checkpoints, from a configuration of `fit`, which need not name it."""
    return Path(config["checkpoint"]["dirpath"] or Path(config["trainer"]["default_root_dir"], "checkpoints"))


def take_folder(checkpoints: Path) -> None:
    """Lock the folder of the checkpoints for this process, and remove what a killed process left there.

    Raises:
        RecipeError: if another run writes to it.
    """
    hold(checkpoints)
    for leftover in checkpoints.glob(".*.part"):
        remove(leftover)


def chosen(ckpt_path: str, folder: Path, patterns: Sequence[str] = (STEPS, LAST)) -> Path | None:
    """Return the checkpoint that ``--ckpt_path`` names. "last" is the newest whole one, or None if there is none.

    Args:
        ckpt_path: "last", or a checkpoint.
        folder: folder of the checkpoints.
        patterns: glob patterns of the names of this program's.

    Raises:
        RecipeError: if it is missing or damaged, or if `folder` holds only checkpoints of another program.
    """
    if ckpt_path != "last":
        check_readable(Path(ckpt_path), folder, patterns)
        return Path(ckpt_path)
    found = newest_whole(folder, patterns)
    others = [program for other, program in _WRITERS.items() if other not in patterns and any(folder.glob(other))]
    if found is None and others:
        raise RecipeError(
            f"--ckpt_path last: the checkpoints in {folder} are {others[0]}'s. Resume with that program, or choose"
            " another folder: --trainer.default_root_dir DIR"
        )
    return found


def protect_earlier_run(root: Path, checkpoints: Path, ckpt_path: str | None) -> None:
    """Move the run that is in `root` to `earlier/N`, so that a new run there does not overwrite it.

    Args:
        root: folder of the run that starts.
        checkpoints: folder of its checkpoints.
        ckpt_path: None if it begins at step 0; otherwise nothing is moved.

    Raises:
        RecipeError: if `checkpoints` holds those of another run, which this one would remove: it begins at step 0 and
            `checkpoints` is not below `root`, or `ckpt_path` is a checkpoint in another folder.
    """
    held = any(any(checkpoints.glob(pattern)) for pattern in (*_WRITERS, LAST))
    if ckpt_path is not None:
        if held and ckpt_path != "last" and checkpoints.resolve() not in Path(ckpt_path).resolve().parents:
            raise RecipeError(
                f"--ckpt_path {ckpt_path} is not in {checkpoints}, which holds the checkpoints of another run. Resume"
                " that one (--ckpt_path last), or choose another folder: --trainer.default_root_dir DIR"
            )
        return
    if held and checkpoints != root / "checkpoints":
        raise RecipeError(
            f"checkpoint.dirpath: {checkpoints} holds the checkpoints of another run. Choose another folder, null for "
            f"{root / 'checkpoints'}, or resume that run: --ckpt_path last"
        )
    if not held and not (root / "logs" / "config.yaml").exists():
        return
    number = 1 + max((int(p.name) for p in (root / "earlier").glob("*") if p.name.isdecimal()), default=0)
    target = root / "earlier" / str(number)
    try:
        target.mkdir(parents=True)
    except OSError as error:
        raise write_failure(target, error) from error
    for name in _FILES:
        if (root / name).exists():
            (root / name).rename(target / name)
    print(f"{root} held a run already: moved to {target}. To resume a run: --ckpt_path last")
