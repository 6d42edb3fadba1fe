"""A lock on the folder of a run: one process writes there at a time, and the system releases the lock when it ends."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from datetime import datetime
from pathlib import Path

from am_lightning.pretrain.runtime.atomic_files import write_failure
from am_lightning.pretrain.runtime.errors import RecipeError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_PATIENCE_S = 15.0  # a launcher starts ranks again while the old ones are still being killed
_HELD_BY_ANOTHER = (errno.EACCES, errno.EAGAIN)
_held: dict[Path, int] = {}  # the absolute path of the checkpoints -> the descriptor of the lock's file


def hold(checkpoints: Path) -> None:
    """Lock the run whose checkpoints are in `checkpoints` for this process; a second call changes nothing.

    Only the first rank calls it. It is the kernel's lock of a file beside the folder, so a killed process does not
    leave it behind, also on a shared file system. A file system without locks gives none.

    Raises:
        RecipeError: if another process holds the lock and does not end soon, or if the folder is read-only.
    """
    checkpoints = checkpoints.absolute()
    if fcntl is None or checkpoints in _held:
        return
    file = checkpoints.with_name(f".{checkpoints.name}.lock")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise write_failure(file, error) from error
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in _HELD_BY_ANOTHER:
                os.close(descriptor)
                return
        if time.monotonic() > deadline:
            other = os.pread(descriptor, 1000, 0).decode(errors="replace").strip() or "an unknown process"
            os.close(descriptor)
            raise RecipeError(
                f"another run writes to {checkpoints.parent}: {other}. Wait for it, stop it, or choose another folder:"
                " --trainer.default_root_dir DIR"
            )
        time.sleep(0.2)
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    with contextlib.suppress(OSError):  # a full disk
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}, since {since}\n".encode(), 0)
    _held[checkpoints] = descriptor


def release(checkpoints: Path) -> None:
    """Release the lock if this process holds it."""
    descriptor = _held.pop(checkpoints.absolute(), None)
    if descriptor is not None:
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)
        os.close(descriptor)
