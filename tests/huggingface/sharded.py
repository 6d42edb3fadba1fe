"""FSDP on CPU processes, where Accelerate ignores its plugin without a message."""

from __future__ import annotations

import functools
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP  # noqa: N817


def plugin_of(version: int, layer: str, **options: Any) -> FullyShardedDataParallelPlugin:
    return FullyShardedDataParallelPlugin(
        fsdp_version=version,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[layer],
        state_dict_type="SHARDED_STATE_DICT",
        **options,
    )


def force(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    """Make Accelerate act as on a GPU; call it before anything is prepared."""
    accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin


@functools.cache
def let_fsdp1_run_on_cpu() -> None:
    """Patch FSDP1 once per process: it accepts a CPU only if called "cpu", and Accelerate passes "cpu:0"."""
    original = FSDP.__init__

    @functools.wraps(original)
    def init(self: FSDP, *args: Any, **options: Any) -> None:
        original(self, *args, **{**options, "device_id": torch.device("cpu")})

    FSDP.__init__ = init
