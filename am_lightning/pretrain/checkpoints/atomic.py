"""Write checkpoint files, folders and links that are whole or missing after a kill, and remove old ones."""

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
from am_lightning.pretrain.runtime.errors import RecipeError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Save files that are whole or missing, and refuse to load a damaged one.

    Lightning's TorchCheckpointIO writes to the system's temporary folder and moves the file. If that folder is on
    another disk, the move is a copy and not atomic.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a file beside `path`, flush it to the disk, rename it to `path` and write its manifest.

        Raises:
            RecipeError: if the disk refuses or has too little space. An older file at `path` is unchanged.
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
        """Load `path`. Raise a RecipeError if it is missing or damaged, or a folder."""
        check_readable(Path(path))
        if Path(path).is_dir():
            raise RecipeError(
                f"the checkpoint {path} is a folder, and trainer.strategy loads a file: resume with the strategy that"
                " wrote it"
            )
        return super().load_checkpoint(path, *args, **kwargs)

    def remove_checkpoint(self, path: Any) -> None:
        remove(Path(path))


def tensor_bytes(state: Any) -> int:
    """Return the bytes of the tensors in a nested state that this process holds. Shared storages count once."""
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
    """Raise a RecipeError if fewer than `needed` bytes are free on the disk of `path`."""
    folder = next(p for p in path.parents if p.exists())
    if shutil.disk_usage(folder).free < needed:
        reason = f"{os.strerror(errno.ENOSPC)}: about {needed / 1e6:.1f} MB are needed"
        raise write_failure(path, OSError(errno.ENOSPC, reason), HINT)


def publish_folder(part: Path, path: Path) -> None:
    """Flush the folder `part` to the disk, write its manifest and rename it to `path`.

    A folder at `path`, of the same step, is renamed before and removed after that.
    """
    sync_files(part)
    write_manifest(part, path.parent)
    old = path.with_name(f".{path.name}.old.part")
    if path.exists():
        os.replace(path, old)
    os.replace(part, path)
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove(path: Path) -> None:
    """Remove a checkpoint and its manifest. A folder is renamed first, so that no kill leaves a part of it."""
    if path.is_dir() and not path.is_symlink():
        if not path.name.startswith("."):
            path = path.rename(path.with_name(f".{path.name}.old.part"))
        shutil.rmtree(path, ignore_errors=True)
    else:
        manifest_of(path).unlink(missing_ok=True)
        path.unlink(missing_ok=True)


def prune(checkpoints: Iterable[Path], keep: int | None) -> None:
    """Remove all checkpoints except the `keep` newest. None keeps all."""
    for old in newest_first(checkpoints)[keep:] if keep is not None else []:
        remove(old)


def replace_with_link(target: Path, link: Path) -> None:
    """Replace `link` in one step: by a symbolic link if `target` is a folder, else by a hard link, or by a copy if the
    file system has no hard links.

    Raises:
        RecipeError: if the disk refuses. The old `link` is unchanged.
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
        part.unlink(missing_ok=True)  # rename leaves it if both are the same file already
        sync_folder(link.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise write_failure(link, disk_error(error) or error, HINT) from error
