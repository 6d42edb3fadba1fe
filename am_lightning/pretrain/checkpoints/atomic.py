"""AtomicCheckpointIO, and folders and links: whatever has a checkpoint's name is whole; and how old ones go."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
from torch.distributed.tensor import DTensor

from am_lightning.pretrain.checkpoints.manifest import HINT, manifest_of, sync_files, write_manifest
from am_lightning.pretrain.checkpoints.resume import check_readable, newest_first
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
            manifest_of(path).unlink(missing_ok=True)  # a kill must not leave new bytes beside an old manifest
        write_manifest(path)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Raises: RecipeError: the file is missing or broken; names an older file that is whole, if there is one."""
        check_readable(Path(path))
        return super().load_checkpoint(path, *args, **kwargs)

    def remove_checkpoint(self, path: Any) -> None:
        remove(Path(path))


def tensor_bytes(state: Any) -> int:
    """Bytes that this process holds of the tensors in a nested state; storages that are shared count once."""
    sizes: dict[int, int] = {}

    def count(tensor: Any) -> None:
        if hasattr(tensor, "local_shards"):  # ShardedTensor (FSDP1)
            shards = [shard.tensor for shard in tensor.local_shards()]
        else:
            shards = [tensor.to_local() if isinstance(tensor, DTensor) else tensor]
        sizes.update((shard.data_ptr() or id(shard), shard.nbytes) for shard in shards)

    apply_to_collection(state, torch.Tensor, count)
    return sum(sizes.values())


def require_space(path: Path, needed: int) -> None:
    """Raise a RecipeError where the disk of `path` has fewer than `needed` bytes free, before anything is written."""
    folder = next(p for p in path.parents if p.exists())
    if shutil.disk_usage(folder).free < needed:
        reason = f"{os.strerror(errno.ENOSPC)}: about {needed / 1e6:.1f} MB are needed"
        raise write_failure(path, OSError(errno.ENOSPC, reason), HINT)


def publish_folder(part: Path, path: Path) -> None:
    """Flush the folder `part` to the disk, write its manifest and rename it to `path`.

    A folder that is there already (the same step, saved again) goes aside before and away after.
    """
    sync_files(part)
    write_manifest(part)
    old = path.with_name(f".{path.name}.old.part")
    if path.exists():
        os.replace(path, old)
    os.replace(part, path)
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove(path: Path) -> None:
    """A checkpoint and its manifest. A folder is renamed first: a kill in between leaves nothing that looks whole."""
    if path.is_dir() and not path.is_symlink():
        if not path.name.startswith("."):
            path = path.rename(path.with_name(f".{path.name}.old.part"))
        shutil.rmtree(path, ignore_errors=True)
    else:
        manifest_of(path).unlink(missing_ok=True)
        path.unlink(missing_ok=True)


def prune(checkpoints: Iterable[Path], keep: int | None) -> None:
    """Remove all but the `keep` newest; None keeps all."""
    for old in newest_first(checkpoints)[keep:] if keep is not None else []:
        remove(old)


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
            try:
                os.link(target, part)
            except OSError:  # a file system without hard links
                shutil.copyfile(target, part)
        if link.is_dir() and not link.is_symlink():
            shutil.rmtree(link)
        os.replace(part, link)
        part.unlink(missing_ok=True)  # rename leaves it where both are the same file already
        sync_folder(link.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise write_failure(link, disk_error(error) or error, HINT) from error
