"""Momentum curves where there is no callback: a loop of one's own, nanoGPT, and any writer."""

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
    """Write the momentum of ``optimizer`` to ``writer`` every so many of its steps.

    It is a step hook of the optimizer and nothing else: nothing is patched, and a step between two writes costs one
    call. A write copies one vector from the device. Where torch.distributed is initialised rank 0 writes; reading takes
    no collective, so the other ranks do nothing (call it on all of them, or on rank 0 alone). What is written is of the
    tensors of rank 0's optimizer alone: under pipeline parallel, of those of its stage. A copy or a pickle of the
    optimizer has no hooks: attach anew.

    Args:
        optimizer: AMAdamW or AMSGD, or what a framework made of it. Of one in a DeepSpeed engine, the first of several
            ``step()`` calls of a training step is written: use ``am_lightning.huggingface`` or Lightning there.
        writer: with ``add_scalar(tag, value, step)`` (torch's SummaryWriter, which gets the histogram ``am/beta``,
            too), ``log_metrics(scalars, step=)`` (a Lightning logger, the mlflow module), ``log(scalars, step=)`` (a
            wandb run, or the module), or a callable that takes a dict of scalars and the step, and gets no picture.
        every: so many calls of ``step()``, dropped ones too; a resumed run starts from the steps in its checkpoint.
        prefix: of the tags. Give a second optimizer "am-1".

    Tags are those of every framework here: ``am/beta/mean|min|max``, ``am/beta/<layer group>``,
    ``am/clamp/at_max|at_zero``, ``am/skipped_steps``, ``am/grad_norm`` where ``clip_grad_norm_`` ran, and
    ``am/beta/layer/<layer>`` where parameters have names (``AMAdamW(model.named_parameters())``, ``am_adamw(model)``,
    ``optimizer.name_parameters``) and layers are 32 at most. It warns of steps that were dropped because a sum, or what
    the step would have written, was not finite.

    Returns:
        A handle: ``finish()``, when training is over and before the writer is closed, draws the last picture and
        returns the run in one sentence; ``remove()`` ends it, ``every`` may be changed. The same optimizer, writer and
        prefix again take the place of what was there.

    Raises:
        TypeError: an argument is of the wrong type, such as a torch.optim.AdamW; the text has the hint.
        ValueError: ``every`` is below 1.
    """
    am_optimizer = require_am_optimizer(
        optimizer, "build am_lightning.am_adamw(model, lr=...), or AMAdamW(...), in place of it"
    )
    check_count("every", every)
    if not isinstance(prefix, str) or not prefix:
        raise TypeError(f"Invalid prefix: {prefix!r} (prefix must be a text such as 'am')")
    write = _write_of(writer)
    for other in loggers_of(am_optimizer):
        if isinstance(other, Log) and other.writer is writer and other.reader.prefix == prefix:
            other.remove()
    return Log(StatsReader(am_optimizer, prefix), writer, write, every)


class Log(StepLogger):
    """What :func:`attach` returns.

    Attributes:
        every: steps between two writes; None pauses it.
        reader: what was read last.
    """

    def __init__(self, reader: StatsReader, writer: Any, write: Write, every: int) -> None:
        self.every, self.writer, self._write = every, writer, write
        super().__init__(reader)

    @property
    def readings(self) -> StatsReader:
        """``reader``, by its earlier name."""
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
    """Scalars and a step into whatever ``writer`` is.

    Raises:
        TypeError: it cannot be written to.
    """
    if isinstance(writer, type):
        raise TypeError(f"Invalid writer: the class {writer.__name__} (give an object of it). {_WRITERS}")
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
        pass  # a builtin that does not say what it takes
    return writer  # type: ignore[no-any-return]
