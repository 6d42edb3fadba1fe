"""The place in the data that a checkpoint stands for."""

from __future__ import annotations

from typing import Any

import lightning as L


def restore_position(checkpoint: dict[str, Any], trainer: L.Trainer) -> None:
    """Make the loop counters of a checkpoint fit this Trainer; changes `checkpoint`.

    Lightning counts micro-batches and takes the checkpoint's count as it is. Where accumulate_grad_batches has changed,
    the first step after the resume would get only a part of its micro-batches.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    batches = checkpoint["global_step"] * trainer.accumulate_grad_batches
    for counters in (progress["total"], progress["current"]):
        difference = batches - counters["ready"]
        for name in counters:
            counters[name] += difference
