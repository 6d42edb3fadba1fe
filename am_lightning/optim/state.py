"""State of a row: AdamW's names and shapes, and 0-dim adaptive scalars that keep their own precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SCALARS = ("beta_prod", "beta", "prev_lr")  # prod of beta_i, last beta_t, eta_{t-1}

# Options of torch.optim.AdamW that an AMAdamW group does not have.
FOREIGN_OPTIONS = ("amsgrad", "differentiable", "decoupled_weight_decay")


def scalar_dtype(param: Tensor) -> torch.dtype:
    """The adaptive scalars are float32, or float64 for float64 parameters, whatever the moments are."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def widest_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def create(state: dict[str, Any], param: Tensor, moments: tuple[str, ...]) -> None:
    """Zero moments and no step taken. ``step`` lives beside the parameter: what is skipped is known there."""
    state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
    for key in moments:
        state[key] = torch.zeros_like(param, memory_format=torch.preserve_format)
    state["beta_prod"] = _scalar(1.0, param)
    state["beta"] = _scalar(float("nan"), param)
    state["prev_lr"] = _scalar(0.0, param)


def complete(state: dict[str, Any], param: Tensor, *, beta1: float, lr: float | Tensor, cap: float) -> None:
    """Give a state that AdamW wrote the adaptive scalars: its momentum decayed by ``beta1`` at each of its steps."""
    if "beta_prod" not in state:
        power = torch.pow(float(beta1), state["step"].to(widest_dtype(state["step"].device)))
        state["beta_prod"] = power.to(dtype=scalar_dtype(param), device=param.device)
    if "beta" not in state:
        state["beta"] = _scalar(cap, param)
    if "prev_lr" not in state:
        state["prev_lr"] = _scalar(lr, param)


def _scalar(value: float | Tensor, param: Tensor) -> Tensor:
    """0-dim, beside the parameter."""
    if isinstance(value, Tensor):
        return value.detach().reshape(()).to(dtype=scalar_dtype(param), device=param.device, copy=True)
    return torch.full((), float(value), dtype=scalar_dtype(param), device=param.device)


def check_loadable(
    state_dict: dict[str, Any], param_groups: list[dict[str, Any]], moments: tuple[str, ...], who: str
) -> None:
    """Refuse the checkpoint of another optimizer or model before anything is overwritten.

    Raises:
        ValueError: a state lacks what this optimizer needs, or has another shape than the parameter.
    """
    if any(group.get("amsgrad") for group in state_dict["param_groups"]):
        raise ValueError(f"loaded state dict is of AdamW with amsgrad=True, which {who} has no form of: start anew")
    params = [p for group in param_groups for p in group["params"]]
    ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    if len(ids) != len(params):
        return  # torch.optim says it better
    for index, param in zip(ids, params, strict=True):
        state = state_dict["state"].get(index)
        if not state:
            continue
        for key in ("step", *moments):
            if state.get(key) is None:
                raise ValueError(
                    f"loaded state dict has no {key!r} for parameter {index}: it is not a checkpoint of {who}"
                )
        for key in moments:
            if state[key].shape != param.shape:
                raise ValueError(
                    f"loaded state dict has {key!r} of shape {tuple(state[key].shape)} for parameter {index}, "
                    f"which has shape {tuple(param.shape)}: it is a checkpoint of another model"
                )


def restore_options(group: dict[str, Any], live: dict[str, Any], cap_key: str) -> None:
    """Options after a load: the checkpoint's, this optimizer's where it has none, and always this optimizer's cap."""
    for key in FOREIGN_OPTIONS:
        if key not in live:
            group.pop(key, None)
    for key, value in live.items():
        if key != "params":
            group.setdefault(key, value)
    group[cap_key] = live[cap_key]
    if "betas" in group:
        group["betas"] = (live[cap_key], float(group["betas"][1]))
    if "fused" in live:
        group["fused"] = live["fused"]


def restore_scalars(
    state: dict[str, Any], saved: dict[str, Any], param: Tensor, *, beta1: float, lr: float | Tensor, cap: float
) -> None:
    """Undo torch.optim's cast of every float state to the parameter's dtype, and complete an AdamW state."""
    state["step"] = torch.as_tensor(saved["step"], dtype=torch.float32).to(param.device, copy=True)
    for key in SCALARS:
        if key in saved:
            state[key] = _scalar(saved[key], param)
    complete(state, param, beta1=beta1, lr=lr, cap=cap)
