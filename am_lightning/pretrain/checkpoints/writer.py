"""CheckpointWriter: one checkpoint of all ranks, a file or a folder, now or in the background, whole or not there."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning_utilities.core.apply_func import apply_to_collection
from torch.distributed.checkpoint import staging
from torch.distributed.checkpoint.api import CheckpointException

from am_lightning.pretrain.checkpoints.atomic import publish_folder, require_space, tensor_bytes
from am_lightning.pretrain.checkpoints.ranks import Ranks
from am_lightning.pretrain.runtime.errors import RecipeError

_METADATA = "meta.pt"  # what Lightning puts beside the shards, and looks for when it loads


class CheckpointWriter:
    """Writes checkpoints for a Trainer; every rank calls every method.

    A folder (sharded checkpoints, DeepSpeed) is written as `.NAME.part` beside its place, flushed, given its manifest
    and renamed. Whatever fails, on whichever rank, is raised on all, and what was there before is untouched.

    Args:
        trainer: its strategy decides between a file and a folder.
        asynchronous: return as soon as the state is copied to the CPU's memory; at most one is under way.
        published: called on rank 0 with every checkpoint that is whole and in its place.

    Raises:
        RecipeError: `asynchronous` with a strategy that cannot.
    """

    def __init__(self, trainer: L.Trainer, asynchronous: bool, published: Callable[[Path], None]) -> None:
        if asynchronous and isinstance(trainer.strategy, DeepSpeedStrategy):
            raise RecipeError(
                "checkpoint.asynchronous is True; allowed: false with DeepSpeedStrategy, whose engine saves"
            )
        self.trainer, self.asynchronous, self.published = trainer, asynchronous, published
        self.folders = writes_folders(trainer)
        self.ranks = Ranks(trainer.world_size, trainer.is_global_zero)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[Any] | None = None
        self._group: dist.ProcessGroup | None = None
        self._stager: Any = None

    def save(self, path: Path) -> None:
        """Write a checkpoint to `path`, or begin to.

        Raises:
            RecipeError: on all ranks, where the disk of one refuses, now or in the one that was under way.
        """
        self.wait()
        checkpoint = self.trainer._checkpoint_connector.dump_checkpoint(False)
        part = self._part(path) if self.folders else None
        with self.ranks.saving(path, part):
            self._make_room(path, checkpoint)
        with self.ranks.saving(path, part):
            if not self.asynchronous:
                self.trainer.strategy.save_checkpoint(checkpoint, str(part or path))
            elif self.folders:
                self._begin_folder(checkpoint, path)
            elif self.ranks.first:
                write = partial(self.trainer.strategy.checkpoint_io.save_checkpoint, _on_host(checkpoint), path)
                self._pending = self._pool.submit(self._finish, path, write)
        if not self.asynchronous:
            with self.ranks.saving(path, part):
                if self.ranks.first:
                    self._finish(path)

    def wait(self) -> None:
        """Until nothing is under way any more.

        Raises:
            RecipeError: on all ranks, where what was under way has failed.
        """
        if self.asynchronous:
            with self.ranks.saving():
                self._settle()

    def close(self) -> None:
        """After an exception, on this rank alone: end what is under way."""
        with contextlib.suppress(Exception, CheckpointException):
            self._settle()

    def _settle(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _make_room(self, path: Path, checkpoint: dict[str, Any]) -> None:
        needed = sum(self.ranks.gather(tensor_bytes(checkpoint) if self.folders or self.ranks.first else 0))
        if self.ranks.first:
            require_space(path, needed)
            if self.folders:
                shutil.rmtree(self._part(path), ignore_errors=True)  # of a killed process
                self._part(path).mkdir(parents=True)

    def _begin_folder(self, checkpoint: dict[str, Any], path: Path) -> None:
        from torch.distributed.checkpoint.state_dict_saver import async_save

        part = self._part(path)
        module = "model" if isinstance(self.trainer.strategy, FSDPStrategy) else "state_dict"  # Lightning's words
        state = {module: checkpoint.pop("state_dict")}
        for number, optimizer_state in enumerate(checkpoint.pop("optimizer_states", [])):
            state[f"optimizer_{number}"] = optimizer_state
        if self.ranks.first:
            torch.save(checkpoint, part / _METADATA)
        if self._group is None and self.ranks.count > 1:
            self._group = dist.new_group(backend="gloo")  # its own: the steps' collectives go on meanwhile
        self._stager = self._stager or _stager(self.trainer)  # kept: it writes into the same pinned memory again
        written: Any = async_save(state, checkpoint_id=part, process_group=self._group, async_stager=self._stager)
        # Rank 0's is done when all ranks have written: it writes .metadata after that.
        self._pending = self._pool.submit(self._finish, path, written.result) if self.ranks.first else written

    def _finish(self, path: Path, write: Callable[[], Any] = lambda: None) -> None:
        """On rank 0, perhaps in the background: what is left to write, and what makes a checkpoint of it."""
        write()
        if self.folders:
            publish_folder(self._part(path), path)
        self.published(path)

    @staticmethod
    def _part(path: Path) -> Path:
        return path.with_name(f".{path.name}.part")


def writes_folders(trainer: L.Trainer) -> bool:
    """Whether a checkpoint of this Trainer's strategy is a folder."""
    strategy = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy):
        return bool(strategy._save_distributed_checkpoint)
    if isinstance(strategy, FSDPStrategy):
        return strategy._state_dict_type == "sharded"
    return isinstance(strategy, DeepSpeedStrategy)


def _on_host(state: Any) -> Any:
    """A copy in the host's memory; from GPUs into pinned memory, with one wait for each and not for each tensor."""
    devices: set[torch.device] = set()

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        if pinned := tensor.is_cuda:
            devices.add(tensor.device)
        host = torch.empty_like(tensor, device="cpu", pin_memory=pinned, requires_grad=False)
        return host.copy_(tensor.detach(), non_blocking=pinned)

    copied = apply_to_collection(state, torch.Tensor, copy)
    for device in devices:
        torch.cuda.synchronize(device)
    return copied


def _stager(trainer: L.Trainer) -> Any:
    """What copies shards to the host; None: async_save's own, which copies tensor by tensor from pageable memory."""
    if isinstance(trainer.strategy, FSDPStrategy):  # newer ones do not know its ShardedTensor
        return staging.BlockingAsyncStager()
    if trainer.strategy.root_device.type != "cuda" or not hasattr(staging, "DefaultStager"):  # from torch 2.9 on
        return None
    pinned = {"use_pinned_memory": True, "use_non_blocking_copy": True}
    options = staging.StagingOptions(**pinned, use_shared_memory=False, use_async_staging=False)
    return staging.DefaultStager(options)
