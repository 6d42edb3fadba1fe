"""Checks of constructor arguments and group options.

Error messages begin like those of torch.optim and end with the allowed values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

SCOPES = ("tensor", "group", "global")
NONFINITE = ("skip", "propagate")
LOSS_GAPS = ("first_order", "exact")
WHOLE_OPTIMIZER = (
    "scope",
    "nonfinite",
    "loss_gap",
    "exp_avg_dtype",
    "replica_group",
)  # options that a group cannot have

# Names of arguments in the messages of torch.optim; every other argument appears under its own name
_WORDS = {"lr": "learning rate", "eps": "epsilon value", "weight_decay": "weight_decay value"}


def described(value: Any) -> str:
    """Describe a value for an error message: ``a dict``, ``None``, ``a torch.int64 tensor of shape (2,)``."""
    if isinstance(value, Tensor):
        layout = "" if value.layout is torch.strided else f"{value.layout} "
        return f"a {layout}{value.dtype} tensor of shape {tuple(value.shape)}"
    return "None" if value is None else f"a {type(value).__name__}"


def check_names(names: Any) -> None:
    """Require a list of names. It may be shorter than ``params``, because a user may have added parameters by hand."""
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"Invalid param_names: {names!r} (param_names must be a list of names)")


def is_one_number(value: Any) -> bool:
    """Return whether ``value`` is a one-element real tensor that has data."""
    real = isinstance(value, Tensor) and value.layout is torch.strided and not (value.is_meta or value.is_complex())
    return real and value.numel() == 1 and value.dtype != torch.bool


def check_number(name: str, value: Any, *, upper: float | None = None, open_upper: bool = False) -> None:
    """Require a finite real number in ``[0, upper]``, or in ``[0, upper)`` with ``open_upper``."""
    allowed = "a finite number >= 0"
    if upper is not None:
        allowed = f"a number with 0 <= {name} {'<' if open_upper else '<='} {upper:g}"
    if isinstance(value, bool) or not isinstance(value, Real):
        got = type(value).__name__
        raise TypeError(f"Invalid {_WORDS.get(name, name)}: {value!r} ({name} must be {allowed}, not {got})")
    number = as_float(value)
    too_big = upper is not None and (number >= upper if open_upper else number > upper)
    if not math.isfinite(number) or number < 0 or too_big:
        raise ValueError(f"Invalid {_WORDS.get(name, name)}: {value} ({name} must be {allowed})")


def as_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:  # an int beyond float's range
        return math.inf


def check_lr(lr: Any) -> None:
    """Require a finite number >= 0, or a one-element real tensor that holds one."""
    if not isinstance(lr, Tensor):
        check_number("lr", lr)
        return
    if lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, but lr has shape {tuple(lr.shape)}")
    if lr.is_complex() or lr.dtype == torch.bool:
        raise TypeError(f"Invalid learning rate: {lr!r} (lr must be real, not {lr.dtype})")
    check_number("lr", lr.item())


def check_betas(betas: Any) -> tuple[float, float]:
    """Require two numbers in [0, 1), the cap of beta_t and the decay of the second moment. Returns them as floats."""
    if isinstance(betas, (str, bytes)) or not isinstance(betas, Sequence):
        raise TypeError(f"Invalid betas: {betas!r} (betas must be a pair of numbers in [0, 1))")
    if len(betas) != 2:
        raise ValueError(f"Invalid betas: {betas!r} (betas must be a pair of numbers in [0, 1))")
    for index, beta in enumerate(betas):
        allowed = f"betas[{index}] must be a number with 0 <= beta < 1"
        if isinstance(beta, bool) or not isinstance(beta, Real):
            raise TypeError(f"Invalid beta parameter at index {index}: {beta!r} ({allowed}, not {type(beta).__name__})")
        if not 0.0 <= as_float(beta) < 1.0:  # nan does not pass either
            raise ValueError(f"Invalid beta parameter at index {index}: {beta} ({allowed})")
    return float(betas[0]), float(betas[1])


def check_flag(name: str, value: Any, *, optional: bool = False) -> None:
    """Require a bool or, with ``optional``, None."""
    if not (isinstance(value, bool) or (optional and value is None)):
        allowed = "True, False or None" if optional else "True or False"
        raise TypeError(f"Invalid {name}: {value!r} ({name} must be {allowed})")


def check_count(name: str, value: Any) -> None:
    """Require an integer >= 1."""
    allowed = f"{name} must be a whole number >= 1"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"Invalid {name}: {value!r} ({allowed}, not {type(value).__name__})")
    if value < 1:
        raise ValueError(f"Invalid {name}: {value} ({allowed})")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Require one of the strings in ``choices``."""
    allowed = " | ".join(repr(choice) for choice in choices)
    if not isinstance(value, str):
        raise TypeError(f"Invalid {name}: {value!r} ({name} must be {allowed})")
    if value not in choices:
        raise ValueError(f"Invalid {name}: {value!r} ({name} must be {allowed})")


def check_exp_avg_dtype(dtype: Any) -> None:
    """Require None or torch.bfloat16."""
    allowed = "exp_avg_dtype must be torch.bfloat16, or None for the parameter's dtype"
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"Invalid exp_avg_dtype: {dtype!r} ({allowed}, not {type(dtype).__name__})")
    if dtype not in (None, torch.bfloat16):
        raise ValueError(f"Invalid exp_avg_dtype: {dtype} ({allowed})")


def check_process_group(name: str, value: Any) -> None:
    """Require None or a process group of which this process is a member."""
    if value is None:
        return
    allowed = f"{name} must be a torch.distributed.ProcessGroup that this rank is in, or None"
    if not (torch.distributed.is_available() and isinstance(value, torch.distributed.ProcessGroup)):
        raise TypeError(f"Invalid {name}: {value!r} ({allowed})")


def check_implementation(group: dict[str, Any]) -> None:
    """Require a combination of foreach, fused and a tensor lr that torch.optim allows."""
    check_flag("foreach", group["foreach"], optional=True)
    if "fused" in group:
        check_flag("fused", group["fused"], optional=True)
        if group["fused"] and group["foreach"]:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    if isinstance(group["lr"], Tensor) and group["foreach"] and not group.get("capturable", True):
        raise ValueError("lr as a Tensor is not supported for capturable=False and foreach=True")
