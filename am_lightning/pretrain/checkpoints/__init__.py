"""Write checkpoints that survive a kill at any moment, and resume from the newest whole one."""

from am_lightning.pretrain.checkpoints.atomic import AtomicCheckpointIO
from am_lightning.pretrain.checkpoints.callback import RunCheckpoint

__all__ = ["AtomicCheckpointIO", "RunCheckpoint"]
