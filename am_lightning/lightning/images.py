"""A picture into any Lightning logger that takes one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from am_lightning.loggers.images import package_of, send_image, tolerant

if TYPE_CHECKING:
    from am_lightning.loggers.images import Image


@tolerant
def log_image(logger: Any, tag: str, image: Image, step: int) -> bool:
    """Write a picture to a logger of Lightning's or Fabric's, of either name; call it on global rank zero only.

    Args:
        logger: for TensorBoard, W&B, MLflow, Comet, or of a package with W&B's ``log_image`` (SwanLab).
        tag: ``am/beta/layers``.
        image: uint8 ``[H, W, 3]``.
        step: what the scalars beside it are logged at.

    Returns:
        False: the logger takes no pictures, as CSVLogger, or it failed, of which the first time is warned.
    """
    if hasattr(type(logger), "log_image"):  # W&B: a row of its own at trainer/global_step, as each of log_metrics
        logger.log_image(key=tag, images=[image], step=step)
        return True
    experiment: Any = getattr(logger, "experiment", None)
    if package_of(experiment) == "mlflow":  # a client, whose store need not be that of the mlflow module
        experiment.log_image(logger.run_id, image, key=tag, step=step)
        return True
    return send_image(experiment, tag, image, step)
