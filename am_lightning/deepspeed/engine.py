"""DeepSpeed: the information that only the engine has. ``attach(engine)`` after ``deepspeed.initialize``.

ZeRO calls the optimizer's ``step()`` once for every parameter group or sub-group, which is enough for
``scope="tensor"``. A scope that spans several calls needs all sums before the first call. The pre-pass computes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from am_lightning.distributed import ShardLayout
from am_lightning.distributed.layout import all_reduce
from am_lightning.distributed.strategies.deepspeed_zero import check_supported
from am_lightning.optim.base import AdaptiveMemoryOptimizer
from am_lightning.optim.closed_form import Decision, RowOptions, Sums
from am_lightning.optim.unwrap import unwrap_optimizer
from am_lightning.optional_imports import cause_of

try:
    import deepspeed
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.pipe.engine import PipelineEngine
except ImportError as error:
    raise ImportError(
        "am_lightning.deepspeed needs DeepSpeed: pip install 'am-lightning[deepspeed]', or '.[deepspeed]' in a checkout"
    ) from cause_of(error, "deepspeed")

_COUNTED: WeakSet[Any] = WeakSet()  # DeepSpeed's optimizers whose dropped steps are counted
_CHECKED_STEPS = 2  # training steps in which the predicted gradients are compared with those of the engine


def attach(engine: Any) -> AdaptiveMemoryOptimizer:
    """Give the adaptive memory optimizer inside ``engine`` its parameters' names and the sums of all groups.

    ``scope="global"`` needs it, and ``"group"`` if ZeRO-3 splits a group. Otherwise it only gives names. Call it on
    every rank, after ``deepspeed.initialize`` and before the first step. The ``AdaptiveMemory`` callback and
    ``am_lightning.huggingface.attach`` do so.

    Args:
        engine: first result of ``deepspeed.initialize``.

    Returns:
        The optimizer that was given to ``deepspeed.initialize``.

    Raises:
        TypeError: if ``engine`` is not a DeepSpeedEngine, or has no AMAdamW or AMSGD inside.
        ValueError: if the engine uses a feature that is not supported.
    """
    if not isinstance(engine, DeepSpeedEngine):
        raise TypeError(
            f"Invalid engine: {type(engine).__name__} (engine must be the first result of deepspeed.initialize)"
        )
    if isinstance(engine, PipelineEngine):
        raise ValueError(
            "adaptive memory does not support DeepSpeed's PipelineEngine: use ZeRO without a PipelineModule"
        )
    optimizer = find_optimizer(engine)
    named = list(engine.module.named_parameters())
    check_supported(engine.optimizer, named)
    if not any("param_names" in group for group in optimizer.param_groups):
        optimizer.name_parameters(named)
    optimizer.param_layout.bind_engine(engine.data_parallel_group)
    owner = engine.optimizer
    in_parts = hasattr(owner, "fp32_partitioned_groups_flat") or hasattr(owner, "single_partition_of_fp32_groups")
    if optimizer.pre_pass is None and optimizer.scope != "tensor" and in_parts and hasattr(owner, "averaged_gradients"):
        optimizer.pre_pass = PrePass(optimizer, owner)
    if owner is not optimizer and owner not in _COUNTED:
        _COUNTED.add(owner)
        _after_step_of(owner, lambda: optimizer._stats.observe_dropped() if _dropped(engine) else None)
    return optimizer


def find_optimizer(engine: Any) -> AdaptiveMemoryOptimizer:
    """Return the adaptive memory optimizer inside the engine's optimizer.

    Raises:
        TypeError: if there is none.
    """
    inner = unwrap_optimizer(engine.optimizer)
    if not isinstance(inner, AdaptiveMemoryOptimizer):
        raise TypeError(
            f"Invalid engine: its optimizer is {type(inner).__name__} (pass optimizer=am_adamw(model, ...) to "
            "deepspeed.initialize, and remove 'optimizer' from the DeepSpeed configuration)"
        )
    return inner


def after_each_step(engine: Any, call: Callable[[], None]) -> None:
    """Call ``call`` after every training step of ``engine``, even if it stepped the optimizer several times.

    A step that DeepSpeed drops because the scaled loss overflowed in float16 does not count.
    """
    optimizer, owner = find_optimizer(engine), engine.optimizer
    if owner is optimizer:
        optimizer.register_step_post_hook(lambda *_: call())
        return
    stepped = False

    def note(*_: Any) -> None:
        nonlocal stepped
        stepped = True

    def finish() -> None:
        nonlocal stepped
        if stepped or _dropped(engine):
            call()
        stepped = False

    optimizer.register_step_post_hook(note)
    _after_step_of(owner, finish)


def _after_step_of(owner: Any, call: Callable[[], None]) -> None:
    """Call ``call`` after each ``step()`` of DeepSpeed's optimizer."""
    original = owner.step

    def step(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        call()
        return result

    owner.step = step


def _dropped(engine: Any) -> bool:
    """Return whether the engine dropped the step because of a gradient that is not finite; the same on all ranks.

    With a dynamic loss scale such steps are part of the search for the scale.
    """
    searches = engine.fp16_enabled() and engine.dynamic_loss_scale()
    return bool(getattr(engine.optimizer, "overflow", False)) and not searches


class PrePass:
    """Computes the sums of all partitions, one all-reduce and one decision in the first ``step()`` of a training step.

    Gradients of later partitions are read where the engine keeps them, and unscaled and clipped as the engine does
    later. ``unscale_and_clip_grads`` is wrapped to read the gradient norm. ``tests/package/private_deepspeed.py`` lists
    the private names of DeepSpeed that are read.
    """

    def __init__(self, optimizer: AdaptiveMemoryOptimizer, owner: Any) -> None:
        self._optimizer, self._owner = optimizer, owner
        self._stage_3 = hasattr(owner, "fp32_partitioned_groups_flat")
        self._flats = owner.fp32_partitioned_groups_flat if self._stage_3 else owner.single_partition_of_fp32_groups
        self._group_of = [owner.sub_group_to_group_id[k] if self._stage_3 else k for k in range(len(self._flats))]
        self._norm: Any = None
        self._layouts: list[ShardLayout] = []
        self._slices: list[slice] = []
        self._decision: Decision | None = None
        self._predicted: list[Tensor] = []
        self._steps = 0
        original = owner.unscale_and_clip_grads

        def unscale_and_clip_grads(gradients: Any, total_norm: Any) -> Any:
            self._norm = total_norm
            return original(gradients, total_norm)

        owner.unscale_and_clip_grads = unscale_and_clip_grads

    @property
    def _groups(self) -> list[dict[str, Any]]:
        """All parameter groups, in the engine's order. Loading a checkpoint replaces the dicts."""
        return self._optimizer.given_groups()

    def __call__(self, layout: ShardLayout) -> Decision:
        """Return the decision for the tensors of ``layout``, which is the layout of one call of ``step()``."""
        flat = layout.logical_params[0].param
        turn = next(k for k, other in enumerate(self._flats) if other is flat)
        if turn == 0:
            self._take_all()
        self._check(turn)
        assert self._decision is not None
        members, decision = self._slices[turn], self._decision
        beta, omega, active, skipped, bad = decision
        return Decision(beta[members], omega[members], active[members], skipped, bad[members])

    def _take_all(self) -> None:
        """Run pass 1 over the partitions in turn, so that at most one pending gradient is in memory."""
        self._steps += 1
        found, sizes = [], [0] * len(self._groups)
        self._layouts, self._slices, self._predicted, start = [], [], [], 0
        for k in range(len(self._flats)):
            with self._as_call(k):
                layout = self._optimizer.current_layout()
                local = self._optimizer.prepare(layout)
                packed = self._optimizer.local_sums(local)
                local.plan.release()
                self._predicted.append(self._flats[k].grad.sum())
            found.append((packed, local.options))
            self._layouts.append(layout)
            self._slices.append(slice(start, start + len(layout.logical_params)))
            start += len(layout.logical_params)
            sizes[self._group_of[k]] += len(layout.logical_params)
        if len({reduction.ranks for layout in self._layouts for reduction in layout.reductions}) > 1:
            raise ValueError(
                f"scope={self._optimizer.scope!r} cannot be formed: the partitions lie on different sets of ranks. Use "
                "scope='tensor'"
            )
        sums = Sums.unpack(self._over_ranks(torch.cat([packed for packed, _ in found])))
        options = RowOptions(*map(torch.cat, zip(*(options for _, options in found), strict=True)))
        self._decision = self._optimizer.decide(sums, options, sizes)
        with self._as_call(0):
            self._optimizer.current_layout()

    def _over_ranks(self, vector: Tensor) -> Tensor:
        """Sum a vector over the ranks. Partitions are disjoint, so the numbers of all ranks count."""
        for reduction in self._layouts[0].reductions:
            for group in reduction.groups:
                vector = all_reduce(vector, group)
        return vector

    @contextmanager
    def _as_call(self, k: int) -> Iterator[None]:
        """Set the optimizer as the engine will call it for partition ``k``, with the gradient of that call."""
        optimizer, flat, group = self._optimizer, self._flats[k], self._groups[self._group_of[k]]
        groups, gradient = optimizer.param_groups, flat.grad
        params = [entry["params"] for entry in self._groups]
        optimizer.param_groups = self._groups if self._stage_3 else [group]
        if self._stage_3:
            for entry in self._groups:
                entry["params"] = []
        group["params"] = [flat]
        if k > 0:
            flat.grad = self._pending(k)
        try:
            yield
        finally:
            for entry, kept in zip(self._groups, params, strict=True):
                entry["params"] = kept
            optimizer.param_groups = groups
            flat.grad = gradient

    def _pending(self, k: int) -> Tensor:
        """Return the gradient with which the engine will step partition ``k``."""
        owner, flat = self._owner, self._flats[k]
        offloaded = owner.offload_optimizer if self._stage_3 else owner.cpu_offload
        if offloaded:
            gradient = flat.grad.to(flat.dtype)
        else:
            parts = owner.averaged_gradients[k]
            whole = getattr(parts, "flat_partition", None)
            gradient = whole.reshape(-1) if whole is not None else torch.cat([part.reshape(-1) for part in parts])
            gradient = torch.nn.functional.pad(gradient.to(flat.dtype), (0, flat.numel() - gradient.numel()))
        pending: Tensor = gradient / self._scale()
        return pending

    def _scale(self) -> Any:
        """Return the divisor of the engine's gradients: its loss scale and its clipping."""
        scale = self._owner.loss_scale
        if self._owner.clip_grad > 0:
            scale = torch.clamp(((self._norm / scale) + 1e-6) / self._owner.clip_grad, min=1.0) * scale
        return scale

    def _check(self, turn: int) -> None:
        """Check in the first steps, on all ranks, that the gradients of the engine are the predicted ones."""
        if self._steps > _CHECKED_STEPS:
            return
        handed = self._flats[turn].grad.sum()
        off = ((handed - self._predicted[turn]).abs() > 1e-4 * handed.abs() + 1e-5).double().reshape(1)
        if bool(self._over_ranks(off) > 0):
            name = self._layouts[turn].logical_params[0].name
            raise RuntimeError(
                f"the gradient of {name!r} differs from the prediction for DeepSpeed {deepspeed.__version__}, so "
                f"scope={self._optimizer.scope!r} would be wrong: use scope='tensor', or a DeepSpeed version that "
                "am-lightning[deepspeed] names"
            )
