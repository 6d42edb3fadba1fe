"""Loading, copying and unpickling of an optimizer: additions to the methods of torch.optim.Optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from am_lightning.distributed.call_stack import inside_engine_warm_up, inside_state_creation
from am_lightning.distributed.names import names_by_id
from am_lightning.optim import group_checks, param_state
from am_lightning.optim.param_layout import ParamLayout, params_of
from am_lightning.optim.param_state import OPTIONS, TABLE
from am_lightning.optim.state_dict_checks import Expected, check_loadable, check_mapping
from am_lightning.optim.state_store import StateStore

_NAMES = "_names_of_unnamed"  # key of a pickle that holds the names given by name_parameters()


class Loadable(Protocol):
    """The attributes and methods of an optimizer that this module uses."""

    param_groups: list[dict[str, Any]]
    state: Any
    defaults: dict[str, Any]
    cap_key: str
    moments: tuple[str, ...]
    nonfinite: str
    exp_avg_dtype: torch.dtype | None
    param_layout: ParamLayout
    _store: StateStore
    _loading: tuple[dict[str, Any], list[dict[str, Any]]] | None

    def parameter_names(self) -> list[str]: ...
    def given_groups(self) -> list[dict[str, Any]]: ...
    def is_partitioned(self) -> bool: ...
    def register_load_state_dict_pre_hook(self, hook: Any) -> Any: ...
    def _forget(self) -> None: ...
    def _check_options(self) -> None: ...
    def _check_group(self, group: dict[str, Any]) -> dict[str, Any]: ...


def with_names(optimizer: Loadable, state: dict[str, Any]) -> dict[str, Any]:
    """Add the parameter names to a state to be pickled.

    Unpickling creates new parameter objects, but their order stays the same, so the names are stored by position.
    """
    known = optimizer.param_layout.given.known_names
    return state | {_NAMES: optimizer.parameter_names()} if known else state


def only_makes_states(optimizer: Any) -> bool:
    """Create the missing states, and return True, if torch.distributed.checkpoint or an engine calls ``step()``.

    Both call it on a fresh optimizer to make it create its states. Such a call must not change anything else. The
    warm-up of an engine creates nothing here.
    """
    if optimizer.layout is None and inside_engine_warm_up():
        return True
    if not inside_state_creation(optimizer.param_groups):
        return False
    params = optimizer.param_layout.logical_params(optimizer.param_groups)
    param_state.check_direction(optimizer.exp_avg_dtype, params)
    here = [logical for logical in params if logical.param.grad is not None]
    optimizer._store.moments(optimizer.state, optimizer.param_groups, optimizer.exp_avg_dtype, here)
    return True


@contextmanager
def undone_if_it_fails(optimizer: Any) -> Iterator[None]:
    """Restore the attributes of ``optimizer`` if the body of the ``with`` statement raises."""
    held = [optimizer]
    if "_store" in optimizer.__dict__:  # an optimizer that is being unpickled does not have it yet
        held += [optimizer._store, optimizer.param_layout.given]
    before = [(one, dict(one.__dict__)) for one in held]
    try:
        yield
    except BaseException:
        for one, attributes in before:
            one.__dict__.update(attributes)
        raise


def take_state(optimizer: Loadable, state: dict[str, Any], set_state: Callable[[dict[str, Any]], None]) -> None:
    """Implement ``__setstate__``, which torch.optim calls for a load, a copy and unpickling.

    Args:
        optimizer: the optimizer that receives the state.
        state: the attributes to set.
        set_state: ``__setstate__`` of torch.optim.Optimizer.
    """
    copied = "_stats" not in optimizer.__dict__  # True for a copy and for unpickling
    if copied:
        optimizer._forget()
    set_state(state)
    given, loading = optimizer.param_layout.given, optimizer._loading
    if copied:
        given.remember(optimizer.param_groups)
    optimizer.defaults.pop("differentiable", None)  # torch.optim adds it
    if loading is not None:
        _restore(optimizer, *loading)
    group_checks.complete_groups(optimizer.param_groups, defaults=optimizer.defaults, check=optimizer._check_group)
    if loading is not None:
        given.replace_groups(loading[1], optimizer.param_groups)
        optimizer._store.take_tables({})
        take_tables(optimizer)
    if _NAMES in optimizer.__dict__:
        params: dict[Tensor, None] = dict.fromkeys(params_of(optimizer.param_groups))
        given.known_names = names_by_id(zip(optimizer.__dict__.pop(_NAMES), params, strict=True))


@contextmanager
def checked_load(optimizer: Loadable, state_dict: Any) -> Iterator[None]:
    """Check the whole ``state_dict`` before torch.optim, in the body of the ``with`` statement, loads any of it.

    Raises:
        ValueError: if it cannot be loaded. The message names the parameter or the group.
    """

    def remember(_: Optimizer, saved: dict[str, Any]) -> None:
        who, finite = type(optimizer).__name__, optimizer.nonfinite == "skip" and not optimizer.is_partitioned()
        optimizer._check_options()
        groups, names = optimizer.param_groups, optimizer.param_layout.given.known_names
        check_loadable(saved, Expected(who, groups, optimizer.moments, names, check_options, finite))
        optimizer._loading = saved, groups

    def check_options(saved: dict[str, Any], live: dict[str, Any]) -> None:
        trial = dict(saved)
        param_state.restore_options(trial, live, optimizer.cap_key)
        optimizer._check_group(group_checks.with_any_lr(trial))
        group_checks.check_magnitudes(trial)

    check_mapping(state_dict)  # torch.optim copies it before the user's hooks, which may still complete it
    last = optimizer.register_load_state_dict_pre_hook(remember)  # runs last, so it sees the result of the user's hooks
    try:
        yield
    finally:
        last.remove()
        optimizer._loading = None


def _restore(optimizer: Loadable, saved: dict[str, Any], live: list[dict[str, Any]]) -> None:
    """Adapt the groups and states that torch.optim has loaded in place of the ``live`` ones."""
    in_tables, cap_key, d = optimizer.is_partitioned(), optimizer.cap_key, optimizer.moments[0]
    for group, saved_group, live_group in zip(optimizer.param_groups, saved["param_groups"], live, strict=True):
        param_state.restore_options(group, live_group, cap_key)
        cap = group[cap_key]
        beta1 = param_state.betas_of(saved_group)[0] if "betas" in saved_group and "betas" in group else cap
        for param, index in zip(group["params"], saved_group["params"], strict=True):
            before = saved["state"].get(index)
            if before and not in_tables:
                state = optimizer.state[param]
                param_state.restore_scalars(state, before, param, beta1=beta1, lr=group["lr"], cap=cap)
                # torch.optim has cast d to the dtype of the parameter
                state[d] = state[d].to(param_state.direction_dtype(param, optimizer.exp_avg_dtype))


def save_tables(optimizer: Loadable, groups: list[dict[str, Any]]) -> None:
    """Add the tables of adaptive scalars and the options of all groups to each of ``groups``, those of a state_dict."""
    tables = optimizer._store.tables()
    if tables:
        options = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        for group in groups:
            group |= {TABLE: tables, OPTIONS: options}


def take_tables(optimizer: Loadable) -> None:
    """Remove the entries of ``save_tables`` from the groups, and restore the tables and options from them."""
    groups, live, cap_key = optimizer.param_layout.given.groups, optimizer.given_groups(), optimizer.cap_key
    if not any(TABLE in group or OPTIONS in group for group in groups):
        return
    tables = [group.pop(TABLE, None) for group in groups]
    options = [group.pop(OPTIONS, None) for group in groups]
    if any(tables):
        optimizer._store.take_tables(next(table for table in tables if table))
    saved: list[dict[str, Any]] = next((entry for entry in options if entry), [])
    if len(saved) != len(live):
        return
    copied = ("lr", "betas", cap_key, "params")
    for group, own in zip(live, saved, strict=True):
        kept = {key: value for key, value in own.items() if key in group and key not in copied}
        if any(group[key] != saved[0].get(key) for key in kept):
            continue  # the group already has its own options
        group.update(kept)  # because one engine copies the options of the first group to all groups
        if group["lr"] == saved[0].get("lr"):
            group["lr"] = own["lr"]
