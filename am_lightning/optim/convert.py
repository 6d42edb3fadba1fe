"""Conversion of a torch.optim.AdamW or Adam into AMAdamW in place, so that references to the object stay valid."""

from __future__ import annotations

import functools
import warnings
import weakref
from typing import Any, TypeGuard

import torch

from am_lightning.optim.adamw import AMAdamW
from am_lightning.optim.kernels.registry import require_fused
from am_lightning.optim.param_state import FOREIGN_OPTIONS, has_coupled_decay

# Attributes of a step() that a scheduler has wrapped to count its calls. The second is the one before torch 2.5.
_MARKS = ("_wrapped_by_lr_sched", "_with_counter")
_METHODS = {"step", "state_dict", "load_state_dict", "add_param_group"}  # AMAdamW overrides these


def default_cap(beta1: float, lambd: float) -> float:
    """Return max(0, b - (1 - b) lambda) for b = beta1. It is 0.89 for b = 0.9 and lambda = 0.1, as in the paper."""
    return max(0.0, beta1 - (1 - beta1) * lambd)


def is_adam(optimizer: Any) -> TypeGuard[torch.optim.AdamW | torch.optim.Adam]:
    """Return whether ``optimizer`` is a torch.optim.AdamW or Adam. ``convert_adamw`` refuses some of them."""
    return isinstance(optimizer, torch.optim.AdamW | torch.optim.Adam)


def convert_adamw(
    optimizer: torch.optim.AdamW | torch.optim.Adam,
    *,
    lambd: float = 0.1,
    beta1_max: float | None = None,
    scope: str = "tensor",
) -> AMAdamW:
    """Turn ``optimizer`` into an AMAdamW in place and return it.

    The options foreach, fused, capturable, maximize, lr, eps and weight_decay are kept. If fused=True cannot run,
    because a compiler or Triton is missing, it becomes None with a warning. If neither foreach nor fused is set,
    AMAdamW uses its Triton kernels on a GPU.

    Args:
        optimizer: a torch.optim.AdamW, or a torch.optim.Adam without coupled weight decay. It must not be of a subclass
            and must not have made a step.
        lambd: memory regularisation lambda (default: 0.1).
        beta1_max: cap of beta_t for all groups (default: None, ``default_cap`` of the beta1 of each group).
        scope: "tensor", "group" or "global" (default: "tensor").

    Raises:
        ValueError: if the optimizer uses amsgrad, differentiable or coupled weight decay, is of a subclass, has state,
            or if a method such as ``step`` was replaced on the instance.
    """
    _refuse(optimizer)
    replaced_step = optimizer.__dict__.pop("step", None)
    dropped = _drop_fused_where_it_cannot_run(optimizer)
    optimizer.__dict__.pop("_step_supports_amp_scaling", None)  # GradScaler must unscale the gradients before step()
    own = optimizer.defaults["betas"][0]
    caps = [_cap(_beta1(group, own), lambd, beta1_max) for group in optimizer.param_groups]
    optimizer.__class__ = AMAdamW  # type: ignore[assignment]
    converted: AMAdamW = optimizer  # type: ignore[assignment]
    converted.configure(scope=scope, nonfinite="skip")
    converted.fused_dropped = dropped
    converted.param_layout.given.remember(converted.param_groups)
    for group, cap in zip(converted.param_groups, caps, strict=True):
        _convert_options(group, lambd, cap)
    _convert_options(converted.defaults, lambd, _cap(own, lambd, beta1_max))
    del converted.defaults[AMAdamW.cap_key]  # a group that is added later gets its cap from its betas
    converted._patch_step_function()
    if replaced_step is not None:
        _let_scheduler_watch(converted, [mark for mark in _MARKS if hasattr(replaced_step, mark)])
    return converted


def _drop_fused_where_it_cannot_run(optimizer: Any) -> bool | None:
    """Set ``fused=True`` to None if it cannot run on this rank. The ranks agree at their first step.

    Returns:
        Whether it was set to None, or None if no group has ``fused=True``.
    """
    fused = [group for group in optimizer.param_groups if group.get("fused")]
    try:
        for device in {param.device for group in fused for param in group["params"]}:
            require_fused(device)
    except RuntimeError as error:
        warnings.warn(f"{type(optimizer).__name__}(fused=True) becomes AMAdamW with fused=None: {error}", stacklevel=3)
        for group in (*fused, optimizer.defaults):
            group["fused"] = None
        return True
    return False if fused else None


def _refuse(optimizer: Any) -> None:
    name = f"{type(optimizer).__module__}.{type(optimizer).__name__}"
    kind = type(optimizer).__name__
    if type(optimizer) not in (torch.optim.AdamW, torch.optim.Adam):
        raise ValueError(
            f"{name} is not exactly torch.optim.AdamW or Adam, so what its step() adds would be lost: "
            "return torch.optim.AdamW, or am_lightning.AMAdamW itself"
        )
    hints = {
        "amsgrad": f"adaptive memory has no amsgrad form: build {kind} with amsgrad=False",
        "differentiable": f"AMAdamW.step() cannot be differentiated through: build {kind} with differentiable=False",
    }
    for key, hint in hints.items():
        if any(group.get(key) for group in optimizer.param_groups):
            raise ValueError(f"{kind} with {key}=True cannot be converted: {hint}")
    if has_coupled_decay(optimizer.param_groups, decoupled=type(optimizer) is torch.optim.AdamW):
        raise ValueError(
            "Adam adds weight decay to the gradient, which adaptive memory does not support: return torch.optim.AdamW, "
            "whose weight decay is decoupled, or Adam with weight_decay=0"
        )
    if any(optimizer.state.values()):
        raise ValueError(
            f"this {kind} has state already (it has made steps, or a checkpoint was loaded into it), and converting it "
            "would lose the running averages' bias correction: convert a fresh one, then load its checkpoint"
        )
    for method in sorted(_METHODS & optimizer.__dict__.keys()):
        if not any(hasattr(optimizer.__dict__[method], mark) for mark in _MARKS):
            raise ValueError(
                f"{kind}.{method} was replaced on this instance; after a conversion either the replacement or "
                f"AMAdamW's own {method} would have no effect: remove the replacement, then convert"
            )


def what_to_return(optimizer: Any) -> str:
    """Return a hint for messages that names an optimizer to use in place of one that cannot be converted."""
    name, library = type(optimizer).__name__, type(optimizer).__module__.partition(".")[0]
    if "adam" in name.lower() and library != "torch":
        return (
            f"in place of {library}'s {name} return torch.optim.AdamW, with fused=True for one kernel over all tensors"
        )
    if isinstance(optimizer, torch.optim.SGD):
        return "for SGD with adaptive memory return am_lightning.am_sgd(self, lr) or AMSGD"
    return f"{name} has a momentum rule of its own, which adaptive memory does not replace"


def _cap(beta1: Any, lambd: float, beta1_max: float | None) -> float:
    return default_cap(float(beta1), lambd) if beta1_max is None else beta1_max


def _beta1(group: dict[str, Any], own: Any) -> Any:
    """Return the beta1 that the user gave a group, or ``own``, the optimizer's default, if a scheduler cycles it."""
    cycled = "max_momentum" in group  # OneCycleLR and CyclicLR overwrite betas[0] when they are created
    return own if cycled else group["betas"][0]


def _convert_options(group: dict[str, Any], lambd: float, cap: float) -> None:
    for key in FOREIGN_OPTIONS:
        group.pop(key, None)
    group["lambd"] = lambd
    group[AMAdamW.cap_key] = cap
    group["betas"] = (cap, float(group["betas"][1]))


def _let_scheduler_watch(optimizer: AMAdamW, marks: list[str]) -> None:
    """Wrap the new ``step`` as LRScheduler had wrapped the old one, so that it can check the order of the two steps."""
    function, reference = AMAdamW.step, weakref.ref(optimizer)

    @functools.wraps(function)
    def step(*args: Any, **kwargs: Any) -> Any:
        owner: Any = reference()
        if "_wrapped_by_lr_sched" in marks:
            owner._opt_called = True
        if "_with_counter" in marks:
            owner._step_count += 1
        return function.__get__(owner, type(owner))(*args, **kwargs)

    for mark in marks:
        setattr(step, mark, True)
    optimizer.step = step  # type: ignore[method-assign]
