"""Pictures for the reporting callbacks of transformers and the trackers of Accelerate that support them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from am_lightning.loggers.images import package_of, send_image, tolerant

if TYPE_CHECKING:
    from am_lightning.loggers.images import Image

# Attributes in which transformers' callbacks keep the run or its module. None: not begun, or another version.
_RUNS = ("tb_writer", "_wandb", "_ml_flow", "_experiment", "_clearml_task", "_trackio", "_swanlab", "_run")


@tolerant
def report_image(callback: Any, tag: str, image: Image, step: int) -> bool:
    """Write a picture to a reporting callback of the Trainer. Call it on the main process only.

    Args:
        callback: callback of TensorBoard, W&B, MLflow, Comet, ClearML, Trackio, SwanLab or Neptune, after its
            ``on_train_begin`` and before its ``on_train_end``.
        tag: tag of the picture. The Trainer's tags begin with ``train/``.
        image: uint8 ``[H, W, 3]``.
        step: ``state.global_step``.

    Returns:
        False if the callback does not support pictures, has no run, or failed. The first failure raises a warning.
    """
    if not getattr(callback, "_initialized", True):  # its module would start another run, or raise
        return False
    runs = (getattr(callback, name, None) for name in _RUNS)
    run: Any = next((run for run in runs if run is not None), None)
    if package_of(run) == "mlflow":
        run = run.active_run()
    return send_image(run, tag, image, step, axis="train/global_step")


@tolerant
def track_image(tracker: Any, tag: str, image: Image, step: int) -> bool:
    """Write a picture to one of ``accelerator.trackers``. Call it on the main process only.

    Args:
        tracker: tracker of TensorBoard, W&B, MLflow, Comet, ClearML, Trackio or SwanLab.
        tag: tag of the picture, ``am/beta/layers``.
        image: uint8 ``[H, W, 3]``.
        step: step at which the scalars are logged. W&B drops a step that is below the last one.

    Returns:
        False if the tracker does not support pictures or failed. The first failure raises a warning.
    """
    return send_image(getattr(tracker, "tracker", None), tag, image, step)
