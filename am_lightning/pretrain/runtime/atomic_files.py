"""Files that are written whole or not at all, their checksums, and the errors of a disk that cannot be written."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from am_lightning.pretrain.runtime.errors import RecipeError

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # full, over the quota, over the process's limit
NO_ACCESS = {errno.EACCES, errno.EPERM, errno.EROFS}
_HINTS = {
    **dict.fromkeys(NO_ACCESS, "Choose a folder that this user may write to"),
    errno.ENAMETOOLONG: "Choose a shorter name",
    **dict.fromkeys((errno.ENOTDIR, errno.EISDIR, errno.EEXIST), "Choose another folder"),
}
_RUN_FOLDER = "--trainer.default_root_dir DIR"
_BLOCK = 1 << 20  # bytes read at a time for a checksum
_RUST_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_SHORT_WRITE = re.compile(r"inline_container.*unexpected pos|iostream error")


def disk_error(error: BaseException) -> OSError | None:
    """Return the OSError that caused `error`, or None.

    torch.save raises a RuntimeError with the OSError as its context, or without one if it was given a path: then the
    disk is taken to be full. safetensors keeps only the number, in its text.
    """
    seen: BaseException | None = error
    number = 0
    while seen is not None and not isinstance(seen, OSError):
        if found := _RUST_OS_ERROR.search(str(seen)):
            number = int(found[1])
        elif _SHORT_WRITE.search(str(seen)):
            number = errno.ENOSPC
        seen = seen.__cause__ or seen.__context__
    return OSError(number, os.strerror(number)) if seen is None and number else seen


def write_failure(
    path: Path, error: OSError, hint: str = f"Choose another folder: {_RUN_FOLDER}", option: str = _RUN_FOLDER
) -> RecipeError:
    """Return the RecipeError for a file that could not be written: which one, why, the free space, and what to do.

    Args:
        path: the file.
        error: what the system raised.
        hint: what to do if the disk is full or the reason is not known.
        option: the option that chooses the folder, for all other reasons.
    """
    if other := _HINTS.get(error.errno or 0):
        hint = f"{other} ({option})."
    text = f"cannot write {path}: {error.strerror or error}"
    if error.errno in DISK_FULL:
        folder = next(p for p in [path.parent, *path.parent.parents] if p.exists())
        text += f" ({shutil.disk_usage(folder).free / 1e6:.1f} MB free in {folder})"
    return RecipeError(f"{text}. {hint}")


@contextlib.contextmanager
def replacing(path: Path, hint: str, option: str = _RUN_FOLDER) -> Iterator[BinaryIO]:
    """Open a binary file that becomes `path` when the block ends without an error, as in `renaming`.

    The file is flushed to the disk first, so that a kill, a full disk or a second process that writes the same file
    leaves either the old file or the new one, never half of one.
    """
    with renaming(path, hint, option) as part, open(part, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def renaming(path: Path, hint: str, option: str = _RUN_FOLDER) -> Iterator[Path]:
    """Yield a path beside `path`, and rename what the block writes there to `path` if the block succeeds.

    A killed process leaves it, as `.NAME.PID.part`.

    Args:
        path: the file to create or replace, or a folder that is new or empty; the folder around it is created.
        hint, option: what to do if it cannot be written, as in `write_failure`.

    Raises:
        RecipeError: if it cannot be written. What is at `path` is untouched.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, path)
        sync_folder(path.parent)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)  # a folder
        with contextlib.suppress(OSError):
            part.unlink()
        refused = disk_error(error)
        if refused is not None and not isinstance(error, RecipeError):
            raise write_failure(path, refused, hint, option) from error
        raise


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal. Raises: OSError: if it cannot be read."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut. Does nothing on Windows, which cannot open folders."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
