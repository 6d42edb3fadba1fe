"""What parameter groups were given, before an engine or a wrapper replaced the parameters."""

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
    """What is kept of a parameter: no reference, because it may be of a whole model before sharding.

    A weak one would do, but torch swaps no tensor that has one, as module.to() does under FSDP2.
    """

    key: int  # id
    shape: Size | None  # None where it is not known yet

    @classmethod
    def of(cls, param: Tensor) -> Given:
        return cls(id(param), None if is_lazy(param) else param.shape)


class GivenParams:
    """The parameters that each group was given, and their names.

    Accelerate's FSDP2 replaces them by sharded parameters, DeepSpeed by master copies or flat partitions.

    Attributes:
        entries: each group, and what it was given.
        known_names: ``id(parameter) -> name``, of parameters that were given without one.
    """

    def __init__(self) -> None:
        self.entries: list[tuple[dict[str, Any], list[Given]]] = []
        self.known_names: dict[int, str] = {}

    def remember(self, param_groups: ParamGroups) -> None:
        """Keep what groups that are new were given."""
        known = {id(group) for group, _ in self.entries}
        for group in param_groups:
            if id(group) not in known:
                self.entries.append((group, [Given.of(param) for param in group["params"]]))

    def replace_groups(self, old: ParamGroups, new: ParamGroups) -> None:
        """torch.optim's load_state_dict has made ``new`` groups, in the order of the ``old`` ones."""
        successors = {id(before): after for before, after in zip(old, new, strict=True)}
        self.entries = [(successors.get(id(group), group), given) for group, given in self.entries]

    def take_present(self, param_groups: ParamGroups) -> None:
        """From now on the present parameters are the given ones; names of those before them pass on to them."""
        self.known_names |= self.names_by_position(param_groups)
        self.entries = []
        self.remember(param_groups)

    @property
    def groups(self) -> list[dict[str, Any]]:
        """Every group that is remembered, also while an engine shows only some of them."""
        return [group for group, _ in self.entries]

    def filled_groups(self) -> list[dict[str, Any]]:
        """Those of ``groups`` that were given parameters."""
        return [group for group, given in self.entries if given]

    def group_of_each(self) -> list[dict[str, Any]]:
        """The group of each given parameter."""
        return [group for group, given in self.entries for _ in given]

    def keys(self) -> set[int]:
        """ids of all given parameters."""
        return {one.key for _, given in self.entries for one in given}

    def named(self) -> list[tuple[dict[str, Any], list[tuple[str, Given]]]]:
        """``(group, [(name, given parameter)])``."""
        groups = [{**group, "params": given} for group, given in self.entries]
        known = {id(one): self.known_names.get(one.key) for _, given in self.entries for one in given}
        names = group_names(groups, {key: name for key, name in known.items() if name is not None})
        return [
            (group, list(zip(of, given, strict=True))) for of, (group, given) in zip(names, self.entries, strict=True)
        ]

    def held(self, alive: dict[int, Tensor], param_groups: ParamGroups) -> tuple[list[NamedParams], NamedParams]:
        """Names and parameters of those given ones that are ``alive``: for each of ``param_groups``, and of all.

        A group that is not remembered may hold any of them.
        """
        found = [(g, [(name, alive[one.key]) for name, one in named if one.key in alive]) for g, named in self.named()]
        everything = [pair for _, pairs in found for pair in pairs]
        return [next((p for g, p in found if g is group), everything) for group in param_groups], everything

    def alive(self, model: nn.Module | None) -> dict[int, Tensor]:
        """``id -> parameter`` of the given ones that somebody holds: ``model``, or an engine."""
        keys = self.keys()
        found: dict[int, Tensor] = {}
        for source in ((model.parameters() if model is not None else ()), gc.get_objects()):
            found = {id(one): one for one in source if id(one) in keys and isinstance(one, Tensor)}
            if len(found) == len(keys):
                break
        return found

    def names_by_position(self, param_groups: ParamGroups) -> dict[int, str]:
        """``id -> name`` of parameters that replaced given ones: master copies, swapped DTensors."""
        result = {}
        for group, named in self.named():
            live = next((g for g in param_groups if g is group), None)
            if live is None or len(live["params"]) != len(named):
                continue
            for param, (name, given) in zip(live["params"], named, strict=True):
                if id(param) != given.key and param.shape == given.shape and self.known_names.get(given.key):
                    result[id(param)] = name
        return result
