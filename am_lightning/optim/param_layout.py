"""Which tensors an optimizer holds, what they are called, and how their sums are reduced over ranks."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple

from torch import Size, Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import Optimizer

from am_lightning.distributed import LogicalParam, ShardLayout, logical_params_of
from am_lightning.distributed.call_stack import (
    deepspeed_owner,
    deepspeed_replicas,
    inside_pipeline_engine,
    inside_zero_redundancy,
)
from am_lightning.distributed.names import group_names, names_by_id
from am_lightning.distributed.strategies import deepspeed_zero as zero
from am_lightning.optim.validation import check_process_group, described


class Given(NamedTuple):
    """What is kept of a parameter that a group was given: no reference, for it may be a whole model before sharding.

    A weak one would do, but torch swaps no tensor that has one, as module.to() does under FSDP2.
    """

    key: int  # id
    shape: Size | None  # None where it is not known yet

    @classmethod
    def of(cls, param: Tensor) -> Given:
        return cls(id(param), None if is_lazy(param) else param.shape)


Named = list[tuple[str, Given]]


class PlacedOptimizer(Optimizer):
    """An optimizer that knows the logical tensors behind its parameters; a layout is built at the first step.

    DeepSpeed ZeRO puts flat partitions into the groups and calls ``step()`` with some of them at a time: what the
    groups were given is remembered, and there is one layout for each such call.
    """

    scope: str

    def _forget_placement(self) -> None:
        self._replica_group: Any = None
        self._pipeline_group: Any = None
        self._model: nn.Module | None = None
        self._known_names: dict[int, str] = {}
        self._layouts: dict[Hashable, ShardLayout] = {}
        self._layout: ShardLayout | None = None  # of the step that runs, or of the last one
        self.pre_pass: Callable[[ShardLayout], Any] | None = None  # DeepSpeed's: sums and decision for a layout
        # Groups and what each was given: Accelerate's FSDP2 puts other parameters in their place, and so does ZeRO
        self._given: list[tuple[dict[str, Any], list[Given]]] = []
        self._partitioned: dict[int, Tensor] = {}  # id -> given parameter of ZeRO's, which its engine keeps
        self._not_partitioned: Hashable = None  # parameters of which no engine was found: looking takes 0.1 s

    @property
    def replica_group(self) -> Any:
        """Process group whose ranks hold the same parameters (DDP); the first one's sums serve all. Not saved.

        Setting it raises TypeError for what is no process group.
        """
        return self._replica_group

    @replica_group.setter
    def replica_group(self, group: Any) -> None:
        check_process_group("replica_group", group)
        self._replica_group = group
        self._forget_layout()

    @property
    def pipeline_group(self) -> Any:
        """Process group of one rank of each pipeline stage, this one included. Not saved.

        With it ``scope="global"`` (and "group") sums over the stages and a step that one stage skips is skipped by all,
        for one more small collective a step; without it only ``scope="tensor"`` serves a pipeline. Setting it raises
        TypeError for what is no process group.
        """
        return self._pipeline_group

    @pipeline_group.setter
    def pipeline_group(self, group: Any) -> None:
        check_process_group("pipeline_group", group)
        self._pipeline_group = group
        self._forget_layout()

    def name_parameters(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Give unnamed parameters the names of ``module.named_parameters()``, for ``momentum`` and messages.

        Args:
            named_parameters: (name, parameter) pairs; parameters that this optimizer does not have are ignored.
        """
        self._known_names = names_by_id(named_parameters)
        self._forget_layout()

    def bind_model(self, model: nn.Module) -> None:
        """Give the optimizer the module whose parameters it has: their names, and FSDP1's process groups.

        The callback and the ``attach`` functions do so. Not saved.

        Args:
            model: the outermost module, as it is trained (wrapped by FSDP or DDP).

        Raises:
            TypeError: ``model`` is no torch.nn.Module.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"Invalid model: {type(model).__name__} (model must be a torch.nn.Module)")
        self._model = model
        self.name_parameters(model.named_parameters())

    def parameter_names(self) -> list[str]:
        """The distinct name of each parameter, in the order of the groups, as ``momentum`` uses them.

        A flat parameter (FSDP1 with ``use_orig_params=False``, DeepSpeed ZeRO) has the names of the tensors in it.
        """
        if self.is_partitioned():
            return [name for _, named in self._given_names() for name, _ in named]
        return [row.name for row in self._rows()]

    # ------------------------------------------------------------------ what the groups were given
    def _remember_given(self) -> None:
        """Keep what groups that are new were given."""
        known = {id(group) for group, _ in self._given}
        for group in self.param_groups:
            if id(group) not in known:
                self._given.append((group, [Given.of(param) for param in group["params"]]))

    def _replace_groups(self, old: list[dict[str, Any]]) -> None:
        """torch.optim's load_state_dict has made new groups, in the order of the old ones."""
        new = {id(before): after for before, after in zip(old, self.param_groups, strict=True)}
        self._given = [(new.get(id(group), group), given) for group, given in self._given]

    def _take_present_as_given(self) -> None:
        """Let go of parameters that others took the place of: they may be a whole model before it was sharded."""
        self._known_names |= self._names_by_place()
        self._given = []
        self._remember_given()

    def given_groups(self) -> list[dict[str, Any]]:
        """Every parameter group that was given parameters, also while an engine shows only some of them."""
        return [group for group, given in self._given if given]

    def _given_names(self) -> list[tuple[dict[str, Any], Named]]:
        groups = [{**group, "params": given} for group, given in self._given]
        known = {id(one): self._known_names.get(one.key) for _, given in self._given for one in given}
        names = group_names(groups, {key: name for key, name in known.items() if name is not None})
        return [
            (group, list(zip(of, given, strict=True))) for of, (group, given) in zip(names, self._given, strict=True)
        ]

    @staticmethod
    def _with_parameters(given: list[tuple[dict[str, Any], Named]], known: dict[int, Tensor]) -> list[tuple[Any, Any]]:
        """``(group, [(name, parameter)])`` of the parameters that are ``known``."""
        return [(group, [(name, known[one.key]) for name, one in named if one.key in known]) for group, named in given]

    def is_partitioned(self) -> bool:
        """ZeRO keeps the given parameters, and has put flat partitions of its own in their place."""
        if "deepspeed" not in sys.modules:
            return False
        keys = self._given_keys()
        if any(id(param) in keys for param in self._parameters()):
            return False
        looked = tuple(map(id, self._parameters())), frozenset(keys)
        if not self._partitioned and looked != self._not_partitioned:
            found = self._alive()
            self._partitioned = found if any(zero.is_partitioned(param) for param in found.values()) else {}
            self._not_partitioned = looked if looked[0] and not self._partitioned else None
        return bool(self._partitioned)

    def _given_keys(self) -> set[int]:
        return {one.key for _, given in self._given for one in given}

    def _alive(self) -> dict[int, Tensor]:
        """``id -> parameter`` of the given ones that somebody holds, as DeepSpeed's engine does."""
        keys = self._given_keys()
        for source in ((self._model.parameters() if self._model is not None else ()), gc.get_objects()):
            found = {id(one): one for one in source if id(one) in keys and isinstance(one, Tensor)}
            if len(found) == len(keys):
                break
        return found

    # ------------------------------------------------------------------ rows and layouts
    def _rows(self) -> list[LogicalParam]:
        """Known before the layout is built, without a collective."""
        layout = self._layouts.get(self._key())
        return self._lay_out()[0] if layout is None else layout.logical_params

    def _lay_out(self) -> tuple[list[LogicalParam], list[int]]:
        parts = self._partitions() if self.is_partitioned() else {}
        names = {**self._names_by_place(), **self._known_names}
        return logical_params_of(self.param_groups, model=self._model, known_names=names, partitions=parts)

    def _partitions(self) -> dict[int, list[zero.FlatSlice]]:
        """``id(flat) -> parts``."""
        given = self._with_parameters(self._given_names(), self._partitioned)
        everything = [entry for _, named in given for entry in named]
        found = {}
        for group in self.param_groups:
            named = next((named for known, named in given if known is group), everything)
            for flat in group["params"]:
                found[id(flat)] = zero.flat_slices_of(flat, named, everything)
        return found

    def _names_by_place(self) -> dict[int, str]:
        """Names of parameters that took the place of given ones: master copies, swapped DTensors."""
        result = {}
        for group, named in self._given_names():
            live = next((g for g in self.param_groups if g is group), None)
            if live is None or len(live["params"]) != len(named):
                continue
            for param, (name, given) in zip(live["params"], named, strict=True):
                if id(param) != given.key and param.shape == given.shape and self._known_names.get(given.key):
                    result[id(param)] = name
        return result

    def _parameters(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _key(self) -> Hashable:
        """What a layout is of: the parameters, how many each group has, and their devices and dtypes.

        A model may be moved or cast in place. DeepSpeed moves its partitions to and fro, which changes nothing.
        """
        groups = [group["params"] for group in self.param_groups]
        ids = tuple(number for params in groups for number in (len(params), *map(id, params)))
        if self._partitioned:
            return ids
        try:
            return ids, tuple([(param.device, param.dtype) for params in groups for param in params])
        except AttributeError:
            self._checked_parameters()  # one is no tensor: says which
            raise

    @property
    def layout(self) -> ShardLayout | None:
        """Rows and reductions of the last step; None before the first. Not collective."""
        return self._layout

    def describe(self) -> str:
        """Rows, reductions and kernels of the steps so far, in words; of every ``step()`` call that an engine makes."""
        text = "; then ".join(layout.describe() for layout in self._layouts.values())
        return f"{text}{self._kernels_in_words()}" if text else "no step made yet"

    def _kernels_in_words(self) -> str:
        """What the last step ran, after the rows."""
        return ""

    def _find_layout(self) -> ShardLayout:
        """The layout of the parameters as they are; see ``current_layout``."""
        layout = self._layouts.get(self._key())
        if layout is None:
            self._check_time()
            self._check_engine()
            rows, sizes = self._lay_out()
            replicas = self._replica_group
            if not self.is_partitioned():
                self._forget_layout()
                self._take_present_as_given()
                replicas = replicas or deepspeed_replicas()  # stage 0
            layout = ShardLayout.build(
                rows,
                sizes,
                replica_group=replicas,
                pipeline_group=self._pipeline_group,
                others_hold_the_rest=inside_zero_redundancy(self),
            )
            self._check_scope(layout)
            self._layouts[self._key()] = layout
        self._layout = layout
        return layout

    def _check_time(self) -> None:
        """Refuse to make a layout now."""

    def _checked_parameters(self) -> list[Tensor]:
        """All parameters, looked at as ``add_param_group`` does: whoever changes groups by hand goes around it."""
        holder: dict[int, int] = {}
        for index, group in enumerate(self.param_groups):
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
        return self._parameters()

    def _check_engine(self) -> None:
        """Under DeepSpeed: every parameter is a given one, a copy of one in its place, or a partition of known kind.

        Raises:
            ValueError: it is none of these, or the engine has a feature that is not supported.
        """
        owner = deepspeed_owner(self)
        if owner is None:
            return
        self._not_partitioned = None  # there is an engine
        given = self._given_names()
        if inside_pipeline_engine():
            raise ValueError(
                "adaptive memory does not support DeepSpeed's PipelineEngine, whose stages hold other tensors and tied "
                "copies: use ZeRO, no PipelineModule"
            )
        held = self._with_parameters(given, self._alive())
        zero.check_supported(owner, [entry for _, named in held for entry in named])
        if self.is_partitioned():
            return
        for group in self.param_groups:
            named = next((named for known, named in given if known is group), [])
            shapes = [one.shape for _, one in named]
            if [param.shape for param in group["params"]] != shapes:
                raise ValueError(zero.cannot_map(named, "any stage", "neither _dp_group nor _z3_optimizer is on it"))

    def _forget_layout(self) -> None:
        self._layouts, self._layout = {}, None

    def _check_scope(self, layout: ShardLayout) -> None:
        """Refuse a scope whose sums this layout cannot form, before anything moves."""
        groups = f" with {len(layout.sizes)} parameter groups" if self.scope == "group" else ""
        layout.check_stages(f"scope={self.scope!r}{groups}")
        if self.scope == "tensor":
            self._refuse_flat(layout)
            return
        if self.pre_pass is None and any(row.partitioned for row in layout.logical_params):
            self._check_partitioned_scope(layout)
        if not layout.sizes_known and (
            self._needs_exact_sums() or any(row.shard.description == "plain" for row in layout.logical_params)
        ):
            raise ValueError(
                f"scope={self.scope!r} needs FSDP1's process groups here, for copies of a shard would be counted more "
                "often than other parameters or the loss: call optimizer.bind_model(model) with the FSDP module first "
                "(the AdaptiveMemory callback and the attach functions do so)"
            )
        layout.check_whole_model(f"scope={self.scope!r}")

    def _needs_exact_sums(self) -> bool:
        """Sums, and not only their ratio, decide beta_t."""
        return False

    def _check_partitioned_scope(self, layout: ShardLayout) -> None:
        """The tensors of the scope must all be in this call of step()."""
        here = {row.name for row in layout.logical_params}
        for _, named in self._given_names():
            wanted = {name for name, _ in named}
            if wanted & here or self.scope == "global":
                missing = sorted(wanted - here)
                if missing:
                    raise ValueError(
                        f"scope={self.scope!r} needs the sums of {missing[0]!r}, but DeepSpeed calls step() for a part "
                        "of the parameters at a time: call am_lightning.deepspeed.attach(engine) after "
                        "deepspeed.initialize (the callback and the other attach functions do so), or use "
                        "scope='tensor'"
                    )

    def _refuse_flat(self, layout: ShardLayout) -> None:
        """A flat parameter of FSDP1 has one 0-dim state, not one for each of its tensors; FSDP1 saves no more."""
        rows: dict[int, str] = {}
        for row in layout.logical_params:
            if id(row.param) in rows and not row.partitioned:
                raise ValueError(
                    f"parameters {rows[id(row.param)]!r} and {row.name!r} are in one flat parameter (FSDP1 with "
                    "use_orig_params=False), which has one state for both: scope='tensor' cannot be saved and resumed. "
                    "Set use_orig_params=True (Lightning: the default; Accelerate: fsdp_use_orig_params: true), or use "
                    "scope='global' or 'group'"
                )
            rows[id(row.param)] = row.name
