"""Storage of the moments and adaptive scalars of an optimizer's parameters."""

from __future__ import annotations

import warnings
from collections.abc import MutableMapping, Sequence
from itertools import chain
from operator import is_, itemgetter
from typing import Any, Protocol

import torch
from torch import Tensor

from am_lightning.distributed import LogicalParam, ShardLayout
from am_lightning.optim import param_state
from am_lightning.optim.closed_form import AdaptiveScalars
from am_lightning.optim.kernels.transfer import is_capturing, moved, refuse_in_capture
from am_lightning.optim.validation import described

State = MutableMapping[Tensor, Any]
Groups = Sequence[dict[str, Any]]
DEFAULTS = {"step": 0.0, "beta_prod": 1.0, "beta": param_state.NO_BETA, "prev_lr": 0.0}  # AdaptiveScalars' order


class Scalars(Protocol):
    """The adaptive scalars of every row of one layout."""

    state: State  # the optimizer state that holds them; a user may have replaced it since

    def read(self) -> AdaptiveScalars:
        """Return the scalars, each ``[rows]``, on the device of the sums."""

    def write(self, new: AdaptiveScalars, active: Tensor) -> None:
        """Store new values.

        Args:
            new: the values of all rows.
            active: ``[rows]`` bool, True for rows that took part in the step.
        """

    def betas(self) -> Tensor:
        """Return beta_t of each row's last step, ``[rows]``, nan before its first step."""


def _restarted(scalars: AdaptiveScalars) -> AdaptiveScalars:
    """Reset ``beta_prod`` and ``prev_lr`` of rows whose ``step`` is 0, because setting it to 0 resets AdamW, too."""
    fresh = scalars.step == 0
    return scalars._replace(
        beta_prod=scalars.beta_prod.masked_fill(fresh, DEFAULTS["beta_prod"]),
        prev_lr=scalars.prev_lr.masked_fill(fresh, DEFAULTS["prev_lr"]),
    )


class Packed:
    """One table ``[4, rows]`` whose views are the 0-dim states, so that one operation reads or writes all of them.

    After a load or a user has put other tensors into the state, they are no longer ``views``, and are packed again.
    """

    def __init__(self, states: Sequence[dict[str, Any]]) -> None:
        columns = AdaptiveScalars(*(torch.stack([state[key] for state in states]) for key in DEFAULTS))
        self.table = torch.stack(_restarted(columns))
        views = list(zip(*(line.unbind() for line in self.table), strict=True))
        for state, own in zip(states, views, strict=True):
            state.update(zip(DEFAULTS, own, strict=True))
        self.views = list(chain.from_iterable(views))


class StateScalars:
    """Adaptive scalars that are 0-dim tensors in the state of each row's parameter.

    A rank that holds no element of a tensor may hold no state of it. The last beta of such a row is kept here.
    """

    def __init__(self, state: State, params: Sequence[LogicalParam]) -> None:
        self.state = state
        self._params, self._names = [logical.param for logical in params], [logical.name for logical in params]
        self._device, self._dtype = param_state.sums_live_on(self._params)
        self._last: Tensor | None = None
        plain = all(p.device == self._device and p.dtype != torch.float64 for p in self._params)
        self.device_of_float32 = self._device if self._params and plain else None  # None: not all are float32
        self._distinct = len({id(param) for param in self._params}) == len(self._params)
        self._packed: Packed | None = None

    def read(self) -> AdaptiveScalars:
        self._packed = self._pack()
        if self._packed is not None:
            return _restarted(AdaptiveScalars(*self._packed.table.to(self._dtype, copy=True).unbind()))
        return _restarted(AdaptiveScalars(*(self._stack(key, default) for key, default in DEFAULTS.items())))

    def write(self, new: AdaptiveScalars, active: Tensor) -> None:
        table = torch.stack(new)
        if self._packed is not None:
            self._packed.table.copy_(table)
            return
        last = torch.full_like(new.beta, param_state.NO_BETA) if self._last is None else self._last
        self._last = torch.where(active, new.beta, last)
        known = [i for i, param in enumerate(self._params) if self.state.get(param)]
        for device, members in _by_device([self._params[i] for i in known]).items():
            here = [known[i] for i in members]
            for key, column in zip(DEFAULTS, moved(table, device), strict=True):  # one copy for all numbers
                values = column.unbind()
                torch._foreach_copy_([self.state[self._params[i]][key] for i in here], [values[i] for i in here])

    def table(self) -> Tensor:
        """Return ``[4, rows]`` float32: the packed states, or a copy that ``take`` writes back."""
        self._packed = self._pack()
        if self._packed is not None:
            return self._packed.table
        return torch.stack([self._stack(key, default) for key, default in DEFAULTS.items()]).to(torch.float32)

    def take(self, table: Tensor, active: Tensor) -> None:
        """Store the values that a kernel has written into ``table``. See ``write`` for ``active``."""
        if self._packed is None:
            self.write(AdaptiveScalars(*table.to(self._dtype).unbind()), active)

    def betas(self) -> Tensor:
        betas = self._stack("beta", DEFAULTS["beta"])
        if self._last is not None:
            betas = torch.where(betas >= 0, betas, param_state.as_stored(self._last, self._params))
        return _nan_before_first(betas)

    def _pack(self) -> Packed | None:
        """Return the packed states, or None unless each row has its own state and all are float32 on one device."""
        states = [self.state[param] for param in self._params if param in self.state]
        if not self._distinct or len(states) != len(self._params):
            return None
        values = [state.get(key) for state in states for key in DEFAULTS]
        if self._packed is not None and all(map(is_, values, self._packed.views)):
            return self._packed
        if is_capturing(self._device):  # the graph would record the packing, and each replay would undo the last step
            return None
        kinds = {(v.dtype, v.device, v.dim()) if isinstance(v, Tensor) else None for v in values}
        return Packed(states) if len(kinds) == 1 and next(iter(kinds)) in self._packable else None

    @property
    def _packable(self) -> set[tuple[torch.dtype, torch.device, int]]:
        return {(torch.float32, self._device, 0)}

    def _stack(self, key: str, default: float) -> Tensor:
        missing = torch.full((), default, dtype=self._dtype, device=self._device)
        found = [self.state[p].get(key, missing) if p in self.state else missing for p in self._params]
        values = [_one_number(value, key, name) for value, name in zip(found, self._names, strict=True)]
        if not values:
            return missing.new_empty(0)
        groups = _by_device(values)
        if len(groups) == 1:
            return moved(torch.stack(values), self._device, self._dtype)
        stacks = [moved(torch.stack([values[i] for i in at]), self._device, self._dtype) for at in groups.values()]
        columns, places = torch.cat(stacks).unbind(), chain.from_iterable(groups.values())
        return torch.stack([column for _, column in sorted(zip(places, columns, strict=True), key=itemgetter(0))])


class TableScalars:
    """Adaptive scalars of flat parameters that hold many logical parameters each. A checkpoint holds them by name."""

    def __init__(self, state: State, params: Sequence[LogicalParam], saved: dict[str, list[float]]) -> None:
        """Create the vectors.

        Args:
            state: the optimizer state.
            params: the logical parameters.
            saved: ``name -> four numbers`` of a checkpoint. A name that it lacks gets the values before the first step.
        """
        self.state = state
        self.params = list(params)
        self._device, self._dtype = param_state.sums_live_on([logical.param for logical in params])
        fresh = list(DEFAULTS.values())
        table = [saved.get(logical.name, fresh) for logical in params]
        columns = torch.tensor(table, dtype=self._dtype, device=self._device).reshape(len(table), 4).unbind(1)
        self._columns = AdaptiveScalars(*columns)

    def read(self) -> AdaptiveScalars:
        return self._columns

    def write(self, new: AdaptiveScalars, active: Tensor) -> None:
        self._columns = AdaptiveScalars(*(column.to(torch.float32).to(self._dtype) for column in new))
        for logical, step in zip(self.params, self._columns.step.unbind(), strict=True):
            if self.state.get(logical.param):
                self.state[logical.param]["step"] = step.to(torch.float32)  # an engine may have stored a number

    def betas(self) -> Tensor:
        return _nan_before_first(self._columns.beta)

    def saved(self) -> dict[str, list[float]]:
        """Return ``name -> four numbers`` as floats. Waits for the device."""
        table = torch.stack(self._columns, 1).tolist()
        return {logical.name: numbers for logical, numbers in zip(self.params, table, strict=True)}


def _one_number(value: Any, key: str, name: str) -> Tensor:
    """Return ``value`` as 0-dim tensor. Like AdamW, it accepts any tensor of one element and nothing else."""
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise RuntimeError(
            f"the state of parameter {name!r} has {described(value)} as {key!r}, which must be a tensor of one number: "
            f"state[{key!r}] = torch.tensor({DEFAULTS[key]})"
        )
    return value if value.dim() == 0 else value.reshape(())


class StateStore:
    """Reads and creates the entries of ``optimizer.state``, and holds the scalars that cannot be in it.

    The state has the form of torch.optim, a dict for each parameter. A flat parameter holds many logical parameters,
    so its adaptive scalars are kept here in tables by name. A ``state_dict`` carries these tables in its groups.

    Args:
        moments: keys of the states shaped like the parameter, the direction d first.
        cap_key: group option that holds the cap of beta_t.
    """

    def __init__(self, moments: tuple[str, ...], cap_key: str) -> None:
        self._moments, self._cap_key = moments, cap_key
        self._complete = itemgetter(*moments, *DEFAULTS)
        self._tables: dict[str, list[float]] = {}  # adaptive scalars by name whose layout is not built yet
        self._scalars: dict[ShardLayout, Scalars] = {}

    # ------------------------------------------------------------------ moments
    def moments(
        self, state: State, groups: Groups, direction: torch.dtype | None, params: Sequence[LogicalParam]
    ) -> list[list[Tensor]]:
        """Return one list of tensors for each moment, in the order of ``params``. Missing states are created.

        Args:
            state: the optimizer state.
            groups: the parameter groups.
            direction: ``exp_avg_dtype``.
            params: the logical parameters.
        """
        try:
            for logical in params:
                self._complete(state.get(logical.param, {}))
        except KeyError:
            for logical in params:
                self._ready(state, logical, groups[logical.group_index], direction)
        states = [state[logical.param] for logical in params]
        return [[own[key] for own in states] for key in self._moments]

    def _ready(self, state: State, logical: LogicalParam, group: dict[str, Any], direction: torch.dtype | None) -> None:
        param, in_table = logical.param, logical.partitioned
        known = state.get(param, {})  # an engine may have left an empty dict
        if self._moments[0] not in known or not (in_table or DEFAULTS.keys() <= known.keys()):
            refuse_in_capture(param)
        own = state[param]
        if self._moments[0] not in own:
            param_state.create(own, param, self._moments, adaptive=not in_table, direction=direction)
        elif not in_table:
            cap = group[self._cap_key]
            param_state.complete(own, param, beta1=cap, lr=group["lr"], cap=cap)

    # ------------------------------------------------------------------ adaptive scalars
    def scalars(self, state: State, layout: ShardLayout, groups: Groups, who: str) -> Scalars:
        """Return the adaptive scalars of a layout's rows. ``who`` names the optimizer in a warning."""
        found = self._scalars.get(layout)
        if found is None or found.state is not state:
            params = layout.logical_params
            found = self._scalars[layout] = (
                TableScalars(state, params, self._take_tables(state, params, groups, who))
                if layout.partitioned
                else StateScalars(state, params)
            )
        return found

    def _take_tables(
        self, state: State, params: Sequence[LogicalParam], groups: Groups, who: str
    ) -> dict[str, list[float]]:
        """Return the saved scalars of the parameters, computed as for AdamW if the checkpoint has moments only."""
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
                f"written by {who}. Their momentum is assumed to have decayed by the cap at each step",
                stacklevel=4,
            )
        return found

    def betas(self, state: State, layout: ShardLayout | None, params: Sequence[LogicalParam]) -> Tensor:
        """Return beta_t of each parameter, ``[parameters]``, nan for one that has never stepped.

        Args:
            state: the optimizer state.
            layout: layout of the parameters, or None before the first step.
            params: the logical parameters.
        """
        found = None if layout is None else self._scalars.get(layout)
        return (found if found is not None and found.state is state else StateScalars(state, params)).betas()

    def betas_by_name(self, names: Sequence[str]) -> Tensor:
        """Return beta_t of each name, ``[names]``, from flat parameters. It is nan for one that has never stepped."""
        found: dict[str, Tensor] = {}
        for table in self._table_scalars():
            found.update(zip((logical.name for logical in table.params), table.betas().unbind(), strict=True))
        unknown = next(iter(found.values()), torch.zeros((), device="cpu")) * float("nan")
        loaded = {name: numbers[2] for name, numbers in self._tables.items() if numbers[2] >= 0}
        return torch.stack([found.get(n, torch.full_like(unknown, loaded.get(n, float("nan")))) for n in names])

    def _table_scalars(self) -> list[TableScalars]:
        return [scalars for scalars in self._scalars.values() if isinstance(scalars, TableScalars)]

    def forget_layouts(self) -> None:
        """Drop the layouts. Their scalars stay in the tables until the layouts are rebuilt."""
        self._scalars, self._tables = {}, self.tables()

    def tables(self) -> dict[str, list[float]]:
        """Return ``name -> four numbers`` for logical parameters whose states cannot hold their scalars."""
        tables = dict(self._tables)
        for table in self._table_scalars():
            tables.update(table.saved())
        return tables

    def take_tables(self, tables: dict[str, list[float]]) -> None:
        """Replace all tables by those of a loaded checkpoint."""
        self._scalars, self._tables = {}, dict(tables)


def _by_device(tensors: Sequence[Tensor]) -> dict[torch.device, list[int]]:
    """Return ``device -> indices`` of the tensors on it."""
    groups: dict[torch.device, list[int]] = {}
    for i, tensor in enumerate(tensors):
        groups.setdefault(tensor.device, []).append(i)
    return groups


def _nan_before_first(betas: Tensor) -> Tensor:
    return betas.masked_fill(~(betas >= 0), float("nan"))
