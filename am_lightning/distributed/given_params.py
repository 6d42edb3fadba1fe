"""Remember the parameters that groups were given, before an engine or a wrapper replaced them."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Size, Tensor, nn
from torch.nn.parameter import is_lazy

from am_lightning.distributed.names import group_names

ParamGroups = Sequence[dict[str, Any]]
NamedParams = Sequence[tuple[str, Any]]  # (name, parameter)


class Given(NamedTuple):
    """The id and shape of a parameter. No reference is kept, because it may hold a whole model before sharding.

    A weak reference is not possible either: module.to() under FSDP2 swaps tensors, which torch refuses for a tensor
    that has a weak reference.
    """

    key: int  # id
    shape: Size | None  # None for a lazy parameter

    @classmethod
    def of(cls, param: Tensor) -> Given:
        return cls(id(param), None if is_lazy(param) else param.shape)


class GivenParams:
    """The parameters that each group was given, and their names.

    Accelerate's FSDP2 replaces parameters by sharded ones, DeepSpeed by master copies or flat partitions.

    Attributes:
        entries: each group with the parameters that it was given.
        known_names: ``id(parameter) -> name`` of parameters that were given without a name.
    """

    def __init__(self) -> None:
        self.entries: list[tuple[dict[str, Any], list[Given]]] = []
        self.known_names: dict[int, str] = {}

    def remember(self, param_groups: ParamGroups) -> None:
        """Remember the parameters of groups that are new."""
        known = {id(group) for group, _ in self.entries}
        for group in param_groups:
            if id(group) not in known:
                self.entries.append((group, [Given.of(param) for param in group["params"]]))

    def replace_groups(self, old: ParamGroups, new: ParamGroups) -> None:
        """Follow torch.optim's load_state_dict, which replaces ``old`` groups by ``new`` ones in the same order."""
        successors = {id(before): after for before, after in zip(old, new, strict=True)}
        self.entries = [(successors.get(id(group), group), given) for group, given in self.entries]

    def take_present(self, param_groups: ParamGroups) -> None:
        """Treat the present parameters as the given ones. They take over the names of those that they replaced."""
        self.known_names |= self.names_by_position(param_groups)
        self.entries = []
        self.remember(param_groups)

    @property
    def groups(self) -> list[dict[str, Any]]:
        """All remembered groups, including those that an engine hides at the moment."""
        return [group for group, _ in self.entries]

    def filled_groups(self) -> list[dict[str, Any]]:
        """Return the groups that were given at least one parameter."""
        return [group for group, given in self.entries if given]

    def group_of_each(self) -> list[dict[str, Any]]:
        """Return the group of each given parameter."""
        return [group for group, given in self.entries for _ in given]

    def keys(self) -> set[int]:
        """Return the ids of all given parameters."""
        return {one.key for _, given in self.entries for one in given}

    def named(self) -> list[tuple[dict[str, Any], list[tuple[str, Given]]]]:
        """Return ``(group, [(name, given parameter)])`` for each group."""
        groups = [{**group, "params": given} for group, given in self.entries]
        known = {id(one): self.known_names.get(one.key) for _, given in self.entries for one in given}
        names = group_names(groups, {key: name for key, name in known.items() if name is not None})
        return [
            (group, list(zip(of, given, strict=True))) for of, (group, given) in zip(names, self.entries, strict=True)
        ]

    def held(self, alive: dict[int, Tensor], param_groups: ParamGroups) -> tuple[list[NamedParams], NamedParams]:
        """Return the given parameters in ``alive``, with their names, by group of ``param_groups`` and in total.

        A group that is not remembered gets all of them, because it may hold any.
        """
        found = [(g, [(name, alive[one.key]) for name, one in named if one.key in alive]) for g, named in self.named()]
        everything = [pair for _, pairs in found for pair in pairs]
        return [next((p for g, p in found if g is group), everything) for group in param_groups], everything

    def alive(self, model: nn.Module | None) -> dict[int, Tensor]:
        """Return ``id -> parameter`` of the given parameters that ``model`` or any other object still holds."""
        keys = self.keys()
        found: dict[int, Tensor] = {}
        for source in ((model.parameters() if model is not None else ()), gc.get_objects()):
            found = {id(one): one for one in source if id(one) in keys and isinstance(one, Tensor)}
            if len(found) == len(keys):
                break
        return found

    def names_by_position(self, param_groups: ParamGroups) -> dict[int, str]:
        """Return ``id -> name`` of parameters that replaced given ones, such as master copies and swapped DTensors."""
        result = {}
        for group, named in self.named():
            live = next((g for g in param_groups if g is group), None)
            if live is None or len(live["params"]) != len(named):
                continue
            for param, (name, given) in zip(live["params"], named, strict=True):
                if id(param) != given.key and param.shape == given.shape and self.known_names.get(given.key):
                    result[id(param)] = name
        return result
