"""pretrain_accelerate.py with FSDP2 on CPU processes, where Accelerate ignores its plugin without a message."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))

import pretrain_accelerate
from accelerate import Accelerator

from am_lightning.pretrain.runtime.run_config import RunConfig
from tests.huggingface.sharded import force, plugin_of
from tests.recipes.leaving import leave

_make = pretrain_accelerate.make_accelerator


def sharding(settings: RunConfig) -> Accelerator:
    accelerator = _make(settings)
    force(accelerator, plugin_of(2, "LlamaDecoderLayer"))
    return accelerator


if __name__ == "__main__":
    pretrain_accelerate.make_accelerator = sharding
    pretrain_accelerate.main()
    leave()
