"""AtomicCheckpointIO: a checkpoint in one file is whole or not there; and a link that is replaced in one step."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from am_lightning.pretrain.checkpoints.manifest import HINT, remove_manifest, write_manifest
from am_lightning.pretrain.checkpoints.resume import check_readable
from am_lightning.pretrain.runtime.atomic_files import disk_error, replacing, sync_folder, write_failure


class AtomicCheckpointIO(TorchCheckpointIO):
    """torch.save and torch.load, where a file is whole or not there, and a broken one is named.

    Lightning's own writes to the system's folder of temporary files and moves from there, which is a copy, and not
    atomic, where that is another disk.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write beside `path`, flush to the disk, rename, then write the manifest.

        Raises:
            RecipeError: the disk refuses, or has not room enough; the file that was at `path` is still there.
        """
        if storage_options is not None:
            raise TypeError(f"storage_options is {storage_options!r}; AtomicCheckpointIO takes none")
        path = Path(path)
        require_space(path, tensor_bytes(checkpoint))
        with replacing(path, HINT) as file:
            torch.save(checkpoint, file)
            file.flush()
            remove_manifest(path)  # of the file that is replaced now
        write_manifest(path)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Raises: RecipeError: the file is missing or broken; names an older file that is whole, if there is one."""
        check_readable(Path(path))
        return super().load_checkpoint(path, *args, **kwargs)

    def remove_checkpoint(self, path: Any) -> None:
        remove_manifest(Path(path))
        super().remove_checkpoint(path)


def tensor_bytes(state: Any) -> int:
    """Bytes that this process holds of the tensors in a nested state; storages that are shared count once."""
    seen: dict[int, int] = {}
    pending = [state]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            pending.extend(value.values())
        elif isinstance(value, (list, tuple)):
            pending.extend(value)
        elif hasattr(value, "local_shards"):  # ShardedTensor (FSDP1)
            pending.extend(shard.tensor for shard in value.local_shards())
        elif hasattr(value, "to_local"):  # DTensor
            pending.append(value.to_local())
        elif isinstance(value, torch.Tensor):
            seen[value.data_ptr() or id(value)] = value.nbytes
    return sum(seen.values())


def require_space(path: Path, needed: int) -> None:
    """Raise a RecipeError where the disk of `path` has fewer than `needed` bytes free, before anything is written."""
    folder = next(p for p in path.parents if p.exists())
    if shutil.disk_usage(folder).free < needed:
        reason = f"{os.strerror(errno.ENOSPC)}: about {needed / 1e6:.1f} MB are needed"
        raise write_failure(path, OSError(errno.ENOSPC, reason), HINT)


def replace_with_link(target: Path, link: Path) -> None:
    """Make `link` stand for `target`, in one step: a hard link to a file (a copy where the file system has none), a
    symbolic link to a folder.

    Raises:
        RecipeError: the disk refuses; the old `link` is still there.
    """
    part = link.with_name(f".{link.name}.{os.getpid()}.part")
    try:
        part.unlink(missing_ok=True)
        if target.is_dir():
            os.symlink(target.name, part)
        else:
            _link_file(target, part)
        if link.is_dir() and not link.is_symlink():
            shutil.rmtree(link)
        os.replace(part, link)
        part.unlink(missing_ok=True)  # rename leaves it where both are the same file already
        sync_folder(link.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise write_failure(link, disk_error(error) or error, HINT) from error


def _link_file(target: Path, part: Path) -> None:
    try:
        os.link(target, part)
    except OSError:  # a file system without hard links
        shutil.copyfile(target, part)
