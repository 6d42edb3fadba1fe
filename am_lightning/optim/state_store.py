"""What an optimizer keeps between steps, and how it is saved, loaded, pickled and copied."""

from __future__ import annotations

import operator
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from am_lightning.distributed import ShardLayout
from am_lightning.distributed.call_stack import called_by_zero_redundancy
from am_lightning.distributed.names import names_by_id
from am_lightning.optim import state as param_state
from am_lightning.optim.group_checks import as_unread, check_groups, check_magnitudes, naming_group, with_any_lr
from am_lightning.optim.kernels.plan import Workspace
from am_lightning.optim.param_layout import PlacedOptimizer
from am_lightning.optim.scalars import Scalars, StateScalars, TableScalars
from am_lightning.optim.state import OPTIONS, TABLE
from am_lightning.optim.state_dict_checks import Expected, check_loadable, check_mapping
from am_lightning.optim.step_stats import StepRecord
from am_lightning.optim.validation import NONFINITE, SCOPES, WHOLE_OPTIMIZER, check_choice

_NAMES = "_names_of_unnamed"  # in a pickle: what name_parameters() gave


class PersistentOptimizer(PlacedOptimizer):
    """State of parameters, adaptive scalars of rows, and their checkpoints."""

    cap_key: str  # group option that holds the cap of beta_t
    moments: tuple[str, ...]  # state tensors shaped like the parameter, the direction d first
    first_takes_cap: bool  # a row's own first step uses the cap
    plain_attributes: tuple[str, ...] = ("scope", "nonfinite")  # survive pickle and deepcopy

    nonfinite: str
    exp_avg_dtype: torch.dtype | None = None  # of the direction d; None: the parameter's
    fused_dropped: bool | None = None  # convert_adamw found fused=True, and could not keep it here; None: found none

    def _configure(self, *, scope: str, nonfinite: str, replica_group: Any = None) -> None:
        check_choice("scope", scope, SCOPES)
        check_choice("nonfinite", nonfinite, NONFINITE)
        self.scope, self.nonfinite = scope, nonfinite
        self._forget()
        self.replica_group = replica_group

    def _forget(self) -> None:
        """Attributes that live as long as this process: never in groups, state_dict, pickle or deepcopy."""
        self._tables: dict[str, list[float]] = {}  # adaptive scalars by name that await their layout (DeepSpeed)
        self._stores: dict[ShardLayout, Scalars] = {}
        self._places: dict[ShardLayout, Tensor] = {}
        self._forget_placement()
        self._loading: tuple[dict[str, Any], list[dict[str, Any]]] | None = None
        self._workspace = Workspace()
        self._seen: dict[int, list[Any]] = {}  # options of each group that the last step looked at
        self._tiers: dict[str, int] = {}  # kernels of the last step -> how many tensors
        self._record = StepRecord()

    def _check_group(self, group: dict[str, Any]) -> dict[str, Any]:
        """Validate a group's options (defaults filled in); returns those to normalise."""
        raise NotImplementedError

    def _complete_groups(self, groups: list[dict[str, Any]]) -> None:
        """Fill in options that are missing, from the optimizer's own."""
        for group in groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
            for key, value in self._check_group(with_any_lr(group)).items():
                group.setdefault(key, value)

    def _complete_foreign_groups(self) -> None:
        """Others may put groups in place: those of a checkpoint of AdamW, or dicts without ``add_param_group``.

        Raises:
            TypeError, ValueError, RuntimeError: a group or an option is of the wrong kind; the text has its number.
        """
        check_groups(self.param_groups)
        self._fill_foreign_groups()
        for index, group in enumerate(self.param_groups):
            options = [value for key, value in group.items() if key != "params"]
            seen = self._seen.get(index, ())
            if len(options) == len(seen) and all(map(operator.is_, options, seen)):
                continue
            with naming_group(index):
                self._check_group(as_unread(group, self.cap_key))
            self._seen[index] = options

    def _fill_foreign_groups(self) -> None:
        needed = {*self.defaults, self.cap_key}
        foreign = [group for group in self.param_groups if not needed <= group.keys()]
        for group in foreign:
            with naming_group(next(i for i, other in enumerate(self.param_groups) if other is group)):
                self._complete_groups([group])
        if foreign:
            self._remember_given()

    def groups_of_parameters(self) -> list[dict[str, Any]]:
        """The group of each parameter, in the order of ``parameter_names``."""
        self._complete_foreign_groups()
        if self.is_partitioned():
            return [group for group, params in self._given for _ in params]
        return [self.param_groups[row.group_index] for row in self._rows()]

    def caps(self) -> list[float]:
        """The cap of beta_t of each parameter, in the order of ``parameter_names``."""
        return [float(group[self.cap_key]) for group in self.groups_of_parameters()]

    def _betas(self) -> Tensor:
        """``[parameters]`` beta_t, nan where one has never stepped."""
        if self.is_partitioned():
            return self._betas_by_name()
        layout = self._layouts.get(self._key())
        store = None if layout is None else self._stores.get(layout)
        if store is None or not store.reads(self.state):
            store = StateScalars(self.state, self._rows())
        return store.betas()

    def _betas_by_name(self) -> Tensor:
        """Of every tensor that the groups were given, from the flat partitions that have stepped."""
        found: dict[str, Tensor] = {}
        for store in self._stores.values():
            if isinstance(store, TableScalars):
                found.update(zip((row.name for row in store.rows), store.betas().unbind(), strict=True))
        unknown = next(iter(found.values()), torch.zeros((), device="cpu")) * float("nan")
        loaded = {name: numbers[2] for name, numbers in self._tables.items() if numbers[2] >= 0}
        names = self.parameter_names()
        return torch.stack([found.get(n, torch.full_like(unknown, loaded.get(n, float("nan")))) for n in names])

    def _store(self) -> Scalars:
        """The adaptive scalars of the current layout's rows."""
        layout = self._layout
        assert layout is not None  # step() has built it
        store = self._stores.get(layout)
        if store is None or not store.reads(self.state):
            partitioned = any(row.partitioned for row in layout.logical_params)
            store = self._stores[layout] = (
                TableScalars(self.state, layout.logical_params, self._take_tables(layout))
                if partitioned
                else StateScalars(self.state, layout.logical_params)
            )
        return store

    def _take_tables(self, layout: ShardLayout) -> dict[str, list[float]]:
        """What a checkpoint says of the layout's rows; where it has moments alone, AdamW's momentum is assumed."""
        found, foreign = {}, []
        for row in layout.logical_params:
            group, state = self.param_groups[row.group_index], self.state.get(row.param) or {}
            if row.name in self._tables:
                found[row.name] = self._tables.pop(row.name)
            elif self.moments[0] in state and float(state.get("step", 0)) > 0:
                step, cap = float(state["step"]), float(group[self.cap_key])
                found[row.name] = [step, cap**step, cap, float(group["lr"])]
                foreign.append(row.name)
        if foreign:
            warnings.warn(
                f"the checkpoint has no adaptive scalars of {len(foreign)} tensors ({foreign[0]!r}, ...): it was not "
                f"written by {type(self).__name__}. Their momentum is taken to have decayed by the cap at each step",
                stacklevel=4,
            )
        return found

    def _forget_layout(self) -> None:
        for store in self._stores.values():
            if isinstance(store, TableScalars):
                self._tables.update(store.saved())
        self._stores, self._places = {}, {}
        super()._forget_layout()

    def _check_scope(self, layout: ShardLayout) -> None:
        super()._check_scope(layout)
        if any("max_momentum" in group for group in self.param_groups):
            warnings.warn(
                "the learning rate scheduler cycles betas[0], which adaptive memory does not use: beta_t is computed, "
                f"and its cap stays in the group's {self.cap_key!r}. Pass cycle_momentum=False to the scheduler.",
                stacklevel=7,  # whoever calls step(), past torch's decorators
            )

    # ------------------------------------------------------------------ groups, pickle, state_dict
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; its options are checked before anything changes."""
        checked = {}
        if isinstance(param_group, dict):
            for name in set(WHOLE_OPTIMIZER).intersection(param_group):
                # ZeroRedundancyOptimizer repeats all arguments in the groups
                if param_group[name] != getattr(self, name, ...) or not called_by_zero_redundancy():
                    raise ValueError(f"Invalid {name} in a parameter group: {name} is an option of the whole optimizer")
                param_group = {key: value for key, value in param_group.items() if key != name}
            checked = self._check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        self.param_groups[-1].update(checked)
        self._remember_given()
        if self._model is not None:  # a layer that was added to it in mid-run has a name
            self.name_parameters(self._model.named_parameters())

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__() | {name: getattr(self, name) for name in self.plain_attributes}
        return state | {_NAMES: self.parameter_names()} if self._known_names else state

    def __setstate__(self, state: dict[str, Any]) -> None:
        before = dict(self.__dict__)
        try:
            self._take_state(state)
        except BaseException:
            self.__dict__.update(before)  # a load that fails has changed nothing
            raise

    def _take_state(self, state: dict[str, Any]) -> None:
        copied = "_record" not in self.__dict__  # or unpickled
        if copied:
            self._forget()
        super().__setstate__(state)
        if copied:
            self._remember_given()
        self.defaults.pop("differentiable", None)  # torch.optim adds it
        if self._loading is not None:
            self._finish_loading(*self._loading)
        self._complete_groups(self.param_groups)
        if self._loading is not None:
            self._replace_groups(self._loading[1])
            self._forget_tables()
            self._read_tables()
        if _NAMES in self.__dict__:  # after a copy or unpickling the parameters are others, their places are not
            self._known_names = names_by_id(
                zip(self.__dict__.pop(_NAMES), dict.fromkeys(self._parameters()), strict=True)
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a ``state_dict`` of this class, or one of its plain counterpart (AdamW for AMAdamW) in mid-run.

        The cap stays this optimizer's, as do options that the checkpoint lacks.

        Raises:
            ValueError: it is no state dict, or that of another optimizer or model; the text names the parameter or the
                group, and nothing has changed.
        """

        def remember(_: Optimizer, saved: dict[str, Any]) -> None:
            who, finite = type(self).__name__, self.nonfinite == "skip" and not self.is_partitioned()
            self._complete_foreign_groups()
            groups, names = self.param_groups, self._known_names
            check_loadable(saved, Expected(who, groups, self.moments, names, self._check_saved_options, finite))
            self._loading = saved, groups

        check_mapping(state_dict)  # torch.optim copies it; the user's hooks may make a state dict of it
        last = self.register_load_state_dict_pre_hook(remember)  # sees what the user's own hooks made of it
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()
            self._loading = None

    def _check_saved_options(self, saved: dict[str, Any], live: dict[str, Any]) -> None:
        trial = dict(saved)
        param_state.restore_options(trial, live, self.cap_key)
        self._check_group(with_any_lr(trial))
        check_magnitudes(trial)

    def state_dict(self) -> dict[str, Any]:
        """As in torch.optim. Where a parameter holds many tensors, the groups carry their adaptive scalars by name."""
        saved = super().state_dict()
        tables = dict(self._tables)
        for store in self._stores.values():
            if isinstance(store, TableScalars):
                tables.update(store.saved())
        if tables:
            options = [{k: v for k, v in group.items() if k != "params"} for group in saved["param_groups"]]
            for group in saved["param_groups"]:
                group |= {TABLE: tables, OPTIONS: options}
        return saved

    def _forget_tables(self) -> None:
        """A checkpoint has replaced the state: nothing of before counts."""
        self._stores, self._tables = {}, {}

    def _read_tables(self) -> None:
        """Take the adaptive scalars that a checkpoint, or an engine that loaded one, has put into the groups."""
        groups = [group for group, _ in self._given]
        if not any(TABLE in group or OPTIONS in group for group in groups):
            return
        tables = [group.pop(TABLE, None) for group in groups]
        options = [group.pop(OPTIONS, None) for group in groups]
        if any(tables):
            self._stores, self._tables = {}, dict(next(table for table in tables if table))
        saved: list[dict[str, Any]] = next((entry for entry in options if entry), [])
        live = self.given_groups()
        if len(saved) != len(live):
            return
        copied = ("lr", "betas", self.cap_key, "params")
        for group, own in zip(live, saved, strict=True):
            kept = {key: value for key, value in own.items() if key in group and key not in copied}
            if any(group[key] != saved[0].get(key) for key in kept):
                continue  # its own options are there
            group.update(kept)  # one engine copies the first group's options onto all
            if group["lr"] == saved[0].get("lr"):
                group["lr"] = own["lr"]

    def _finish_loading(self, saved: dict[str, Any], live: list[dict[str, Any]]) -> None:
        """torch.optim has put the checkpoint's groups and states in place of the ``live`` ones."""
        partitioned = self.is_partitioned()
        for group, saved_group, live_group in zip(self.param_groups, saved["param_groups"], live, strict=True):
            param_state.restore_options(group, live_group, self.cap_key)
            cap = group[self.cap_key]
            beta1 = param_state.betas_of(saved_group)[0] if "betas" in saved_group and "betas" in group else cap
            for param, index in zip(group["params"], saved_group["params"], strict=True):
                if saved["state"].get(index) and not partitioned:
                    state = self.state[param]
                    param_state.restore_scalars(
                        state, saved["state"][index], param, beta1=beta1, lr=group["lr"], cap=cap
                    )
                    direction, dtype = self.moments[0], param_state.direction_dtype(param, self.exp_avg_dtype)
                    state[direction] = state[direction].to(dtype)  # torch.optim has cast it to the parameter's
