"""Turn a torch.optim.AdamW or Adam into AMAdamW in place: schedulers and the user's own references stay valid."""

from __future__ import annotations

import functools
import warnings
import weakref
from typing import Any, TypeGuard

import torch

from am_lightning.optim.adamw import AMAdamW
from am_lightning.optim.kernels.registry import require_fused
from am_lightning.optim.param_state import FOREIGN_OPTIONS, has_coupled_decay

# On a step() that a scheduler has wrapped to count it: torch's of today, and those written after torch's before 2.5
_MARKS = ("_wrapped_by_lr_sched", "_with_counter")
_METHODS = {"step", "state_dict", "load_state_dict", "add_param_group"}  # AMAdamW has its own


def default_cap(beta1: float, lambd: float) -> float:
    """b - (1 - b) lambda, not below 0: the paper's 0.9 - 0.1 lambda = 0.89 for the usual b."""
    return max(0.0, beta1 - (1 - beta1) * lambd)


def is_adam(optimizer: Any) -> TypeGuard[torch.optim.AdamW | torch.optim.Adam]:
    """A torch.optim.AdamW or Adam, or of a class made from one; ``convert_adamw`` says which it takes."""
    return isinstance(optimizer, torch.optim.AdamW | torch.optim.Adam)


def convert_adamw(
    optimizer: torch.optim.AdamW | torch.optim.Adam,
    *,
    lambd: float = 0.1,
    beta1_max: float | None = None,
    scope: str = "tensor",
) -> AMAdamW:
    """Make ``optimizer`` an AMAdamW; the same object is returned.

    Args:
        optimizer: exactly a torch.optim.AdamW that has made no step, or such a torch.optim.Adam without weight decay
            or with ``decoupled_weight_decay``, which is the same.
        lambd: memory regularisation lambda.
        beta1_max: cap of beta_t for all groups; None: ``default_cap`` of each group's own beta1.
        scope: "tensor", "group" or "global".

    foreach, fused, capturable, maximize, lr, eps and weight decay are carried over. fused=True becomes None, with a
    warning, where its kernels lack a compiler or Triton. With neither set a GPU's kernels are AMAdamW's: Triton's.

    Raises:
        ValueError: amsgrad, differentiable, coupled weight decay, a subclass, a replaced ``step``, or state already
            present.
    """
    _refuse(optimizer)
    replaced_step = optimizer.__dict__.pop("step", None)
    dropped = _drop_fused_where_it_cannot_run(optimizer)
    optimizer.__dict__.pop("_step_supports_amp_scaling", None)  # GradScaler must unscale before step(), not inside it
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
    del converted.defaults[AMAdamW.cap_key]  # a later group takes it from its betas
    converted._patch_step_function()
    if replaced_step is not None:
        _let_scheduler_watch(converted, [mark for mark in _MARKS if hasattr(replaced_step, mark)])
    return converted


def _drop_fused_where_it_cannot_run(optimizer: Any) -> bool | None:
    """Whether ``fused=True`` was taken away; None where no group has it. The ranks agree at their first step."""
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
            "Adam adds weight decay to the gradient, which adaptive memory has no form of: return torch.optim.AdamW, "
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
                f"{kind}.{method} was replaced on this instance, and the replacement would be lost, or would lose what "
                "AMAdamW does there: remove it, then convert"
            )


def what_to_return(optimizer: Any) -> str:
    """For a message: the optimizer of ours, or of torch, in place of one that cannot be converted."""
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
    """The user's beta1 of a group. ``own`` is the optimizer's, because a scheduler may have changed the group's."""
    cycled = "max_momentum" in group  # OneCycleLR and CyclicLR write betas[0] as soon as they are built
    return own if cycled else group["betas"][0]


def _convert_options(group: dict[str, Any], lambd: float, cap: float) -> None:
    for key in FOREIGN_OPTIONS:
        group.pop(key, None)
    group["lambd"] = lambd
    group[AMAdamW.cap_key] = cap
    group["betas"] = (cap, float(group["betas"][1]))


def _let_scheduler_watch(optimizer: AMAdamW, marks: list[str]) -> None:
    """Wrap the new step() as LRScheduler had wrapped the old one, to check the order of the two steps."""
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
