"""transformers' Trainer: the callback that logs the momentum, and the factory of AM-AdamW."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import fields
from functools import partial
from typing import Any, cast

from torch import nn

from am_lightning.distributed.call_stack import caller
from am_lightning.huggingface.accelerate import bind_models
from am_lightning.huggingface.images import report_image
from am_lightning.loggers.custom_scalars import add_momentum
from am_lightning.loggers.history import RunHistory
from am_lightning.loggers.reader import StatsReader
from am_lightning.optim.adamw import AMAdamW
from am_lightning.optim.base import AdaptiveMemoryOptimizer
from am_lightning.optim.convert import default_cap
from am_lightning.optim.param_groups import am_adamw
from am_lightning.optim.unwrap import require_am_optimizer
from am_lightning.optional_imports import cause_of

try:
    from accelerate.state import AcceleratorState
    from tqdm.auto import tqdm
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import CallbackHandler, ExportableState
except ImportError as error:
    raise ImportError(
        "AdaptiveMemoryCallback and AMAdamWFactory need transformers: "
        "pip install 'am-lightning[transformers]', or '.[transformers]' in a checkout"
    ) from cause_of(error, "accelerate", "tqdm", "transformers")

_BEFORE = "train/"  # prefix of all tags of the Trainer's reporting callbacks
_USE = "pass Trainer(optimizer_cls_and_kwargs=(AMAdamW, {'lr': ...})), or optimizers=(AMAdamW(...), None)"


class AdaptiveMemoryCallback(TrainerCallback, ExportableState):
    """Logs the momentum with the Trainer's loss: ``Trainer(callbacks=[AdaptiveMemoryCallback()])``.

    Each time the Trainer logs the training loss, the callback adds ``am/beta/mean|min|max``,
    ``am/beta/<layer group>``, ``am/clamp/at_max|at_zero`` and ``am/skipped_steps``, so that they reach
    ``state.log_history`` and every reporting callback, whose tags begin with ``train/``. It sets the optimizer's
    ``replica_group`` under DDP and its process groups under FSDP1. The callback moves itself before the reporting
    callbacks.

    Raises:
        TypeError: if the optimizer is not AMAdamW or AMSGD when training begins or after the Trainer was given another.
        ValueError: if DeepSpeed uses a feature that is not supported.
    """

    def __init__(self) -> None:
        self._reader: StatsReader | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move before the reporting callbacks."""
        self._go_first()

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Bind the optimizer, which is prepared, and restore the interval of a loaded checkpoint."""
        if not self._go_first() and state.is_world_process_zero:
            warnings.warn(
                "AdaptiveMemoryCallback cannot find the Trainer's CallbackHandler, so reporting callbacks may come "
                "before it and miss am/*: call trainer.callback_handler.callbacks.insert(0, "
                "trainer.pop_callback(AdaptiveMemoryCallback)) before trainer.train()",
                stacklevel=2,
            )
        am_optimizer = require_am_optimizer(optimizer, _USE)
        _bind(am_optimizer, model, caller(Trainer))
        unused = list(_unused(args, am_optimizer))
        if unused and state.is_world_process_zero:
            warnings.warn(
                f"{'; '.join(unused)}. A ready optimizer gets none of them, and an optimizer class only weight_decay: "
                "put 'lr' and the other options into optimizer_cls_and_kwargs, or use AMAdamWFactory, which takes them "
                "from the arguments",
                stacklevel=2,
            )
        if self._reader is None or self._reader.optimizer is not am_optimizer:
            self._reader = StatsReader(am_optimizer)
        self._reader.history = RunHistory()  # a second train() is a new run
        logged = [record["am/skipped_steps"] for record in state.log_history if "am/skipped_steps" in record]
        before = int(logged[-1]) if logged else 0
        self._reader.skipped_before += before - self._reader.skipped_in_all()
        # The Trainer saves the keys that are in this dict already, and an older checkpoint may lack this one.
        saved = cast(dict[str, Any], state.stateful_callbacks).setdefault(type(self).__name__, {})
        if state.global_step and isinstance(saved, dict) and "reader" in saved:
            self._reader.load_state_dict(saved["reader"])
        self._reader.begin(state.global_step)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Bind an optimizer that has replaced another, before its step, which DeepSpeed takes in the backward pass."""
        self._follow(model)

    on_pre_optimizer_step = on_step_begin  # an optimizer may be replaced during the step, too

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the momentum to the logs of the training loss, for the reporting callbacks and in the log history."""
        if self._reader is None or logs is None or "loss" not in logs:
            return
        self._follow(kwargs.get("model"))
        self._reader.read(state.global_step)
        scalars = self._reader.scalars()
        logs.update(scalars)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(scalars)
        if self._reader.newly_skipped():
            text = self._reader.skip_warning()
            if state.is_world_process_zero:
                warnings.warn(text, stacklevel=2)
        if not state.is_world_process_zero:
            return
        for other in _callbacks():
            if hasattr(board := getattr(other, "tb_writer", None), "add_custom_scalars"):
                add_momentum(board, self._reader, state.global_step, _BEFORE)
        if self._reader.history.picture_is_due(state.max_steps):
            self._draw(self._reader, state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the last picture, and print a summary of the run."""
        if self._reader is None or not state.is_world_process_zero:
            return
        self._draw(self._reader, state.global_step)
        if sentence := self._reader.sentence(state.global_step):
            tqdm.write(
                f"AdaptiveMemory, {sentence}"
            )  # at any log level and beside the progress bar, like the Trainer's logs

    def _draw(self, reader: StatsReader, step: int) -> None:
        """Draw to the reporting callbacks that support pictures."""
        sinks = [partial(report_image, other) for other in _callbacks()]
        reader.draw([lambda tag, *more, sink=sink: sink(f"{_BEFORE}{tag}", *more) for sink in sinks], step)

    def state(self) -> dict[str, Any]:
        """Return the interval so far, which the Trainer writes into ``trainer_state.json`` of a checkpoint."""
        exported: dict[str, Any] = {"args": {}, "attributes": {}}
        if self._reader is not None:
            saved = self._reader.state_dict()
            exported["reader"] = saved | {"interval": saved["interval"].tolist()}
            exported["reader"]["history"]["map"] = None
        return exported

    def _follow(self, model: nn.Module | None) -> None:
        """Read the Trainer's current optimizer, which may have been replaced during the run."""
        trainer = caller(Trainer)
        if self._reader is None or trainer is None:
            return
        am_optimizer = require_am_optimizer(trainer.optimizer, _USE)
        if am_optimizer is not self._reader.optimizer:
            before = self._reader.state_dict()
            _bind(am_optimizer, model, trainer)
            self._reader = StatsReader(am_optimizer)
            self._reader.load_state_dict(before)

    def _go_first(self) -> bool:
        """Move to the head of the Trainer's callbacks. Returns False if they cannot be found.

        The handler is iterating over the list. Callbacks before this one have been called, and later ones will be.
        """
        callbacks = _callbacks()
        if self not in callbacks:
            return False
        callbacks.remove(self)
        callbacks.insert(0, self)
        return True


def _callbacks() -> list[TrainerCallback]:
    """Return the Trainer's own list of its callbacks, or an empty list if it cannot be found."""
    handler = caller(CallbackHandler)
    return [] if handler is None else handler.callbacks


def _bind(optimizer: AdaptiveMemoryOptimizer, model: nn.Module | None, trainer: Trainer | None) -> None:
    """Bind ``optimizer`` to the layout of its parameters. The Trainer wraps the model in DeepSpeed's engine."""
    assert model is not None
    accelerate = AcceleratorState()
    models = [model] if trainer is None else [model, trainer.model_wrapped]
    bind_models(optimizer, models, accelerate.distributed_type, accelerate.num_processes)


def _unused(args: TrainingArguments, optimizer: AdaptiveMemoryOptimizer) -> Iterator[str]:
    """Yield the arguments that are not used, unless they have the default of their class (SFTConfig has its own)."""
    groups = optimizer.param_groups
    used = {"learning_rate": ("lr", [group.get("initial_lr", group["lr"]) for group in groups])}
    used["weight_decay"] = ("weight_decay", [group["weight_decay"] for group in groups])
    if isinstance(optimizer, AMAdamW):
        used["adam_beta1"] = ("beta1_max", [group["beta1_max"] for group in groups])
        used["adam_beta2"] = ("beta2", [group["betas"][1] for group in groups])
        used["adam_epsilon"] = ("eps", [group["eps"] for group in groups])
    defaults = {field.name: field.default for field in fields(args)}
    for name, (option, values) in used.items():
        value, found = getattr(args, name), {float(value) for value in values}
        wanted = {value}
        if name == "adam_beta1":
            wanted |= {default_cap(value, group["lambd"]) for group in groups}
        if value != defaults[name] and not wanted & found:
            built = ", ".join(f"{value:g}" for value in sorted(found))
            yield f"{type(args).__name__}.{name}={value} is not used: the optimizer was built with {option} {built}"


class AMAdamWFactory:
    """Builds ``am_adamw`` of the Trainer's model: ``Trainer(optimizer_cls_and_kwargs=(AMAdamWFactory, {...}))``.

    Keywords are those of ``am_adamw``. The defaults of ``lr``, ``weight_decay``, ``betas`` and ``eps`` are the
    TrainingArguments' ``learning_rate``, ``weight_decay``, ``adam_beta1`` b (the cap is b - (1 - b) lambd,
    0.9 -> 0.89), ``adam_beta2`` and ``adam_epsilon``. Needs transformers 5.2.

    Raises:
        TypeError: if the Trainer is older, and calls it like an optimizer class.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        if arguments or options:
            raise TypeError(
                "AMAdamWFactory was called like an optimizer class: this Trainer does not support optimizer factories, "
                "which need transformers 5.2. Use optimizer_cls_and_kwargs=(AMAdamW, {'lr': ...}) with it"
            )

    def __call__(self, model: nn.Module, **options: Any) -> AMAdamW:
        """Build the optimizer. The Trainer calls it.

        Raises:
            ValueError, TypeError: as ``am_adamw``, and if ``lr`` is missing in a call without a Trainer.
        """
        trainer = caller(Trainer)
        if trainer is not None:
            args = trainer.args
            cap = default_cap(args.adam_beta1, options.get("lambd", 0.1))
            own = {
                "lr": args.learning_rate,
                "weight_decay": args.weight_decay,
                "betas": (cap, args.adam_beta2),
                "eps": args.adam_epsilon,
            }
            options = {**own, **options}
        elif "lr" not in options:
            raise TypeError("AMAdamWFactory needs lr if no Trainer with a learning_rate calls it: give it lr")
        return am_adamw(model, **options)
