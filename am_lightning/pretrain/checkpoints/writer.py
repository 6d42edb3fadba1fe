"""CheckpointWriter: writes a checkpoint of all ranks, a file or a folder, at once or in the background."""

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
from am_lightning.pretrain.checkpoints.ranks import gather, is_first, together
from am_lightning.pretrain.runtime.errors import RecipeError

_METADATA = "meta.pt"  # Lightning writes it beside the shards, and needs it to load them


class CheckpointWriter:
    """Writes the checkpoints of a Trainer. All ranks call each method, except ``close``.

    A folder (of shards, or of DeepSpeed) is written as `.NAME.part`, flushed to the disk, given its manifest and
    renamed. An error of one rank is raised on all, and older checkpoints are unchanged.

    Args:
        trainer: the Trainer, whose strategy writes files or folders.
        asynchronous: return when the state is copied to CPU memory. One checkpoint is in progress at a time.
        published: function that is called on rank 0 with the path of each finished checkpoint.

    Raises:
        RecipeError: if `asynchronous` is set and the strategy does not support it.
    """

    def __init__(self, trainer: L.Trainer, asynchronous: bool, published: Callable[[Path], None]) -> None:
        if asynchronous and isinstance(trainer.strategy, DeepSpeedStrategy):
            raise RecipeError(
                "checkpoint.asynchronous is True; allowed: false with DeepSpeedStrategy, whose engine saves"
            )
        self.trainer, self.asynchronous, self.published = trainer, asynchronous, published
        self.folders = writes_folders(trainer)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[Any] | None = None
        self._group: dist.ProcessGroup | None = None
        self._stager: Any = None

    def save(self, path: Path) -> None:
        """Write a checkpoint to `path`, or start to write it in the background.

        Raises:
            RecipeError: on all ranks, if the disk of one refuses this checkpoint or the one in progress.
        """
        self.wait()
        checkpoint = self.trainer._checkpoint_connector.dump_checkpoint(False)
        part = self._part(path) if self.folders else None
        with together(path, part):
            self._make_room(path, checkpoint)
        with together(path, part):
            if not self.asynchronous:
                self.trainer.strategy.save_checkpoint(checkpoint, str(part or path))
            elif self.folders:
                self._begin_folder(checkpoint, path)
            elif is_first():
                write = partial(self.trainer.strategy.checkpoint_io.save_checkpoint, _on_host(checkpoint), path)
                self._pending = self._pool.submit(self._finish, path, write)
        if not self.asynchronous:
            with together(path, part):
                if is_first():
                    self._finish(path)

    def wait(self) -> None:
        """Wait for the checkpoint in progress.

        Raises:
            RecipeError: on all ranks, if it has failed.
        """
        if self.asynchronous:
            with together():
                self._settle()

    def close(self) -> None:
        """Wait for the checkpoint in progress after an exception on this rank, and ignore its errors."""
        with contextlib.suppress(Exception, CheckpointException):
            self._settle()

    def _settle(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _make_room(self, path: Path, checkpoint: dict[str, Any]) -> None:
        needed = sum(gather(tensor_bytes(checkpoint) if self.folders or is_first() else 0))
        if is_first():
            require_space(path, needed)
            if self.folders:
                shutil.rmtree(self._part(path), ignore_errors=True)  # left by a killed process
                self._part(path).mkdir(parents=True)

    def _begin_folder(self, checkpoint: dict[str, Any], path: Path) -> None:
        from torch.distributed.checkpoint.state_dict_saver import async_save

        part = self._part(path)
        module = "model" if isinstance(self.trainer.strategy, FSDPStrategy) else "state_dict"  # Lightning's names
        state = {module: checkpoint.pop("state_dict")}
        for number, optimizer_state in enumerate(checkpoint.pop("optimizer_states", [])):
            state[f"optimizer_{number}"] = optimizer_state
        if is_first():
            torch.save(checkpoint, part / _METADATA)
        if self._group is None and dist.is_initialized():
            self._group = dist.new_group(backend="gloo")  # the steps use the others meanwhile
        self._stager = self._stager or _stager(self.trainer)  # kept, because it reuses its pinned memory
        written: Any = async_save(state, checkpoint_id=part, process_group=self._group, async_stager=self._stager)
        # On rank 0 it is done when all ranks have written, because rank 0 writes .metadata last.
        self._pending = self._pool.submit(self._finish, path, written.result) if is_first() else written

    def _finish(self, path: Path, write: Callable[[], Any] = lambda: None) -> None:
        """Call `write`, then publish the checkpoint; on rank 0, in a thread if asynchronous."""
        write()
        if self.folders:
            publish_folder(self._part(path), path)
        self.published(path)

    @staticmethod
    def _part(path: Path) -> Path:
        return path.with_name(f".{path.name}.part")


def writes_folders(trainer: L.Trainer) -> bool:
    """Return whether the Trainer's strategy writes a folder and not a file."""
    strategy = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy):
        return bool(strategy._save_distributed_checkpoint)
    if isinstance(strategy, FSDPStrategy):
        return strategy._state_dict_type == "sharded"
    return isinstance(strategy, DeepSpeedStrategy)


def _on_host(state: Any) -> Any:
    """Return a copy in CPU memory. GPUs copy into pinned memory, and the host waits once for each GPU."""
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
    """Return what copies shards to CPU memory. None means async_save's default, which waits for each tensor."""
    if isinstance(trainer.strategy, FSDPStrategy):  # DefaultStager does not support ShardedTensor
        return staging.BlockingAsyncStager()
    if trainer.strategy.root_device.type != "cuda" or not hasattr(staging, "DefaultStager"):  # new in torch 2.9
        return None
    pinned = {"use_pinned_memory": True, "use_non_blocking_copy": True}
    options = staging.StagingOptions(**pinned, use_shared_memory=False, use_async_staging=False)
    return staging.DefaultStager(options)
