"""Write checkpoints that survive a kill at any moment, and resume from the newest whole one."""

from am_lightning.pretrain.checkpoints.atomic import AtomicCheckpointIO, replace_with_link
from am_lightning.pretrain.checkpoints.callback import RunCheckpoint
from am_lightning.pretrain.checkpoints.resume import (
    LAST,
    STEPS,
    check_readable,
    newest_whole,
    saved_hyperparameters,
    saved_step,
)

__all__ = [
    "LAST",
    "STEPS",
    "AtomicCheckpointIO",
    "RunCheckpoint",
    "check_readable",
    "newest_whole",
    "replace_with_link",
    "saved_hyperparameters",
    "saved_step",
]
