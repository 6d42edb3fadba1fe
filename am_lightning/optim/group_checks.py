"""Checks of the parameter groups of a live optimizer, which people change by hand between steps."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from am_lightning.optim.validation import as_float, check_names, check_number, described, is_one_number


def options_of(param_groups: Any) -> list[Any]:
    """The groups, their options and what holds their parameters, in order: as long as these are the same objects nothing has changed."""
    found: list[Any] = []
    try:
        for group in param_groups:
            found += [group, type(group["params"])]
            found += [value for key, value in group.items() if key != "params"]
    except (TypeError, AttributeError, KeyError):  # no groups: the checks say what is there instead
        return [object()]
    return found


def check_groups(param_groups: Any) -> None:
    """A list of dicts with parameters.

    Raises:
        TypeError, ValueError: naming the group that is not.
    """
    if not isinstance(param_groups, (list, tuple)):
        raise TypeError(f"param_groups is {described(param_groups)}, not a list of dicts")
    if not param_groups:
        raise ValueError("param_groups is empty: the optimizer has no parameters")
    for index, group in enumerate(param_groups):
        if not isinstance(group, dict):
            raise TypeError(f"parameter group {index} is {described(group)}, not a dict")
        if "params" not in group:
            raise ValueError(f"parameter group {index} has no 'params'")
        params = group["params"]
        if not isinstance(params, Collection) or isinstance(params, (Tensor, str, bytes)):
            raise TypeError(f"parameter group {index} has {described(params)} as 'params', not a list of parameters")


@contextmanager
def naming_group(index: int) -> Iterator[None]:
    """An error says which group it is about."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError) as error:
        raise type(error)(f"parameter group {index}: {error}") from error


def check_magnitudes(group: dict[str, Any]) -> None:
    """Coefficients that a kernel could not take, in the middle of a step.

    Raises:
        ValueError: one is beyond float32.
    """
    largest = torch.finfo(torch.float32).max
    for key, value in group.items():
        if isinstance(value, Real) and math.isfinite(number := as_float(value)) and abs(number) > largest:
            raise ValueError(f"Invalid {key}: {value} ({key} must be a number within float32, at most {largest:g})")


def with_any_lr(group: dict[str, Any]) -> dict[str, Any]:
    """The options with |lr|: a schedule may go below 0, and AdamW steps, saves and loads then."""
    lr = group.get("lr")
    return {**group, "lr": -lr} if isinstance(lr, Real) and lr < 0 else group


def as_unread(group: dict[str, Any], cap_key: str) -> dict[str, Any]:
    """The options with 0 in place of what a step may not read or look at.

    These are tensors, which the host would wait for; a negative learning rate, with which AdamW steps too; and
    ``betas[0]`` of 1, up to which schedulers may cycle it: the cap has a key of its own.
    """
    options = ((key, value) for key, value in group.items() if key != "params")
    view = with_any_lr({key: 0.0 if is_one_number(value) else value for key, value in options})
    check_magnitudes(view)
    check_number(cap_key, view[cap_key], upper=1)
    betas = view.get("betas")
    if isinstance(betas, (list, tuple)) and len(betas) == 2:
        first, second = (0.0 if is_one_number(beta) else beta for beta in betas)
        view["betas"] = (0.0 if first == 1 else first, second)
    if view.get("param_names") is not None:
        check_names(view["param_names"])
    return view
