"""The strategy of FullyShardedDataParallel (FSDP1), whose handles know more than its parameters show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from am_lightning.distributed.names import strip_wrappers
from am_lightning.distributed.shard import ShardInfo, TensorSlice, my_rank, ranks_of, world_size
from am_lightning.distributed.strategies.strategy import Demand, LogicalParam, Strategy, Surroundings

BIND_THE_MODEL = (
    "call optimizer.bind_model(model) with the FSDP module first (the AdaptiveMemory callback and the attach functions "
    "do so)"
)


class FSDP1Strategy(Strategy):
    """FSDP1, whose module knows the process groups and whose parameters do not."""

    name = "FSDP1"
    one_state_dtype = True

    def __init__(self, surroundings: Surroundings) -> None:
        self._managed = managed_parameters(surroundings.model)

    def holds(self, param: Tensor) -> bool:
        return is_managed(param)

    def slices(self, param: Tensor, name: str, group_index: int) -> list[TensorSlice]:
        found = self._managed.get(id(param)) or without_model(param)
        return [replace(one, name=one.name or name) for one in found]

    @classmethod
    def check_demand(cls, params: Sequence[LogicalParam], demand: Demand) -> None:
        if demand.scope == "tensor":
            _refuse_flat(params)
        elif any(logical.shard.numel is None for logical in params) and (
            demand.exact_sums or any(logical.shard.description == "plain" for logical in params)
        ):
            raise ValueError(
                f"scope={demand.scope!r} needs FSDP1's process groups here, because copies of a shard would be counted "
                f"more often than other parameters or the loss: {BIND_THE_MODEL}"
            )

    @classmethod
    def check_exact(cls, params: Sequence[LogicalParam]) -> None:
        if any(logical.shard.numel is None for logical in params):
            raise ValueError(
                "the optimizer does not know FSDP1's process groups, so it cannot distinguish copies of a shard from "
                f"shards: {BIND_THE_MODEL}"
            )

    @classmethod
    def logical_ndims(cls, root: nn.Module) -> dict[int, int]:
        return _ndims_of_views(root)


def is_managed(param: Tensor) -> bool:
    """Return whether ``param`` is FSDP1's flat parameter, or an original one shown with ``use_orig_params=True``."""
    return bool(getattr(param, "_fsdp_flattened", False))


def is_flat_parameter(param: Tensor) -> bool:
    """Return whether ``param`` is a flat parameter, which the optimizer gets with ``use_orig_params=False``."""
    return is_managed(param) and hasattr(param, "_fqns")


def managed_parameters(model: nn.Module | None) -> dict[int, list[TensorSlice]]:
    """Return ``id(parameter) -> tensors in it`` of all FSDP modules in ``model``.

    The name of a tensor is empty if the parameter shows this tensor only.

    Raises:
        ValueError: if FSDP1 wraps tensor-parallel parameters, whose other split it hides.
    """
    if model is None or not any(is_managed(p) for p in model.parameters()):
        return {}
    from torch.distributed.fsdp import FullyShardedDataParallel

    result: dict[int, list[TensorSlice]] = {}
    for path, module in model.named_modules():
        handle = module._handle if isinstance(module, FullyShardedDataParallel) else None
        if handle is None:
            continue
        flat = handle.flat_param
        prefix = strip_wrappers(f"{path}.") if path else ""
        _refuse_tensor_parallel(flat, prefix)
        shard = _shard_info(module, handle)
        if flat._params is None:
            result[id(flat)] = list(_tensors_in(flat, prefix, shard))
            continue
        for param, numel in zip(flat._params, flat._numels, strict=True):
            result[id(param)] = [TensorSlice("", replace(shard, numel=numel))]
    return result


def without_model(param: Any) -> list[TensorSlice]:
    """Return the tensors without the model, summed over all ranks. Copies under HYBRID_SHARD cancel in N / D."""
    shard = ShardInfo(frozenset(range(world_size())), True, tuple, None, "FSDP1, groups not known")
    if not is_flat_parameter(param):
        return [TensorSlice("", shard)]
    _refuse_tensor_parallel(param, "")
    return [replace(one, shard=shard) for one in _tensors_in(param, "", shard)]


def _shard_info(module: Any, handle: Any) -> ShardInfo:
    group = handle.process_group
    copies = module._inter_node_pg if "HYBRID" in module.sharding_strategy.name else None
    description = f"FSDP1 {module.sharding_strategy.name}"
    if not handle.uses_sharded_strategy:  # NO_SHARD: every rank holds all elements
        return ShardInfo(ranks_of(group), dist.get_rank(group) == 0, lambda: (group,), None, description)
    if copies is None or dist.get_world_size(copies) == 1:
        return ShardInfo(ranks_of(group), True, lambda: (group,), None, description)
    product = ranks_of(group) | ranks_of(copies)
    if len(ranks_of(group)) * len(ranks_of(copies)) == world_size():
        product = frozenset(range(world_size()))
    return ShardInfo(product, dist.get_rank(copies) == 0, lambda: (group, copies), None, description)


def _tensors_in(flat: Any, prefix: str, shard: ShardInfo) -> Iterator[TensorSlice]:
    """Yield the logical tensors of a FlatParameter with their spans in this rank's shard, without the padding."""
    for fqn, numel, info in zip(flat._fqns, flat._numels, flat._shard_param_infos, strict=True):
        span = slice(0, 0)
        if info.in_shard:
            span = slice(info.offset_in_shard, info.offset_in_shard + info.numel_in_shard)
        yield TensorSlice(prefix + strip_wrappers(fqn), replace(shard, numel=numel), span)


def _refuse_tensor_parallel(flat: Any, prefix: str) -> None:
    for fqn, extension in zip(flat._fqns, flat._param_extensions or (), strict=False):
        if extension is not None:
            raise ValueError(
                f"parameter {prefix + fqn!r} is split by tensor parallel and again by FSDP1 (rank {my_rank()}), which "
                "hides the first split from the optimizer. Use FSDP2 (torch.distributed.fsdp.fully_shard; in Lightning "
                "ModelParallelStrategy), which is supported together with tensor parallel"
            )


def _refuse_flat(params: Sequence[LogicalParam]) -> None:
    """Raise an error for flat parameters, because FSDP1 saves one 0-dim state for all tensors in them."""
    names: dict[int, str] = {}
    for logical in params:
        if id(logical.param) in names and logical.strategy is FSDP1Strategy:
            raise ValueError(
                f"parameters {names[id(logical.param)]!r} and {logical.name!r} are in one flat parameter (FSDP1 with "
                "use_orig_params=False), which has one state for both: scope='tensor' cannot be saved and resumed. "
                "Set use_orig_params=True (Lightning: the default; Accelerate: fsdp_use_orig_params: true), or use "
                "scope='global' or 'group'"
            )
        names[id(logical.param)] = logical.name


def _ndims_of_views(root: nn.Module) -> dict[int, int]:
    """Return ``id(parameter) -> ndim`` of the parameters that FSDP1 shows as flat 1-D views."""
    managed = {id(param): name for name, param in root.named_parameters() if is_managed(param)}
    if not managed:
        return {}
    from torch.distributed.fsdp import FullyShardedDataParallel

    result = {}
    for module in FullyShardedDataParallel.fsdp_modules(root):
        handle = module._handle
        if handle is not None and handle.flat_param._params is not None:
            shapes = zip(handle.flat_param._params, handle.flat_param._shapes, strict=True)
            result.update({id(param): len(shape) for param, shape in shapes})
    unknown = [name for key, name in managed.items() if key not in result]
    if unknown:
        raise ValueError(
            f"FSDP1 does not give the shape of parameter {strip_wrappers(unknown[0])!r}, which decides whether it gets "
            "weight decay: give the FSDP module itself, not one inside it (Lightning: self or self.trainer.model), "
            "built with use_orig_params=True"
        )
    return result
