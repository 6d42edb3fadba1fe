"""Checks of the parameter groups of a live optimizer, which users may change by hand between steps."""

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
    """Refuse a module that is passed in place of its parameters.

    Raises:
        TypeError: if ``params`` is a module. The message says what to pass.
    """
    if isinstance(params, torch.nn.Module) and not isinstance(params, torch.nn.ParameterList):
        raise TypeError(
            f"Invalid params: {type(params).__name__} (params must be an iterable of parameters: model.parameters(); "
            "am_lightning.am_adamw and am_sgd take a model)"
        )


def without_whole_options(group: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """Return a copy of ``group`` without options of the whole optimizer.

    ZeroRedundancyOptimizer copies these options into its groups.

    Raises:
        ValueError: if the group has such an option and ZeroRedundancyOptimizer did not put it there, or if its value
            differs from that of the optimizer.
    """
    for name in set(WHOLE_OPTIMIZER).intersection(group):
        if group[name] != getattr(optimizer, name, ...) or not called_by_zero_redundancy():
            raise ValueError(f"Invalid {name} in a parameter group: {name} is an option of the whole optimizer")
    return {key: value for key, value in group.items() if key not in WHOLE_OPTIMIZER}


def warn_of_cycled_momentum(param_groups: Iterable[dict[str, Any]], cap_key: str) -> None:
    """Warn if OneCycleLR or CyclicLR cycles ``betas[0]``."""
    if any("max_momentum" in group for group in param_groups):
        warnings.warn(
            "the learning rate scheduler cycles betas[0], which adaptive memory does not use: beta_t is computed, "
            f"and its cap stays in the group's {cap_key!r}. Pass cycle_momentum=False to the scheduler.",
            stacklevel=8,  # the caller of step(), beyond the decorators of torch
        )


def check_groups(param_groups: Any) -> None:
    """Require a non-empty list of dicts, each with a collection of parameters under ``params``.

    Raises:
        TypeError, ValueError: if it is something else. The message has the index of the group.
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
    """Fill in missing options.

    Args:
        groups: the parameter groups, which are changed in place.
        defaults: the default options of the optimizer.
        check: a function that validates the options of a group and returns those that have to be normalised.
    """
    for group in groups:
        for key, value in defaults.items():
            group.setdefault(key, value)
        for key, value in check(with_any_lr(group)).items():
            group.setdefault(key, value)


def complete_foreign_groups(
    param_groups: Any, needed: set[str], complete: Callable[[Iterable[dict[str, Any]]], None]
) -> bool:
    """Complete the groups that were added or replaced without ``add_param_group``.

    Args:
        param_groups: all groups of the optimizer.
        needed: keys that a complete group has.
        complete: a function that completes the groups it is given in place.

    Returns:
        Whether there was such a group.

    Raises:
        TypeError, ValueError, RuntimeError: if a group or an option is of the wrong kind. The message has the index of
            the group.
    """
    check_groups(param_groups)
    foreign = [(i, group) for i, group in enumerate(param_groups) if not needed <= group.keys()]
    for index, group in foreign:
        with naming_group(index):
            complete([group])
    return bool(foreign)


@contextmanager
def naming_group(index: int) -> Iterator[None]:
    """Put the index of the group in front of the message of an error."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError) as error:
        raise type(error)(f"parameter group {index}: {error}") from error


def check_magnitudes(group: dict[str, Any]) -> None:
    """Refuse numbers that do not fit in float32, because a kernel would fail at them in the middle of a step.

    Raises:
        ValueError: if the absolute value of an option is larger than the largest float32.
    """
    largest = torch.finfo(torch.float32).max
    for key, value in group.items():
        if isinstance(value, Real) and math.isfinite(number := as_float(value)) and abs(number) > largest:
            raise ValueError(f"Invalid {key}: {value} ({key} must be a number within float32, at most {largest:g})")


def with_any_lr(group: dict[str, Any]) -> dict[str, Any]:
    """Return the options with |lr|. A schedule may set a negative lr, which AdamW steps with, saves and loads."""
    lr = group.get("lr")
    return {**group, "lr": -lr} if isinstance(lr, Real) and lr < 0 else group


def as_unread(group: dict[str, Any], cap_key: str) -> dict[str, Any]:
    """Return a copy of the options in which every value that a step must not check is replaced.

    Tensors become 0, because reading them would make the host wait. A negative learning rate becomes positive, because
    AdamW steps with it, too. ``betas[0]`` of 1 becomes 0, because schedulers may cycle it up to 1 and the cap is stored
    under ``cap_key``.
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
