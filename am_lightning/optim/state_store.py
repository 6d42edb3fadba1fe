"""Moments and adaptive scalars of an optimizer's parameters: created, read, saved and loaded."""

from __future__ import annotations

import warnings
from collections.abc import MutableMapping, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from am_lightning.distributed import LogicalParam, ShardLayout
from am_lightning.optim import param_state
from am_lightning.optim.adaptive_scalars import Scalars, StateScalars, TableScalars
from am_lightning.optim.kernels.transfer import refuse_in_capture
from am_lightning.optim.param_state import OPTIONS, TABLE

State = MutableMapping[Tensor, Any]
Groups = Sequence[dict[str, Any]]


class StateStore:
    """What belongs to ``optimizer.state``, and what cannot be in it.

    The state has torch.optim's form: a dict for each parameter. The adaptive scalars of flat parameters, each of which
    holds many logical ones, live here in tables by name, which a ``state_dict`` carries in its groups.

    Args:
        moments: states shaped like the parameter, the direction d first.
        cap_key: group option that holds the cap of beta_t.
    """

    def __init__(self, moments: tuple[str, ...], cap_key: str) -> None:
        self._moments, self._cap_key = moments, cap_key
        self._complete = itemgetter(*moments, "prev_lr")
        self._tables: dict[str, list[float]] = {}  # adaptive scalars by name that await their layout
        self._scalars: dict[ShardLayout, Scalars] = {}

    # ------------------------------------------------------------------ moments
    def moments(
        self, state: State, params: Sequence[LogicalParam], groups: Groups, direction: torch.dtype | None
    ) -> list[list[Tensor]]:
        """The moments of the parameters, each a list; those that do not exist yet are made.

        Args:
            direction: ``exp_avg_dtype``.
        """
        try:
            for logical in params:
                self._complete(state.get(logical.param, {}))  # asking for it would make an entry
        except KeyError:
            for logical in params:
                self._ready(state, logical, groups[logical.group_index], direction)
        states = [state[logical.param] for logical in params]
        return [[own[key] for own in states] for key in self._moments]

    def _ready(self, state: State, logical: LogicalParam, group: dict[str, Any], direction: torch.dtype | None) -> None:
        param, in_table = logical.param, logical.partitioned
        known = state.get(param, {})  # an engine may have left an empty dict
        if self._moments[0] not in known or not (in_table or "prev_lr" in known):
            refuse_in_capture(param)
        own = state[param]
        if self._moments[0] not in own:
            param_state.create(own, param, self._moments, adaptive=not in_table, direction=direction)
        elif not in_table:
            cap = group[self._cap_key]
            param_state.complete(own, param, beta1=cap, lr=group["lr"], cap=cap)

    # ------------------------------------------------------------------ adaptive scalars
    def scalars(self, state: State, layout: ShardLayout, groups: Groups, who: str) -> Scalars:
        """The adaptive scalars of a layout's rows; ``who`` is the optimizer, for a warning."""
        found = self._scalars.get(layout)
        if found is None or not found.reads(state):
            params = layout.logical_params
            found = self._scalars[layout] = (
                TableScalars(state, params, self._take_tables(state, params, groups, who))
                if any(logical.partitioned for logical in params)
                else StateScalars(state, params)
            )
        return found

    def _take_tables(
        self, state: State, params: Sequence[LogicalParam], groups: Groups, who: str
    ) -> dict[str, list[float]]:
        """What a checkpoint says of the parameters; where it has moments alone, AdamW's momentum is assumed."""
        found, foreign = {}, []
        for logical in params:
            group, own = groups[logical.group_index], state.get(logical.param) or {}
            if logical.name in self._tables:
                found[logical.name] = self._tables.pop(logical.name)
            elif self._moments[0] in own and float(own.get("step", 0)) > 0:
                step, cap = float(own["step"]), float(group[self._cap_key])
                found[logical.name] = [step, cap**step, cap, float(group["lr"])]
                foreign.append(logical.name)
        if foreign:
            warnings.warn(
                f"the checkpoint has no adaptive scalars of {len(foreign)} tensors ({foreign[0]!r}, ...): it was not "
                f"written by {who}. Their momentum is taken to have decayed by the cap at each step",
                stacklevel=4,
            )
        return found

    def betas(self, state: State, layout: ShardLayout | None, params: Sequence[LogicalParam]) -> Tensor:
        """``[parameters]`` beta_t, nan where one has never stepped.

        Args:
            layout: of the parameters; None: there was no step yet.
        """
        found = None if layout is None else self._scalars.get(layout)
        return (found if found is not None and found.reads(state) else StateScalars(state, params)).betas()

    def betas_by_name(self, names: Sequence[str]) -> Tensor:
        """``[names]`` beta_t, from the flat parameters that have stepped."""
        found: dict[str, Tensor] = {}
        for table in self._table_scalars():
            found.update(zip((logical.name for logical in table.params), table.betas().unbind(), strict=True))
        unknown = next(iter(found.values()), torch.zeros((), device="cpu")) * float("nan")
        loaded = {name: numbers[2] for name, numbers in self._tables.items() if numbers[2] >= 0}
        return torch.stack([found.get(n, torch.full_like(unknown, loaded.get(n, float("nan")))) for n in names])

    def _table_scalars(self) -> list[TableScalars]:
        return [scalars for scalars in self._scalars.values() if isinstance(scalars, TableScalars)]

    def forget_layouts(self) -> None:
        """Layouts are made anew: the tables await them."""
        for table in self._table_scalars():
            self._tables.update(table.saved())
        self._scalars = {}

    # ------------------------------------------------------------------ checkpoints
    def save_tables(self, groups: Groups) -> None:
        """Put the tables, and every group's options, into the groups of a state_dict."""
        tables = dict(self._tables)
        for table in self._table_scalars():
            tables.update(table.saved())
        if tables:
            options = [{k: v for k, v in group.items() if k != "params"} for group in groups]
            for group in groups:
                group |= {TABLE: tables, OPTIONS: options}

    def take_tables(self, groups: Groups, live: Groups) -> None:
        """Take out what a checkpoint, or an engine that loaded one, has put into the groups.

        Args:
            groups: all that were given parameters or options.
            live: those that were given parameters, in the order in which ``save_tables`` saw them.
        """
        if not any(TABLE in group or OPTIONS in group for group in groups):
            return
        tables = [group.pop(TABLE, None) for group in groups]
        options = [group.pop(OPTIONS, None) for group in groups]
        if any(tables):
            self._scalars, self._tables = {}, dict(next(table for table in tables if table))
        saved: list[dict[str, Any]] = next((entry for entry in options if entry), [])
        if len(saved) != len(live):
            return
        copied = ("lr", "betas", self._cap_key, "params")
        for group, own in zip(live, saved, strict=True):
            kept = {key: value for key, value in own.items() if key in group and key not in copied}
            if any(group[key] != saved[0].get(key) for key in kept):
                continue  # its own options are there
            group.update(kept)  # one engine copies the first group's options onto all
            if group["lr"] == saved[0].get("lr"):
                group["lr"] = own["lr"]

    def restore(
        self,
        state: State,
        groups: Groups,
        saved: dict[str, Any],
        live: Groups,
        direction: torch.dtype | None,
        *,
        in_tables: bool,
    ) -> None:
        """torch.optim has put a checkpoint's groups and states in place of the ``live`` ones: make them ours.

        Args:
            direction: ``exp_avg_dtype``.
            in_tables: an engine holds flat parameters, whose adaptive scalars are in the groups.
        """
        for group, saved_group, live_group in zip(groups, saved["param_groups"], live, strict=True):
            param_state.restore_options(group, live_group, self._cap_key)
            cap = group[self._cap_key]
            beta1 = param_state.betas_of(saved_group)[0] if "betas" in saved_group and "betas" in group else cap
            for param, index in zip(group["params"], saved_group["params"], strict=True):
                before = saved["state"].get(index)
                if before and not in_tables:
                    own = state[param]
                    param_state.restore_scalars(own, before, param, beta1=beta1, lr=group["lr"], cap=cap)
                    dtype = param_state.direction_dtype(param, direction)  # torch.optim has cast d to the parameter's
                    own[self._moments[0]] = own[self._moments[0]].to(dtype)

    def forget(self) -> None:
        """A checkpoint has replaced the state: nothing of before counts."""
        self._scalars, self._tables = {}, {}
