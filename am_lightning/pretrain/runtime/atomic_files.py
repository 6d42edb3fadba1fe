"""Files that are written whole or not at all, and errors for a disk that refuses."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from am_lightning.pretrain.runtime.errors import RecipeError

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # full, over the quota, over the process's limit
_CURES = {
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS),
        "Choose a folder that this user may write to",
    ),
    errno.ENAMETOOLONG: "Choose a shorter name",
    **dict.fromkeys((errno.ENOTDIR, errno.EISDIR), "Choose another folder"),
}
_RUST_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def disk_error(error: BaseException) -> OSError | None:
    """The OSError behind `error`. torch.save turns what write() raised into a RuntimeError and keeps it as context;
    safetensors keeps its number in the text only."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, OSError):
        number = _RUST_OS_ERROR.search(str(seen))
        if number:
            return OSError(int(number[1]), os.strerror(int(number[1])))
        seen = seen.__cause__ or seen.__context__
    return seen


def write_failure(path: Path, error: OSError, hint: str, option: str = "--trainer.default_root_dir DIR") -> RecipeError:
    """The RecipeError for a file that could not be written: which one, why, the space left there, the hint.

    The hint is for a disk that is full, or for what is not known: where the reason says more, its cure stands instead,
    with the option that chooses the folder.
    """
    if cure := _CURES.get(error.errno or 0):
        hint = f"{cure} ({option})."
    text = f"cannot write {path}: {error.strerror or error}"
    if error.errno in DISK_FULL:
        folder = next(p for p in [path.parent, *path.parent.parents] if p.exists())
        text += f" ({shutil.disk_usage(folder).free / 1e6:.1f} MB free in {folder})"
    return RecipeError(f"{text}. {hint}")


@contextlib.contextmanager
def replacing(path: Path, hint: str) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` when the block ends well.

    It is written beside `path`, flushed to the disk and renamed, so that a kill, a full disk or a second process that
    writes the same file leaves either the old file or the new one, never half of one. A leftover of a killed process
    is called `.NAME.PID.part`.

    Args:
        path: the file to make or replace; its folder is made.
        hint: what the user can do when the disk refuses; ends the error's text.

    Raises:
        RecipeError: the file cannot be written. What was at `path` before is untouched.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink()
        refused = disk_error(error)
        if refused is not None and not isinstance(error, RecipeError):
            raise write_failure(path, refused, hint) from error
        raise


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut, where the system can (Windows cannot open folders)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
