"""The strategy of DeepSpeed ZeRO, which finds the logical tensors in the engine's flat partitions.

It needs no handle of the engine, because DeepSpeed sets attributes on the given parameters, which
``tests/package/private_deepspeed.py`` lists. ``_dp_group`` marks a parameter of stage 1, stage 2 and BF16_Optimizer,
``_z3_optimizer`` a parameter of stage 3.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from am_lightning.distributed.call_stack import deepspeed_owner, deepspeed_replicas, inside_pipeline_engine
from am_lightning.distributed.given_params import GivenParams, NamedParams, ParamGroups
from am_lightning.distributed.shard import ShardInfo, TensorSlice, ranks_of
from am_lightning.distributed.strategies.strategy import Demand, LogicalParam, Strategy, Surroundings


class ZeroStrategy(Strategy):
    """DeepSpeed's engine puts flat partitions into the groups, and steps some of them at a time."""

    name = "DeepSpeed ZeRO"
    one_state_dtype = True
    partitioned = True
    engine = "deepspeed"
    clipping = "set gradient_clipping in its configuration"

    def __init__(self, surroundings: Surroundings) -> None:
        self._replaced, self._all_replaced = surroundings.replaced, surroundings.all_replaced

    def holds(self, param: Tensor) -> bool:
        return bool(self._all_replaced)

    def slices(self, param: Tensor, name: str, group_index: int) -> list[TensorSlice]:
        return flat_slices_of(param, self._replaced[group_index], self._all_replaced)

    @classmethod
    def replaces(cls, given: Tensor) -> bool:
        return hasattr(given, "_z3_optimizer") or hasattr(given, "_dp_group")

    @classmethod
    def replicas(cls) -> Any:
        return deepspeed_replicas()  # stage 0

    @classmethod
    def steps(cls, param_groups: ParamGroups) -> bool:
        return deepspeed_owner(param_groups) is not None

    @classmethod
    def check_engine(
        cls, param_groups: ParamGroups, given: GivenParams, model: nn.Module | None, *, attached: bool, replaced: bool
    ) -> None:
        if not attached:
            owner = deepspeed_owner(param_groups)
            if owner is None:
                return
            if inside_pipeline_engine():
                raise ValueError(
                    "adaptive memory does not support DeepSpeed's PipelineEngine, whose stages hold other tensors and "
                    "tied copies: use ZeRO, no PipelineModule"
                )
            check_supported(owner, given.held(given.alive(model), param_groups)[1])
        if not replaced:
            _check_copies(param_groups, given)

    @classmethod
    def check_demand(cls, params: Sequence[LogicalParam], demand: Demand) -> None:
        """Check that all tensors of the scope are in this call of step()."""
        if demand.scope == "tensor" or demand.whole_step:
            return
        here = {logical.name for logical in params}
        for names in demand.group_names:
            missing = sorted(set(names) - here)
            if missing and (demand.scope == "global" or not here.isdisjoint(names)):
                raise ValueError(
                    f"scope={demand.scope!r} needs the sums of {missing[0]!r}, but DeepSpeed calls step() for a part "
                    "of the parameters at a time: call am_lightning.deepspeed.attach(engine) after "
                    "deepspeed.initialize (the callback and the other attach functions do so), or use "
                    "scope='tensor'"
                )

    @classmethod
    def logical_ndims(cls, root: nn.Module) -> dict[int, int]:
        """Return the ndim of parameters that zero.Init has partitioned, which are 1-D here."""
        return {id(param): len(param.ds_shape) for param in root.parameters() if hasattr(param, "ds_shape")}


def _check_copies(param_groups: ParamGroups, given: GivenParams) -> None:
    """Raise an error for parameters that are neither given ones nor copies of them."""
    known = given.named()
    for group in param_groups:
        named = next((named for other, named in known if other is group), [])
        if [param.shape for param in group["params"]] != [one.shape for _, one in named]:
            raise ValueError(cannot_map(named, "any stage", "neither _dp_group nor _z3_optimizer is on it"))


def check_supported(owner: Any, given: NamedParams) -> None:
    """Check that the engine uses no feature that makes sums wrong or checkpoints impossible to resume.

    Args:
        owner: DeepSpeed's optimizer.
        given: names and parameters that the optimizer was given.

    Raises:
        ValueError: on every rank, because all have the same configuration, if a feature is not supported.
    """
    refused = [
        ("swap_optimizer", "NVMe offload of the optimizer", "offload to the CPU: offload_optimizer.device: cpu"),
        ("elastic_checkpoint", "elastic_checkpoint: true", "set it to false, and use universal checkpoints"),
        ("zenflow", "ZenFlow", "remove zenflow from zero_optimization"),
        ("torch_autocast_gradscaler", "torch_autocast in float16", "use bf16, or DeepSpeed's own fp16"),
    ]
    for attribute, what, hint in refused:
        if getattr(owner, attribute, None):
            raise ValueError(_refused(given, what, hint))
    for name, param in given:
        if getattr(param, "allreduce", True) is False:  # how DeepSpeed marks an expert
            raise ValueError(
                _refused([(name, param)], "mixture-of-experts layers", "use FSDP2, with experts as DTensors")
            )
        if getattr(param, "model_parallel", False) or getattr(param, "tensor_model_parallel", False):
            raise ValueError(_refused([(name, param)], "tensor parallelism", "use ZeRO alone, or FSDP2 with DTensors"))


def _refused(given: NamedParams, what: str, hint: str) -> str:
    name = given[0][0] if given else "(none)"
    return (
        f"adaptive memory does not support {what} of DeepSpeed {_version()} (first parameter: {name!r}): beta_t, or "
        f"its checkpoint, would be wrong. Cure: {hint}"
    )


def flat_slices_of(flat: Any, group: NamedParams, everything: NamedParams) -> list[TensorSlice]:
    """Return the logical tensors in ``flat``, the same list on every rank. Tensors of other ranks have empty spans.

    Args:
        flat: this rank's partition, as the engine put it into a parameter group.
        group: names and parameters that the group was given.
        everything: names and parameters that all groups were given.

    Raises:
        ValueError: if the tensors cannot be found.
    """
    engine: Any = next((param._z3_optimizer for _, param in everything if hasattr(param, "_z3_optimizer")), None)
    if engine is not None:
        return _slices_of_stage_3(engine, flat, everything)
    held = [(name, param) for name, param in group if hasattr(param, "_dp_group")]
    if held:
        return _slices_of_stages_1_and_2(flat, held)
    raise ValueError(cannot_map(group, "any stage", "neither _dp_group nor _z3_optimizer is on its parameters"))


def _slices_of_stage_3(engine: Any, flat: Any, everything: NamedParams) -> list[TensorSlice]:
    index = next((k for k, other in enumerate(engine.fp32_partitioned_groups_flat) if other is flat), None)
    if index is None:
        raise ValueError(cannot_map(everything, "stage 3", "fp32_partitioned_groups_flat does not hold its partition"))
    names = {id(param): name for name, param in everything}
    group = engine.sub_group_process_groups[index]
    rank, parts, start = dist.get_rank(group), [], 0
    for param in engine.fp16_groups[index]:
        if id(param) not in names:
            raise ValueError(cannot_map(everything, "stage 3", "fp16_groups holds a parameter it was never given"))
        size = param.partition_numel()
        real = max(0, min(size, param.ds_numel - rank * size))  # the rest is uninitialised padding
        parts.append(
            TensorSlice(
                names[id(param)], _shard_info(group, param.ds_numel, "ZeRO stage 3"), slice(start, start + real)
            )
        )
        start += size
    return parts


def _slices_of_stages_1_and_2(flat: Any, held: NamedParams) -> list[TensorSlice]:
    """Return the slices of stages 1 and 2, where parameters are views of one buffer and ``flat`` copies a slice of it.

    DeepSpeed's ``_hp_mapping`` is not used, because it is wrong if ``round_robin_gradients`` reorders the buffer.
    """
    name, first = held[0]
    storages = {param.data.untyped_storage().data_ptr() for _, param in held}
    if len(storages) != 1 or 0 in storages:
        raise ValueError(cannot_map(held, "stage 1 or 2", "its parameters are not views of one flat buffer"))
    group = first._dp_group
    begin = dist.get_rank(group) * flat.numel()
    parts = []
    for name, param in held:
        offset = param.data.storage_offset() - begin
        low, high = max(offset, 0), min(offset + param.numel(), flat.numel())
        span = slice(low, high) if high > low else slice(0, 0)
        parts.append(TensorSlice(name, _shard_info(group, param.numel(), "ZeRO stage 1 or 2"), span))
    return parts


def _shard_info(group: Any, numel: int, description: str) -> ShardInfo:
    return ShardInfo(ranks_of(group), True, lambda: (group,), numel, description)


def cannot_map(named: Sequence[tuple[str, object]], stage: str, why: str) -> str:
    """Return the text of an error with the parameter, DeepSpeed's version, the stage, the reason and a hint."""
    version = _version()
    name = named[0][0] if named else "(none)"
    return (
        f"the flat partition that holds parameter {name!r} (DeepSpeed {version}, {stage}) cannot be mapped to the "
        f"tensors in it: {why}. beta_t needs sums over whole tensors; use a DeepSpeed version that "
        "am-lightning[deepspeed] names, without wrappers around its optimizer"
    )


def _version() -> str:
    return str(getattr(sys.modules.get("deepspeed"), "__version__", "(not imported)"))
