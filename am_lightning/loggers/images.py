"""Write a picture to a logger of any framework. The package of the logger's class selects the call."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Image = NDArray[np.uint8]
    Send = Callable[[Any, str, Image, int], bool]

_warned: set[str] = set()


def tolerant(send: Send) -> Send:
    """Wrap ``send`` so that an error gives False and one warning for each class of logger.

    A picture must not end a run.
    """

    @wraps(send)
    def guarded(logger: Any, tag: str, image: Image, step: int) -> bool:
        try:
            return send(logger, tag, image, step)
        except Exception as error:
            name = type(logger).__name__
            if name not in _warned:
                _warned.add(name)
                warnings.warn(f"{name} did not take the picture {tag}: {type(error).__name__}: {error}", stacklevel=2)
            return False

    return guarded


def package_of(run: Any) -> str:
    """Return the top-level package of the class of ``run``, or of ``run`` itself if it is a module: "wandb"."""
    return (run.__name__ if isinstance(run, ModuleType) else type(run).__module__).partition(".")[0]


def send_image(run: Any, tag: str, image: Image, step: int, axis: str | None = None) -> bool:
    """Write a picture to a run. Call it on the main process only.

    Args:
        run: a SummaryWriter, a Neptune run, a Comet experiment, a ClearML task, a run or the module of W&B, MLflow,
            Trackio or SwanLab, or a logger of Lightning or Fabric (package ``lightning``, ``pytorch_lightning`` or
            ``lightning_fabric``) for TensorBoard, W&B, MLflow, Comet, or any logger with W&B's ``log_image``
            (SwanLab).
        tag: tag of the picture, such as ``am/beta/layers``.
        image: uint8 ``[H, W, 3]``.
        step: number of optimizer steps.
        axis: for W&B and Trackio, the key under which steps are logged if the framework passes no step to ``log``.
            Default: None.

    Returns:
        False if ``run`` is none of these, such as a CSVLogger.

    Raises:
        Exception: if the logger's package raises it.
    """
    if hasattr(type(run), "experiment"):
        return _send_by_logger(run, tag, image, step)
    name = package_of(run)
    package: Any = sys.modules.get(name)
    match name:
        case _ if hasattr(type(run), "add_image"):
            run.add_image(tag, image, step, dataformats="HWC")
        case "wandb" | "trackio" if axis:
            run.log({tag: package.Image(image), axis: step})
        case "wandb" | "trackio" | "swanlab":
            run.log({tag: package.Image(image)}, step=step)
        case "mlflow" if run is package:
            run.log_image(image, key=tag, step=step)
        case "mlflow":
            package.MlflowClient().log_image(run.info.run_id, image, key=tag, step=step)
        case "comet_ml":
            # Without image_minmax the darkest and the brightest value of an array become 0 and 255.
            run.log_image(image, name=tag, image_minmax=(0, 255), step=step)
        case "clearml":
            title, _, series = tag.rpartition("/")
            run.get_logger().report_image(title or tag, series, iteration=step, image=image)
        case "neptune":
            run[tag].append(package.types.File.as_image(image), step=step)
        case _:
            return False
    return True


def _send_by_logger(logger: Any, tag: str, image: Image, step: int) -> bool:
    if hasattr(type(logger), "log_image"):  # W&B's logger writes a row at trainer/global_step, as log_metrics does
        logger.log_image(key=tag, images=[image], step=step)
        return True
    experiment: Any = logger.experiment
    if package_of(experiment) == "mlflow":  # a client, whose store may differ from the store of the mlflow module
        experiment.log_image(logger.run_id, image, key=tag, step=step)
        return True
    return send_image(experiment, tag, image, step)


log_image = tolerant(send_image)
