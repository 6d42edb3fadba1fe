"""A picture into the reporting callbacks of transformers and the trackers of Accelerate that take one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from am_lightning.loggers.images import package_of, send_image, tolerant

if TYPE_CHECKING:
    from am_lightning.loggers.images import Image

# Where transformers' callbacks keep the run, or its module; None: not yet begun, or the attribute of another version.
_RUNS = ("tb_writer", "_wandb", "_ml_flow", "_experiment", "_clearml_task", "_trackio", "_swanlab", "_run")


@tolerant
def report_image(callback: Any, tag: str, image: Image, step: int) -> bool:
    """Write a picture to a reporting callback of the Trainer's; call it on the main process only.

    Args:
        callback: for TensorBoard, W&B, MLflow, Comet, ClearML, Trackio, SwanLab or Neptune, after its
            ``on_train_begin`` and before its ``on_train_end``.
        tag: the Trainer's begin with ``train/``.
        image: uint8 ``[H, W, 3]``.
        step: ``state.global_step``.

    Returns:
        False: the callback takes no pictures or has no run, or it failed, of which the first time is warned.
    """
    if not getattr(callback, "_initialized", True):  # its module would make a run of its own, or raise
        return False
    runs = (getattr(callback, name, None) for name in _RUNS)
    run: Any = next((run for run in runs if run is not None), None)
    if package_of(run) == "mlflow":
        run = run.active_run()
    return send_image(run, tag, image, step, axis="train/global_step")


@tolerant
def track_image(tracker: Any, tag: str, image: Image, step: int) -> bool:
    """Write a picture to one of ``accelerator.trackers``; call it on the main process only.

    Args:
        tracker: for TensorBoard, W&B, MLflow, Comet, ClearML, Trackio or SwanLab.
        tag: ``am/beta/layers``.
        image: uint8 ``[H, W, 3]``.
        step: what the scalars beside it are logged at; W&B drops one that is below the last.

    Returns:
        False: the tracker takes no pictures, or it failed, of which the first time is warned.
    """
    return send_image(getattr(tracker, "tracker", None), tag, image, step)
