"""The folder of a run: where its checkpoints are, and what protects an earlier run that is in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from am_lightning.pretrain.checkpoints.atomic import remove
from am_lightning.pretrain.checkpoints.resume import LAST, STEPS
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


def refuse_checkpoints_of_others(folder: Path, pattern: str) -> None:
    """Refuse to begin a run at step 0 beside another program's checkpoints.

    Args:
        folder: folder of the checkpoints, in which no checkpoint of this program is.
        pattern: glob pattern of this program's checkpoints.

    Raises:
        RecipeError: if checkpoints of another program are there.
    """
    for other, program in _WRITERS.items():
        if other != pattern and any(folder.glob(other)):
            raise RecipeError(
                f"--ckpt_path last: the checkpoints in {folder} are {program}'s. Resume with that program, or choose"
                " another folder: --trainer.default_root_dir DIR"
            )


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
