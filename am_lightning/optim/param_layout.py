"""The logical tensors of an optimizer, their names, and the layouts that reduce their sums over ranks."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any

from torch import Tensor, nn

from am_lightning.distributed import LogicalParam, ShardLayout, logical_params_of, strategies
from am_lightning.distributed.call_stack import inside_zero_redundancy
from am_lightning.distributed.given_params import GivenParams, ParamGroups
from am_lightning.distributed.names import names_by_id
from am_lightning.distributed.strategies import Demand, Strategy, Surroundings
from am_lightning.optim.validation import check_process_group, described

_params_of = itemgetter("params")
_device_and_dtype = attrgetter("device", "dtype")


def params_of(param_groups: ParamGroups) -> list[Tensor]:
    """Return all parameters in the order of the groups."""
    return list(chain.from_iterable(map(_params_of, param_groups)))


def checked_params_of(param_groups: ParamGroups) -> list[Tensor]:
    """Return all parameters, checked as by ``add_param_group``, because users may have changed the groups by hand.

    Raises:
        TypeError: if a parameter is not a tensor. The message has the index of the group.
        ValueError: if a parameter is in two groups. The message has the indices of both.
    """
    holder: dict[int, int] = {}
    for index, group in enumerate(param_groups):
        for param in group["params"]:
            if not isinstance(param, Tensor):
                raise TypeError(
                    f"parameter group {index}: an optimizer can only optimize Tensors, but one of the params is "
                    f"{described(param)}"
                )
            if holder.setdefault(id(param), index) != index:
                raise ValueError(
                    f"parameter groups {holder[id(param)]} and {index}: some parameters appear in more than one "
                    "parameter group"
                )
    return params_of(param_groups)


class ParamLayout:
    """The logical tensors behind an optimizer's parameters, their names, and the layouts of its steps.

    An optimizer holds one instance, and passes its ``param_groups`` to each call, because users and engines replace
    them. A layout is built at the first step, and again after the parameters have changed. An engine may replace the
    parameters by flat partitions and call ``step()`` with some of them at a time. Each of these calls has its layout.

    A ParamLayout is never saved, pickled or copied with the optimizer.

    Attributes:
        given: the parameters that each group was given, and the names of unnamed parameters.
        layouts: the layouts of all steps so far, in the order of their first use.
        first: the first of ``layouts``, or None before the first step.
        last: the layout of the current or last step, or None before the first step.
    """

    def __init__(self) -> None:
        self.given = GivenParams()
        self.layouts: dict[Hashable, ShardLayout] = {}
        self.first: ShardLayout | None = None
        self.last: ShardLayout | None = None
        self._last_key: Hashable = None
        self._replica_group: Any = None
        self._pipeline_group: Any = None
        self._model: nn.Module | None = None
        self._attached = False  # whether an adapter has called bind_engine()
        self._averaging_group: Any = None
        self._without_engine: Hashable = None  # parameters for which no engine was found, because a search takes 0.1 s
        self._replaced: dict[int, Tensor] = {}  # id -> given parameter that an engine has replaced and still holds

    # ------------------------------------------------------------------ set from outside
    @property
    def replica_group(self) -> Any:
        """Process group whose ranks hold the same parameters, or None. Setting it raises TypeError for other types."""
        return self._replica_group

    @replica_group.setter
    def replica_group(self, group: Any) -> None:
        check_process_group("replica_group", group)
        self._replica_group = group
        self.drop()

    @property
    def pipeline_group(self) -> Any:
        """Process group of one rank of each pipeline stage, or None. Setting it raises TypeError for other types."""
        return self._pipeline_group

    @pipeline_group.setter
    def pipeline_group(self, group: Any) -> None:
        check_process_group("pipeline_group", group)
        self._pipeline_group = group
        self.drop()

    def name_parameters(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Give unnamed parameters the names of ``module.named_parameters()``."""
        self.given.known_names = names_by_id(named_parameters)
        self.drop()

    def bind_model(self, model: nn.Module) -> None:
        """Take names and process groups from the outermost module.

        Raises:
            TypeError: if ``model`` is not a torch.nn.Module.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"Invalid model: {type(model).__name__} (model must be a torch.nn.Module)")
        self._model = model
        self.name_parameters(model.named_parameters())

    def bind_engine(self, averaging_group: Any) -> None:
        """Tell that an adapter has checked the engine around the optimizer, so the call stack need not be searched.

        Args:
            averaging_group: process group of the ranks whose gradients the engine averages, or None if it averages
                none.
        """
        self._attached, self._averaging_group = True, averaging_group

    # ------------------------------------------------------------------ tensors and names
    def engine(self, param_groups: ParamGroups) -> type[Strategy] | None:
        """Return the strategy whose engine has replaced the given parameters by flat partitions, or None."""
        engines = strategies.loaded_engines()
        if not engines:
            return None
        ids = tuple(map(id, params_of(param_groups)))
        if not self.given.keys().isdisjoint(ids):
            return None
        looked = ids, frozenset(self.given.keys())
        if looked == self._without_engine:
            return None
        alive = self._replaced or self.given.alive(self._model)
        found = next((one for one in engines if any(map(one.replaces, alive.values()))), None)
        self._replaced = {} if found is None else alive
        self._without_engine = looked if found is None and looked[0] else None
        return found

    def names(self, param_groups: ParamGroups) -> list[str]:
        """Return the distinct names of all logical tensors in the order of the groups.

        They include tensors that an engine has removed from the groups for the current call.
        """
        if self.engine(param_groups) is not None:
            return [name for _, named in self.given.named() for name, _ in named]
        return [logical.name for logical in self.logical_params(param_groups)]

    def groups_of(self, param_groups: ParamGroups) -> list[dict[str, Any]]:
        """Return the parameter group of each of ``names``."""
        if self.engine(param_groups) is not None:
            return self.given.group_of_each()
        return [param_groups[logical.group_index] for logical in self.logical_params(param_groups)]

    def logical_params(self, param_groups: ParamGroups) -> list[LogicalParam]:
        """Return the logical tensors in the parameters. Not collective, so it works before a layout is built."""
        layout = self.layouts.get(self.key(param_groups))
        return self._find_logical_params(param_groups)[0] if layout is None else layout.logical_params

    def _find_logical_params(self, param_groups: ParamGroups) -> tuple[list[LogicalParam], list[int]]:
        surroundings = Surroundings(self._model)
        if self.engine(param_groups) is not None:
            surroundings = Surroundings(self._model, *self.given.held(self._replaced, param_groups))
        if self._model is not None:  # a layer may have been added, and its id may be that of a deleted one
            self.given.known_names |= names_by_id(self._model.named_parameters())
        names = {**self.given.names_by_position(param_groups), **self.given.known_names}
        return logical_params_of(param_groups, surroundings=surroundings, known_names=names)

    # ------------------------------------------------------------------ layouts
    def key(self, param_groups: ParamGroups) -> Hashable:
        """Return the key of a layout: the parameters, the number in each group, and their devices and dtypes.

        Devices and dtypes are part of it because a model may be moved or cast in place. They are left out if an engine
        has replaced the parameters, because it may move its partitions.
        """
        params = list(chain.from_iterable(map(_params_of, param_groups)))
        ids = *map(len, map(_params_of, param_groups)), *map(id, params)
        if self._replaced:
            return ids
        try:
            return ids, tuple(map(_device_and_dtype, params))
        except AttributeError:
            checked_params_of(param_groups)  # raises an error that names the parameter
            raise

    def find(self, param_groups: ParamGroups) -> ShardLayout | None:
        """Return the layout of these parameters and make it ``last``. Returns None if it has to be built."""
        key = self.key(param_groups)
        if self.last is not None and key == self._last_key:
            return self.last
        layout = self.layouts.get(key)
        if layout is not None:
            self.last, self._last_key = layout, key
        return layout

    def build(self, param_groups: ParamGroups, check: Callable[[ShardLayout], None]) -> ShardLayout:
        """Build the layout of these parameters. Collective.

        Args:
            param_groups: the parameter groups.
            check: a function that raises for a layout that must not be kept.

        Raises:
            ValueError: if the sums of a tensor cannot be formed. Raised on every rank.
        """
        if self._attached or strategies.is_stepped_by_engine(param_groups):
            self._without_engine = None  # an earlier search may have come before the engine was complete
        replaced = self.engine(param_groups) is not None
        strategies.check_engines(param_groups, self.given, self._model, attached=self._attached, replaced=replaced)
        params, sizes = self._find_logical_params(param_groups)
        replicas = self._replica_group
        if not replaced:
            self.drop()
            self.given.take_present(param_groups)  # the earlier ones may be those of a model before it was sharded
            if replicas is None:
                replicas = self._averaging_group if self._attached else strategies.averaging_group()
        layout = ShardLayout.build(
            params,
            sizes,
            replica_group=replicas,
            pipeline_group=self._pipeline_group,
            others_hold_the_rest=inside_zero_redundancy(param_groups),
        )
        check(layout)
        key = self.key(param_groups)
        self.layouts[key] = self.last = layout
        self.first = self.first or layout
        self._last_key = key
        return layout

    def drop(self) -> None:
        """Drop all layouts. The next step builds a new layout."""
        self.layouts, self.first, self.last, self._last_key = {}, None, None, None

    def check_scope(self, layout: ShardLayout, scope: str, *, exact_sums: bool, whole_step: bool) -> None:
        """Refuse a scope whose sums ``layout`` cannot form, before any parameter changes. Collective over a pipeline.

        Args:
            layout: the layout to check.
            scope: "tensor", "group" or "global".
            exact_sums: whether beta_t depends on the sums themselves and not only on their ratio.
            whole_step: whether the first of several ``step()`` calls of a training step has the sums of all of them.

        Raises:
            ValueError: if the sums cannot be formed. Raised on every rank.
        """
        groups = f" with {len(layout.sizes)} parameter groups" if scope == "group" else ""
        layout.check_stages(f"scope={scope!r}{groups}")
        names = [[name for name, _ in named] for _, named in self.given.named()]
        strategies.check_demand(layout.logical_params, Demand(scope, exact_sums, whole_step, names))
        if scope != "tensor":
            layout.check_whole_model(f"scope={scope!r}")
