"""State of a row: AdamW's names and shapes, and 0-dim adaptive scalars that keep their own precision."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from am_lightning.names import group_names
from am_lightning.optim.validation import WHOLE_OPTIMIZER
from am_lightning.sharding.dtensor import is_dtensor

SCALARS = ("beta_prod", "beta", "prev_lr")  # prod of beta_i, last beta_t, eta_{t-1}
NO_BETA = -1.0  # ``beta`` before the first step; not nan, for FSDP1 compares scalars across ranks with ==

# Options of torch.optim.AdamW that an AMAdamW group does not have, and what they would be.
FOREIGN_OPTIONS = {"amsgrad": False, "differentiable": False, "decoupled_weight_decay": True}


def has_coupled_decay(groups: Iterable[dict[str, Any]], *, decoupled: bool = True) -> bool:
    """Whether weight decay is added to the gradient, as by torch.optim.Adam, which AMAdamW has no form of.

    Args:
        decoupled: of groups that do not say, which are those of older releases.
    """
    return any(g.get("weight_decay") and not g.get("decoupled_weight_decay", decoupled) for g in groups)


def scalar_dtype(param: Tensor) -> torch.dtype:
    """The adaptive scalars are float32, or float64 for float64 parameters, whatever the moments are."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def widest_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that has no float64: MPS, and some of Intel's GPUs."""
    if device.type == "xpu":
        return torch.float64 if _xpu_has_float64(device) else torch.float32
    return torch.float32 if device.type == "mps" else torch.float64


@functools.cache
def _xpu_has_float64(device: torch.device) -> bool:
    return bool(getattr(torch.xpu.get_device_properties(device), "has_fp64", True))


def as_stored(values: Tensor, params: list[Tensor]) -> Tensor:
    """``[rows]`` numbers rounded as the rows' scalar states would: the same bits with and without a state."""
    kinds = {scalar_dtype(param) for param in params}
    if kinds <= {torch.float64}:
        return values
    rounded = values.to(torch.float32).to(values.dtype)
    if kinds == {torch.float32}:
        return rounded
    wide = torch.tensor([scalar_dtype(param) == torch.float64 for param in params], device=values.device)
    return torch.where(wide, values, rounded)


def direction_dtype(param: Tensor, wanted: torch.dtype | None) -> torch.dtype:
    """Of the direction d: ``wanted`` (``exp_avg_dtype``) beside float32 parameters, else the parameter's."""
    return wanted if wanted is not None and param.dtype == torch.float32 else param.dtype


def create(
    state: dict[str, Any],
    param: Tensor,
    moments: tuple[str, ...],
    *,
    adaptive: bool = True,
    direction: torch.dtype | None = None,
) -> None:
    """Zero moments and no step taken. ``step`` lives beside the parameter: what is skipped is known there.

    Args:
        moments: states shaped like the parameter, the direction d first.
        adaptive: with the adaptive scalars, which a flat parameter of many tensors does not keep here.
        direction: dtype of d where it is not the parameter's; see ``direction_dtype``.
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
    state_dict: dict[str, Any],
    param_groups: list[dict[str, Any]],
    moments: tuple[str, ...],
    who: str,
    names: dict[int, str] | None = None,
) -> None:
    """Refuse the checkpoint of another optimizer, model or placement before anything is overwritten.

    Args:
        state_dict: what is to be loaded.
        param_groups: this optimizer's.
        moments: states shaped like the parameter.
        who: this optimizer's class, for messages.
        names: ``id(parameter) -> name`` of parameters whose group has no names.

    Raises:
        ValueError: a state lacks what this optimizer needs, or has another shape or placement than its parameter.
    """
    if any(group.get("amsgrad") for group in state_dict["param_groups"]):
        raise ValueError(f"loaded state dict is of AdamW with amsgrad=True, which {who} has no form of: start anew")
    has_both = any("decoupled_weight_decay" in group for group in param_groups)  # AMSGD
    if not has_both and has_coupled_decay(state_dict["param_groups"]):
        raise ValueError(
            f"loaded state dict is of Adam with weight_decay that is coupled, and {who}'s is decoupled: start anew, or "
            "set decoupled_weight_decay=True in its groups to go on as AdamW would"
        )
    params = [p for group in param_groups for p in group["params"]]
    ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    if len(ids) != len(params):
        return  # torch.optim says it better
    known = [name for group in group_names(param_groups, names) for name in group]
    states = [
        (name, state_dict["state"][index], param)
        for name, index, param in zip(known, ids, params, strict=True)
        if state_dict["state"].get(index)
    ]
    for name, state, param in states:
        _check_moments(name, state, param, moments, who)
    _check_scalars([(name, state) for name, state, _ in states])


def _check_moments(name: str, state: dict[str, Any], param: Tensor, moments: tuple[str, ...], who: str) -> None:
    for key in ("step", *moments):
        if state.get(key) is None:
            raise ValueError(
                f"loaded state dict has no {key!r} for parameter {name!r}: it is not a checkpoint of {who}"
            )
    for key in moments:
        if state[key].shape != param.shape:
            raise ValueError(
                f"loaded state dict has {key!r} of shape {tuple(state[key].shape)} for parameter {name!r}, "
                f"which has shape {tuple(param.shape)}: it is a checkpoint of another model"
            )
        if _placement(state[key]) != _placement(param):
            raise ValueError(
                f"loaded state dict has {key!r} for parameter {name!r} as {_placed(state[key])}, but the parameter is "
                f"{_placed(param)}. {_cure(state[key], param)}"
            )


def _placement(tensor: Any) -> tuple[Any, ...] | None:
    """What two DTensors must share for their local pieces to hold the same elements; None for a plain tensor."""
    return (tuple(tensor.placements), tensor.device_mesh.mesh.tolist()) if is_dtensor(tensor) else None


def _placed(tensor: Any) -> str:
    if not is_dtensor(tensor):
        return "a plain tensor"
    ranks = tensor.device_mesh.mesh.flatten().tolist()
    listed = f"{', '.join(map(str, ranks[:8]))}{', ...' if len(ranks) > 8 else ''}"  # in the order of the mesh
    return f"a DTensor placed ({', '.join(map(str, tensor.placements))}) on the mesh of ranks {listed}"


def _cure(state: Any, param: Any) -> str:
    load = "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict(model, optimizer, state_dict"
    if not is_dtensor(state):  # whole, as saved with full_state_dict=True
        return f"Load a full state dict with {load}, options=StateDictOptions(full_state_dict=True)), which splits it"
    if not is_dtensor(param):
        return "Gather it first: tensor.full_tensor() on all ranks, or save with StateDictOptions(full_state_dict=True)"
    return f"Save and load with torch.distributed.checkpoint (dcp.save, dcp.load, then {load})), which moves the pieces"


def _check_scalars(states: list[tuple[str, dict[str, Any]]]) -> None:
    """All three adaptive scalars of a parameter or none (AdamW's checkpoint), and alike for all that have stepped."""
    cure = (
        f"Save the whole state_dict(), or remove {', '.join(map(repr, SCALARS))} of every parameter to go on as from a "
        "checkpoint of AdamW"
    )
    full = bare = None
    for name, state in states:
        missing = list(_missing_scalars(state))
        if missing and len(missing) < len(SCALARS):
            raise ValueError(
                f"loaded state dict lacks {' and '.join(map(repr, missing))} for parameter {name!r}, of which it has "
                f"other adaptive scalars, so beta_t could not go on. {cure}"
            )
        if float(state["step"]) > 0:
            full, bare = (full, name) if missing else (name, bare)
        if full is not None and bare is not None:
            raise ValueError(
                f"loaded state dict has the adaptive scalars ({', '.join(SCALARS)}) for parameter {full!r} but not for "
                f"{bare!r}, though both have stepped. {cure}"
            )


def _missing_scalars(state: dict[str, Any]) -> Iterator[str]:
    """Those absent, or never filled in: torch.distributed.checkpoint loads into a fresh state (``create``).

    A state that has stepped has a beta, and that beta is a factor of ``beta_prod``.
    """
    if _untouched(state):
        yield from SCALARS
        return
    yield from (key for key in SCALARS if state.get(key) is None)
    if float(state["step"]) > 0 and all(state.get(key) is not None for key in ("beta_prod", "beta")):
        beta = float(state["beta"])
        if float(state["beta_prod"]) == 1 and not beta >= 1:
            yield "beta_prod"
        if not beta >= 0:
            yield "beta"


def _untouched(state: dict[str, Any]) -> bool:
    """A state that has stepped, with adaptive scalars as ``create`` makes them: the moments are AdamW's."""
    if float(state["step"]) <= 0 or any(state.get(key) is None for key in SCALARS):
        return False
    return float(state["beta_prod"]) == 1 and float(state["prev_lr"]) == 0 and not float(state["beta"]) >= 0


def restore_options(group: dict[str, Any], live: dict[str, Any], cap_key: str) -> None:
    """Options after a load: the checkpoint's, this optimizer's where it has none, and always this optimizer's cap."""
    for key in (*FOREIGN_OPTIONS, *WHOLE_OPTIMIZER):
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
        if live["fused"]:
            group["foreach"] = live["foreach"]  # the checkpoint's may be True, which does not go with it


def restore_scalars(
    state: dict[str, Any], saved: dict[str, Any], param: Tensor, *, beta1: float, lr: float | Tensor, cap: float
) -> None:
    """Undo torch.optim's cast of every float state to the parameter's dtype, and complete an AdamW state."""
    state["step"] = torch.as_tensor(saved["step"], dtype=torch.float32).to(param.device, copy=True)
    foreign = _untouched(saved)
    for key in SCALARS:
        state.pop(key, None)
        if not foreign and saved.get(key) is not None:
            state[key] = _scalar(saved[key], param)
    complete(state, param, beta1=beta1, lr=lr, cap=cap)
