"""The state of a parameter: AdamW's entries, and 0-dim adaptive scalars in a precision of their own."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from am_lightning.distributed import LogicalParam
from am_lightning.optim.validation import WHOLE_OPTIMIZER, check_betas

SCALARS = ("beta_prod", "beta", "prev_lr")  # prod of beta_i, last beta_t, eta_{t-1}
TABLE, OPTIONS = "am_table", "am_options"  # keys of saved groups: adaptive scalars by name, options of all groups
NO_BETA = -1.0  # ``beta`` before the first step; not nan, because FSDP1 compares scalars across ranks with ==

# Options of torch.optim.AdamW that an AMAdamW group does not have, and the values that describe AMAdamW.
FOREIGN_OPTIONS = {"amsgrad": False, "differentiable": False, "decoupled_weight_decay": True}


def has_coupled_decay(groups: Iterable[dict[str, Any]], *, decoupled: bool = True) -> bool:
    """Return whether weight decay is added to the gradient, as in torch.optim.Adam. AMAdamW has no form of it.

    Args:
        groups: parameter groups.
        decoupled: value for groups without ``decoupled_weight_decay``, which older releases of torch lack
            (default: True).
    """
    return any(g.get("weight_decay") and not g.get("decoupled_weight_decay", decoupled) for g in groups)


def scalar_dtype(param: Tensor) -> torch.dtype:
    """Return the dtype of the adaptive scalars: float64 for float64 parameters, else float32."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def widest_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on a device without float64, such as MPS and some Intel GPUs."""
    if device.type == "xpu":
        return torch.float64 if _xpu_has_float64(device) else torch.float32
    return torch.float32 if device.type == "mps" else torch.float64


@functools.cache
def _xpu_has_float64(device: torch.device) -> bool:
    return bool(getattr(torch.xpu.get_device_properties(device), "has_fp64", True))


def sums_live_on(params: Sequence[Tensor]) -> tuple[torch.device, torch.dtype]:
    """Return the device and dtype of the packed sums: the device of the first parameter, and its widest dtype."""
    device = params[0].device if params else torch.device("cpu")
    return device, widest_dtype(device)


def as_stored(values: Tensor, params: list[Tensor]) -> Tensor:
    """Round ``[rows]`` numbers to the dtypes of the scalar states, so that ranks without a state have the same bits."""
    kinds = {scalar_dtype(param) for param in params}
    if kinds <= {torch.float64}:
        return values
    rounded = values.to(torch.float32).to(values.dtype)
    if kinds == {torch.float32}:
        return rounded
    wide = torch.tensor([scalar_dtype(param) == torch.float64 for param in params], device=values.device)
    return torch.where(wide, values, rounded)


def direction_dtype(param: Tensor, wanted: torch.dtype | None) -> torch.dtype:
    """Return the dtype of the direction d: ``wanted`` (``exp_avg_dtype``) for float32 parameters, else theirs."""
    return wanted if wanted is not None and param.dtype == torch.float32 else param.dtype


def check_direction(wanted: torch.dtype | None, params: Iterable[LogicalParam]) -> None:
    """Refuse ``exp_avg_dtype`` if an engine packs the states of many tensors into one tensor.

    Raises:
        ValueError: if an engine does so. The message names the engine and the parameter.
    """
    for logical in params if wanted is not None else ():
        if logical.strategy.one_state_dtype:
            raise ValueError(
                f"Invalid exp_avg_dtype: {wanted} ({logical.strategy.name}, which holds parameter {logical.name!r}, "
                "saves states of one dtype only: exp_avg_dtype must be None there; FSDP2 and DDP take it)"
            )


def create(
    state: dict[str, Any],
    param: Tensor,
    moments: tuple[str, ...],
    *,
    adaptive: bool = True,
    direction: torch.dtype | None = None,
) -> None:
    """Fill ``state`` with zero moments and the scalars before the first step.

    ``step`` is on the device of the parameter, because that device decides whether a step is skipped.

    Args:
        state: the empty state of the parameter.
        param: the parameter.
        moments: keys of the states shaped like the parameter, the direction d first.
        adaptive: create the adaptive scalars, too (default: True). A flat parameter of many tensors has none in its
            state.
        direction: ``exp_avg_dtype`` (default: None); see ``direction_dtype``.
    """
    state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
    dtypes = [direction_dtype(param, direction), *[param.dtype] * (len(moments) - 1)]
    for key, dtype in zip(moments, dtypes, strict=True):
        state[key] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
    if not adaptive:
        return
    state["beta_prod"] = _scalar(1.0, param)
    state["beta"] = _scalar(NO_BETA, param)
    state["prev_lr"] = _scalar(0.0, param)


def complete(state: dict[str, Any], param: Tensor, *, beta1: float, lr: float | Tensor, cap: float) -> None:
    """Add adaptive scalars to a state of AdamW, whose momentum has decayed by ``beta1`` at each step."""
    if "beta_prod" not in state:
        # AdamW keeps ``step`` on the CPU unless it is capturable or fused. In older releases it was a number.
        state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=param.device)
        power = torch.pow(float(beta1), state["step"].to(widest_dtype(state["step"].device)))
        state["beta_prod"] = power.to(dtype=scalar_dtype(param), device=param.device)
    if "beta" not in state:
        state["beta"] = _scalar(cap, param)
    if "prev_lr" not in state:
        state["prev_lr"] = _scalar(lr, param)


def follow(states: Mapping[Tensor, dict[str, Any]], params: Iterable[Tensor]) -> None:
    """Move states to the devices of their parameters, because the model may have moved and kernels read addresses."""
    for param in params:
        state = states.get(param, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.device != param.device:
                state[key] = value.to(param.device)


def _scalar(value: float | Tensor, param: Tensor) -> Tensor:
    """Return ``value`` as 0-dim tensor on the device of the parameter."""
    if isinstance(value, Tensor):
        return value.detach().reshape(()).to(dtype=scalar_dtype(param), device=param.device, copy=True)
    return torch.full((), float(value), dtype=scalar_dtype(param), device=param.device)


def untouched(state: dict[str, Any]) -> bool:
    """Return whether a state has stepped but has the adaptive scalars of ``create``, so its moments are AdamW's."""
    if float(state["step"]) <= 0 or any(state.get(key) is None for key in SCALARS):
        return False
    return float(state["beta_prod"]) == 1 and float(state["prev_lr"]) == 0 and not float(state["beta"]) >= 0


def betas_of(saved: dict[str, Any]) -> tuple[float, float]:
    """Return the betas of a saved group as floats. Those of AdamW may be tensors.

    Raises:
        ValueError, TypeError: if they are not two numbers in [0, 1).
    """
    betas = saved["betas"]
    if isinstance(betas, (list, tuple)):
        betas = [beta.item() if isinstance(beta, Tensor) and beta.numel() == 1 else beta for beta in betas]
    return check_betas(betas)


def restore_options(group: dict[str, Any], live: dict[str, Any], cap_key: str) -> None:
    """Complete the loaded options of ``group`` with those of ``live``. The cap is always that of ``live``."""
    for key in (*FOREIGN_OPTIONS, *WHOLE_OPTIMIZER):
        if key not in live:
            group.pop(key, None)
    for key, value in live.items():
        if key != "params":
            group.setdefault(key, value)
    group[cap_key] = live[cap_key]
    if "betas" in live:
        group["betas"] = (live[cap_key], betas_of(group)[1])
    if "fused" not in live:
        group.pop("fused", None)  # torch.optim.SGD has it
    else:
        group["fused"] = live["fused"]
        if live["fused"]:
            group["foreach"] = live["foreach"]  # the checkpoint may have True, which excludes fused=True


def restore_scalars(
    state: dict[str, Any], saved: dict[str, Any], param: Tensor, *, beta1: float, lr: float | Tensor, cap: float
) -> None:
    """Restore the scalars, which torch.optim has cast to the dtype of the parameter, and complete an AdamW state."""
    state["step"] = torch.as_tensor(saved["step"], dtype=torch.float32, device=param.device).reshape(()).clone()
    foreign = untouched(saved)
    for key in SCALARS:
        state.pop(key, None)
        if not foreign and saved.get(key) is not None:
            state[key] = _scalar(saved[key], param)
    complete(state, param, beta1=beta1, lr=lr, cap=cap)
