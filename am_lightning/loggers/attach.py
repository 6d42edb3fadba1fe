"""Log momentum curves from a training loop without callbacks, such as nanoGPT's, to any writer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from am_lightning.distributed.shard import my_rank
from am_lightning.loggers.custom_scalars import add_momentum
from am_lightning.loggers.images import log_image
from am_lightning.loggers.reader import StatsReader
from am_lightning.loggers.step_logger import StepLogger, loggers_of
from am_lightning.optim.unwrap import require_am_optimizer
from am_lightning.optim.validation import check_count

Write = Callable[[dict[str, float], int], Any]
_WRITERS = (
    "writer must have add_scalar (SummaryWriter), log_metrics (a Lightning logger, mlflow) or log (a wandb run), or be "
    "called with a dict of scalars and the step: attach(optimizer, lambda scalars, step: print(step, scalars))"
)


def attach(optimizer: Any, writer: Any, every: int = 50, *, prefix: str = "am") -> Log:
    """Write the momentum of ``optimizer`` to ``writer`` every ``every`` steps.

    The function registers a step hook on the optimizer and patches nothing. A step between two writes costs one call,
    and a write copies one vector from the device. If torch.distributed is initialised, rank 0 writes. Reading takes no
    collective, so call the function on all ranks or on rank 0 alone. The values cover the tensors of rank 0's optimizer
    only; under pipeline parallel, these are the tensors of its stage. A copied or unpickled optimizer has no hooks:
    call ``attach`` again.

    Args:
        optimizer: an AMAdamW or AMSGD, or a framework's wrapper around one. For an optimizer in a DeepSpeed engine, the
            first of several ``step()`` calls of a training step is written: use ``am_lightning.huggingface`` or
            Lightning there.
        writer: an object with ``add_scalar(tag, value, step)`` (torch's SummaryWriter, which also gets the histogram
            ``am/beta``), ``log_metrics(scalars, step=)`` (a Lightning logger, the mlflow module) or ``log(scalars,
            step=)`` (a wandb run or module), or a callable that takes a dict of scalars and the step. A callable gets
            no picture.
        every: interval between two writes in calls of ``step()``, including dropped steps. Default: 50. A resumed run
            counts from the steps in its checkpoint.
        prefix: prefix of the tags. Default: "am". Use "am-1" for a second optimizer.

    The tags are the same in every framework: ``am/beta/mean|min|max``, ``am/beta/<layer group>``,
    ``am/clamp/at_max|at_zero``, ``am/skipped_steps``, ``am/grad_norm`` if ``clip_grad_norm_`` ran, and
    ``am/beta/layer/<layer>`` if parameters have names (``AMAdamW(model.named_parameters())``, ``am_adamw(model)``,
    ``optimizer.name_parameters``) and there are at most 32 layers. A warning reports steps that were dropped because a
    sum, or a value that the step would have written, was not finite.

    Returns:
        A handle. Call ``finish()`` after training and before the writer is closed: it draws the last picture and
        returns a summary of the run in one sentence. ``remove()`` stops the logging, and ``every`` may be changed. A
        second call with the same optimizer, writer and prefix replaces the first.

    Raises:
        TypeError: if an argument is of the wrong type, such as a torch.optim.AdamW.
        ValueError: if ``every`` is below 1.
    """
    am_optimizer = require_am_optimizer(
        optimizer, "build am_lightning.am_adamw(model, lr=...), or AMAdamW(...), in place of it"
    )
    check_count("every", every)
    if not isinstance(prefix, str) or not prefix:
        raise TypeError(f"Invalid prefix: {prefix!r} (prefix must be a non-empty string such as 'am')")
    write = _write_of(writer)
    for other in loggers_of(am_optimizer):
        if isinstance(other, Log) and other.writer is writer and other.reader.prefix == prefix:
            other.remove()
    return Log(StatsReader(am_optimizer, prefix), writer, write, every)


class Log(StepLogger):
    """The handle that :func:`attach` returns.

    Attributes:
        every: interval between two writes in optimizer steps. None pauses the logging.
        reader: the StatsReader, which holds the values of its last reading.
    """

    def __init__(self, reader: StatsReader, writer: Any, write: Write, every: int) -> None:
        self.every, self.writer, self._write = every, writer, write
        super().__init__(reader)

    @property
    def readings(self) -> StatsReader:
        """Return ``reader``. This is its earlier name."""
        return self.reader

    def is_main(self) -> bool:
        return my_rank() == 0

    def write(self) -> None:
        layers = self.reader.layers() if self.reader.has_names() and self.reader.few_layers() else {}
        self._write(self.reader.scalars() | layers, self.steps)
        if hasattr(self.writer, "add_histogram"):
            self.reader.add_histogram(self.writer, self.steps)
        if hasattr(self.writer, "add_custom_scalars"):
            add_momentum(self.writer, self.reader, self.steps)
        if self.reader.history.picture_is_due():
            self.draw()

    def draw(self) -> None:
        self.reader.draw([partial(log_image, self.writer)], self.steps)


def _write_of(writer: Any) -> Write:
    """Return a function of scalars and a step that writes to ``writer``.

    Raises:
        TypeError: if ``writer`` has none of the supported methods and cannot be called.
    """
    if isinstance(writer, type):
        raise TypeError(f"Invalid writer: the class {writer.__name__} (writer must be an instance). {_WRITERS}")
    if callable(getattr(writer, "add_scalar", None)):

        def add(scalars: dict[str, float], step: int) -> None:
            for tag, value in scalars.items():
                writer.add_scalar(tag, value, step)

        return add
    for name in ("log_metrics", "log"):
        method = getattr(writer, name, None)
        if callable(method):
            return lambda scalars, step: method(scalars, step=step)
    if not callable(writer):
        raise TypeError(f"Invalid writer: {writer!r}. {_WRITERS}")
    try:
        inspect.signature(writer).bind({}, 0)
    except TypeError as error:
        raise TypeError(
            f"Invalid writer: {writer!r} cannot be called with scalars and a step ({error}). {_WRITERS}"
        ) from error
    except ValueError:
        pass  # a builtin without a signature
    return writer  # type: ignore[no-any-return]
