"""Checks of the parameter groups of a live optimizer, which people change by hand between steps."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from am_lightning.distributed.call_stack import called_by_zero_redundancy
from am_lightning.optim.validation import WHOLE_OPTIMIZER, as_float, check_names, check_number, described, is_one_number


def refuse_module(params: Any) -> None:
    """A module in place of its parameters.

    Raises:
        TypeError: with the hint.
    """
    if isinstance(params, torch.nn.Module) and not isinstance(params, torch.nn.ParameterList):
        raise TypeError(
            f"Invalid params: {type(params).__name__} (params must be an iterable of parameters: model.parameters(); "
            "am_lightning.am_adamw and am_sgd take a model)"
        )


def without_whole_options(group: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """A new group without options of the whole optimizer, which ZeroRedundancyOptimizer repeats in the groups.

    Raises:
        ValueError: it has one, and is not ZeroRedundancyOptimizer's or has another value.
    """
    for name in set(WHOLE_OPTIMIZER).intersection(group):
        if group[name] != getattr(optimizer, name, ...) or not called_by_zero_redundancy():
            raise ValueError(f"Invalid {name} in a parameter group: {name} is an option of the whole optimizer")
    return {key: value for key, value in group.items() if key not in WHOLE_OPTIMIZER}


def warn_of_cycled_momentum(param_groups: Iterable[dict[str, Any]], cap_key: str) -> None:
    """OneCycleLR and CyclicLR write ``betas[0]``."""
    if any("max_momentum" in group for group in param_groups):
        warnings.warn(
            "the learning rate scheduler cycles betas[0], which adaptive memory does not use: beta_t is computed, "
            f"and its cap stays in the group's {cap_key!r}. Pass cycle_momentum=False to the scheduler.",
            stacklevel=8,  # whoever calls step(), past torch's decorators
        )


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


def complete_groups(
    groups: Iterable[dict[str, Any]], *, defaults: dict[str, Any], check: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    """Fill in options that are missing, from the optimizer's own.

    Args:
        check: validates a group's options, and returns those to normalise.
    """
    for group in groups:
        for key, value in defaults.items():
            group.setdefault(key, value)
        for key, value in check(with_any_lr(group)).items():
            group.setdefault(key, value)


def complete_foreign_groups(
    param_groups: Any, needed: set[str], complete: Callable[[Iterable[dict[str, Any]]], None]
) -> bool:
    """Complete groups that others have put in place; True where there were some.

    Raises:
        TypeError, ValueError, RuntimeError: a group or an option is of the wrong kind; the text has its number.
    """
    check_groups(param_groups)
    foreign = [(i, group) for i, group in enumerate(param_groups) if not needed <= group.keys()]
    for index, group in foreign:
        with naming_group(index):
            complete([group])
    return bool(foreign)


@contextmanager
def naming_group(index: int) -> Iterator[None]:
    """An error says which group it is about."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError) as error:
        raise type(error)(f"parameter group {index}: {error}") from error


def check_magnitudes(group: dict[str, Any]) -> None:
    """Numbers that a kernel could not take, in the middle of a step.

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
