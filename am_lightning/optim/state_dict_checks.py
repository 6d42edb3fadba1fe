"""Checks of a state dict. They cover all of it before a load overwrites anything."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from am_lightning.distributed.names import group_names
from am_lightning.distributed.shard import my_rank, world_size
from am_lightning.distributed.strategies import describe_placement, local, placement_of
from am_lightning.optim.param_state import OPTIONS, SCALARS, TABLE, has_coupled_decay, untouched
from am_lightning.optim.validation import as_float, check_flag, check_names, described, is_one_number

_FAILURES = (ArithmeticError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError)
_SUBJECT = "loaded state dict"


class Expected(NamedTuple):
    """Properties of the optimizer that a state dict is checked against.

    Attributes:
        who: name of the optimizer's class, for messages.
        param_groups: parameter groups of the optimizer.
        moments: keys of the states shaped like the parameter.
        names: ``id(parameter) -> name`` of parameters whose group has no names.
        check_options: a function of a saved group and the live group, which raises if the saved options do not fit.
        finite: refuse moments because of which every later step would be skipped: nan, inf, or a negative mean square.
    """

    who: str
    param_groups: list[dict[str, Any]]
    moments: tuple[str, ...]
    names: dict[int, str]
    check_options: Callable[[dict[str, Any], dict[str, Any]], None]
    finite: bool = True


def check_loadable(state_dict: Any, expected: Expected) -> None:
    """Refuse a state dict that is malformed or belongs to another optimizer, model or placement.

    Args:
        state_dict: the state dict to check.
        expected: properties of the optimizer that loads it.

    Raises:
        ValueError: if it does not fit. The message names the parameter or the group, and the reason.
    """
    _check_form(state_dict)
    saved_groups, groups = state_dict["param_groups"], expected.param_groups
    _check_sizes(saved_groups, groups, expected.who)
    for index, (saved, group) in enumerate(zip(saved_groups, groups, strict=True)):
        with _reading(f"parameter group {index}"):
            _check_group(saved, group, expected)
    params = [param for group in groups for param in group["params"]]
    ids = [saved for group in saved_groups for saved in group["params"]]
    with _reading("ids of the parameters"):
        names = _names(ids, expected)
        _check_ids(ids, params, names, state_dict["state"])
    states = {}  # keyed by id, because a tied parameter may be listed twice
    for saved, param, name in zip(ids, params, names, strict=True):
        if saved not in states and saved in state_dict["state"]:
            with _reading(f"state of parameter {name!r}"):
                state = states[saved] = _state(state_dict["state"][saved], name)
                if state:
                    _check_moments(name, state, param, expected)
                    _check_numbers(name, state)
                    _check_others(name, state, param)
    named = dict(zip(ids, names, strict=True))
    _check_scalars([(named[saved], state) for saved, state in states.items() if state])


def check_mapping(state_dict: Any) -> None:
    """Refuse a state dict that is not a mapping.

    Raises:
        ValueError: if it is not a mapping. The message has its type.
    """
    if not isinstance(state_dict, Mapping) or not hasattr(state_dict, "copy"):
        raise ValueError(f"{_SUBJECT} is {described(state_dict)}, not a dict with 'state' and 'param_groups'")


def _check_form(state_dict: Any) -> None:
    check_mapping(state_dict)
    for key, kind in (("state", Mapping), ("param_groups", (list, tuple))):
        if key not in state_dict:
            raise ValueError(f"{_SUBJECT} has no {key!r}, only {_shown(state_dict)}: give what state_dict() returned")
        if not isinstance(state_dict[key], kind):
            form = "a dict" if key == "state" else "a list of dicts"
            raise ValueError(f"{_SUBJECT} has {described(state_dict[key])} as {key!r}, not {form}")
    for index, group in enumerate(state_dict["param_groups"]):
        if not isinstance(group, dict):
            raise ValueError(f"{_SUBJECT} has {described(group)} as parameter group {index}, not a dict")
        if not isinstance(group.get("params"), (list, tuple)):
            found = f"{described(group['params'])} as 'params'" if "params" in group else "no 'params'"
            raise ValueError(f"{_SUBJECT} has {found} in parameter group {index}, not a list of ids")


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Turn errors of the body into a ValueError that names ``what``."""
    try:
        yield
    except _FAILURES as error:
        if isinstance(error, ValueError) and str(error).startswith(_SUBJECT):
            raise
        raise ValueError(f"{_SUBJECT}, {what}: {error}") from error


def _check_sizes(saved_groups: Any, groups: list[dict[str, Any]], who: str) -> None:
    if len(saved_groups) != len(groups):
        raise ValueError(
            f"{_SUBJECT} has a different number of parameter groups: {len(saved_groups)}, and this {who} has "
            f"{len(groups)}"
        )
    for index, (saved, group) in enumerate(zip(saved_groups, groups, strict=True)):
        if len(saved["params"]) != len(group["params"]):
            raise ValueError(
                f"{_SUBJECT} contains a parameter group that doesn't match the size of optimizer's group: group "
                f"{index} lists {len(saved['params'])} parameters, and this {who}'s has {len(group['params'])}"
            )


def _check_group(saved: dict[str, Any], group: dict[str, Any], expected: Expected) -> None:
    who = expected.who
    for key in ("amsgrad", "capturable", "fused"):  # torch.optim reads these of the checkpoint while it loads
        check_flag(key, saved.get(key), optional=True)
    if saved.get("amsgrad"):
        raise ValueError(f"{_SUBJECT} is of AdamW with amsgrad=True, which {who} does not support: start again")
    if "decoupled_weight_decay" not in group and has_coupled_decay([saved]):  # AMSGD has both
        raise ValueError(
            f"{_SUBJECT} is of Adam with weight_decay that is coupled, and {who}'s is decoupled: start again, or "
            "set decoupled_weight_decay=True in its groups to continue as AdamW would"
        )
    names = saved.get("param_names")
    if names is not None:
        check_names(names)
    _check_tables(saved)
    expected.check_options(saved, group)


def _check_tables(saved: dict[str, Any]) -> None:
    """Check the tables and options that groups carry if a parameter holds many logical tensors."""
    table, options = saved.get(TABLE) or {}, saved.get(OPTIONS) or []
    if not isinstance(table, Mapping) or not isinstance(options, (list, tuple)):
        raise ValueError(f"{TABLE} must be a dict, and {OPTIONS} a list of dicts")
    for name, numbers in table.items():
        if not isinstance(numbers, (list, tuple)) or len(numbers) != len(_RANGES):
            raise ValueError(f"{TABLE} must have {len(_RANGES)} numbers for {name!r}, not {numbers!r}")
        _check_numbers(name, dict(zip(_RANGES, numbers, strict=True)))
    if not all(isinstance(entry, dict) for entry in options):
        raise ValueError(f"{OPTIONS} must be a list of dicts")


def _names(ids: list[Any], expected: Expected) -> list[str]:
    """Return the name of each parameter as in ``momentum``. Parameters without one get their name in the checkpoint."""
    params = [param for group in expected.param_groups for param in group["params"]]
    said = {id(param): saved for param, saved in zip(params, ids, strict=True) if isinstance(saved, str)}
    return [name for group in group_names(expected.param_groups, said | expected.names) for name in group]


def _check_ids(ids: list[Any], params: list[Tensor], names: list[str], states: Mapping[Any, Any]) -> None:
    """Require that each id stands for one parameter, and that every state is listed if a parameter lacks its state."""
    holders: dict[Any, int] = {}
    for place, saved in enumerate(ids):
        if not isinstance(saved, Hashable) or isinstance(saved, Tensor):
            raise ValueError(
                f"{_SUBJECT} lists {described(saved)} for parameter {names[place]!r}, not a number or a name"
            )
        first = holders.setdefault(saved, place)
        if params[first] is not params[place]:
            raise ValueError(f"{_SUBJECT} lists {saved!r} for parameter {names[first]!r} and for {names[place]!r}")
    unlisted = [key for key, state in states.items() if key not in holders and _is_state(state)]
    lacking = [saved for saved in holders if saved not in states]
    if unlisted and lacking:
        raise ValueError(
            f"{_SUBJECT} has no state of parameter {names[holders[lacking[0]]]!r} (listed as {lacking[0]!r}), but one "
            f"of {unlisted[0]!r}, which no group lists: name it as the groups do, or remove it"
        )


def _is_state(state: Any) -> bool:
    return isinstance(state, dict) and "step" in state


def _state(state: Any, name: str) -> dict[str, Any]:
    if not isinstance(state, dict):
        raise ValueError(f"{_SUBJECT} has {described(state)} as the state of parameter {name!r}, not a dict")
    return state


def _check_moments(name: str, state: dict[str, Any], param: Tensor, expected: Expected) -> None:
    for key in ("step", *expected.moments):
        if state.get(key) is None:
            raise ValueError(
                f"{_SUBJECT} has no {key!r} for parameter {name!r}: it is not a checkpoint of {expected.who}"
            )
    for key in expected.moments:
        value = state[key]
        if (
            not isinstance(value, Tensor)
            or value.layout is not torch.strided
            or value.is_complex() > param.is_complex()
        ):
            flat = ": a flat state dict lacks its entry" if isinstance(value, dict) else ""
            raise ValueError(f"{_SUBJECT} has {described(value)} as {key!r} for parameter {name!r}, not a tensor{flat}")
        if value.shape != param.shape:
            raise ValueError(
                f"{_SUBJECT} has {key!r} of shape {tuple(value.shape)} for parameter {name!r}, "
                f"which has shape {tuple(param.shape)}: it is a checkpoint of another model"
            )
        if placement_of(value) != placement_of(param):
            raise ValueError(
                f"{_SUBJECT} has {key!r} for parameter {name!r} as {describe_placement(value)}, but the parameter is "
                f"{describe_placement(param)}. {_cure(value, param)}"
            )
        if expected.finite:
            _check_finite(f"{key!r} for parameter {name!r}", value, param.dtype, square=key in expected.moments[1:])


def _check_finite(what: str, value: Tensor, dtype: torch.dtype, *, square: bool) -> None:
    """Refuse numbers that would stay in the moments and cause every later step to be skipped."""
    piece, found = local(value), ""
    if not piece.numel() or not piece.is_floating_point():
        return
    low, high = (float(bound) for bound in torch.aminmax(piece.detach()))
    largest, precision = max(-low, high), torch.float64 if dtype == torch.float64 else torch.float32
    if not (math.isfinite(low) and math.isfinite(high)):
        found = f"nan or inf in {what}, so every step would be dropped: load an older one"
    elif square and low < 0:
        found = f"{low:g} in {what}, which holds mean squares, so every step would be dropped"
    elif not square and largest > math.sqrt(torch.finfo(precision).max):
        found = f"{largest:g} in {what}, whose square overflows: every step would be dropped"
    if found:
        raise ValueError(f"{_SUBJECT} has {found}{_of_this_rank()}")


def _of_this_rank() -> str:
    """Return a hint for messages about one rank's data.

    A load is not collective. Each rank checks the data that it holds, and other ranks may find nothing wrong.
    """
    if world_size() == 1:
        return ""
    return (
        f". This is what rank {my_rank()} holds: ranks that find nothing wait for it in their next collective, until "
        "their launcher ends them for this rank's exit, or the process group's timeout does"
    )


# Allowed ranges of the numbers in a state. ``beta`` is -1 or nan if nothing was loaded into it.
_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "step": ("a finite number >= 0", lambda x: 0 <= x <= torch.finfo(torch.float32).max),
    "beta_prod": ("a number in [0, 1]", lambda x: 0 <= x <= 1),
    "beta": ("a number in [0, 1], or -1", lambda x: x != x or x == -1 or 0 <= x <= 1),
    "prev_lr": ("a finite number", lambda x: abs(x) <= torch.finfo(torch.float32).max),
}


def _check_numbers(name: str, state: dict[str, Any]) -> None:
    for key, (allowed, fits) in _RANGES.items():
        value = state.get(key)
        if value is None:
            continue
        number = None if isinstance(value, bool) or not isinstance(value, Real) else as_float(value)
        if is_one_number(value):
            number = float(value)
        if number is None or not fits(number):
            shown = f"{key!r} = {number}" if number is not None else f"{described(value)} as {key!r}"
            raise ValueError(f"{_SUBJECT} has {shown} for parameter {name!r} ({key} must be {allowed})")


def _check_others(name: str, state: dict[str, Any], param: Tensor) -> None:
    """Refuse values that torch.optim, which copies all of them, would fail to copy."""
    for key, value in state.items():
        copied = isinstance(value, (Tensor, dict, list, tuple, set, str, bytes)) or not isinstance(value, Iterable)
        if not copied or (isinstance(value, Tensor) and value.is_meta and not param.is_meta):
            where = " without numbers (device meta)" if copied else ""
            raise ValueError(f"{_SUBJECT} has {described(value)}{where} as {key!r} for parameter {name!r}")


def _shown(keys: Mapping[Any, Any]) -> str:
    return ", ".join(map(repr, list(keys)[:4])) + (", ..." if len(keys) > 4 else "") or "nothing"


def _cure(state: Any, param: Any) -> str:
    load = "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict(model, optimizer, state_dict"
    if placement_of(state) is None:  # a whole tensor, as saved with full_state_dict=True
        return f"Load a full state dict with {load}, options=StateDictOptions(full_state_dict=True)), which splits it"
    if placement_of(param) is None:
        return "Gather it first: tensor.full_tensor() on all ranks, or save with StateDictOptions(full_state_dict=True)"
    return f"Save and load with torch.distributed.checkpoint (dcp.save, dcp.load, then {load})), which moves the pieces"


def _check_scalars(states: list[tuple[str, dict[str, Any]]]) -> None:
    """Require that each parameter has all three adaptive scalars, or that none has any, as in a checkpoint of AdamW.

    Parameters that have not stepped may lack them.
    """
    hint = (
        f"Save the whole state_dict(), or remove {', '.join(map(repr, SCALARS))} of every parameter to continue as "
        "from a checkpoint of AdamW"
    )
    full = bare = None
    for name, state in states:
        missing = list(_missing_scalars(state))
        if missing and len(missing) < len(SCALARS):
            raise ValueError(
                f"{_SUBJECT} lacks {' and '.join(map(repr, missing))} for parameter {name!r}, of which it has "
                f"other adaptive scalars, so beta_t cannot be continued. {hint}"
            )
        if float(state["step"]) > 0:
            full, bare = (full, name) if missing else (name, bare)
        if full is not None and bare is not None:
            raise ValueError(
                f"{_SUBJECT} has the adaptive scalars ({', '.join(SCALARS)}) for parameter {full!r} but not for "
                f"{bare!r}, though both have stepped. {hint}"
            )


def _missing_scalars(state: dict[str, Any]) -> Iterator[str]:
    """Yield the adaptive scalars that are absent or were never filled in.

    torch.distributed.checkpoint loads into a fresh state (``create``) and leaves there what the checkpoint lacks. A
    state that has stepped has a beta, and that beta is a factor of ``beta_prod``.
    """
    if untouched(state):
        yield from SCALARS
        return
    yield from (key for key in SCALARS if state.get(key) is None)
    if float(state["step"]) > 0 and all(state.get(key) is not None for key in ("beta_prod", "beta")):
        beta = float(state["beta"])
        if float(state["beta_prod"]) == 1 and not beta >= 1:
            yield "beta_prod"
        if not beta >= 0:
            yield "beta"
