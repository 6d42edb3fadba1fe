"""Faults of layouts over ranks: what is summed, over which ranks, and what is refused."""

from __future__ import annotations

from tests.mutations.mutation import Mutation

_LAYOUT = "am_lightning/distributed/layout.py"
_DTENSOR = "am_lightning/distributed/strategies/dtensor.py"
_FSDP1 = "am_lightning/distributed/strategies/fsdp1.py"
_AGREEMENT = "am_lightning/distributed/consistency.py"
_PLACEMENT = "am_lightning/optim/param_layout.py"

_ONE_PROCESS = "tests/sharding/test_layouts.py::test_amadamw_is_that_of_one_process"
_SKIPS = "tests/sharding/test_faults.py::test_a_bad_gradient_on_one_rank_is_a_step_that_all_skip"
_REFUSALS = "tests/sharding/test_refusals.py"
_PIPELINE = "tests/sharding/test_pipeline.py"
_CHECKPOINTS = "tests/sharding/test_checkpoints.py"
_GENERIC_ZERO = "tests/sharding/test_zero_redundancy.py"

MUTATIONS = [
    Mutation(
        "no all-reduce of the sums",
        _LAYOUT,
        "dist.all_reduce(there, group=group)",
        "dist.get_rank(group)",
        (f"{_ONE_PROCESS}[fsdp2_without_mesh-2]",),
    ),
    Mutation(
        "the sums are averaged, not added",
        _LAYOUT,
        "return there.to(vector.device)",
        "return there.to(vector.device) / dist.get_world_size(group)",
        (f"{_PIPELINE}::test_clipping_over_the_stages[alone-2]",),
    ),
    Mutation(
        "replicas' sums are all counted",
        _LAYOUT,
        "return replica == 0 and shard.is_owner and",
        "return shard.is_owner and",
        ("tests/sharding/test_clip.py::test_as_torch_clips_in_one_process[ddp-2]",),
    ),
    Mutation(
        "a tensor that every slice of a larger mesh holds is counted in each",
        _LAYOUT,
        "shard.is_owner and min(ranks) in shard.ranks",
        "shard.is_owner",
        (f"{_ONE_PROCESS}[fsdp2_tp_sequence-4]",),
    ),
    Mutation(
        "a sum that is not finite is dropped on the ranks that do not count it",
        _LAYOUT,
        "packed.masked_fill(uncounted & packed.isfinite(), 0)",
        "packed.masked_fill(uncounted, 0)",
        (f"{_SKIPS}[ddp-2-nan-gradient]",),
    ),
    Mutation(
        "ranks do not compare their tensors at the first step",
        _LAYOUT,
        "check_agreement(params, numels, reduction.groups)",
        "del params, numels",
        (f"{_REFUSALS}::test_one_rank_of_fsdp2_with_another_model[2-count]",),
    ),
    Mutation(
        "a rank assumes that it holds the whole model, though others hold other parts",
        _LAYOUT,
        "if covered != world_size():",
        "if covered > world_size():",
        (f"{_REFUSALS}::test_a_mesh_that_leaves_ranks_out",),
    ),
    Mutation(
        "no warning is given if replicas are not named",
        _LAYOUT,
        "if not (reductions or pipeline_group or others_hold_the_rest) and world_size() > 1:",
        "if not (reductions or pipeline_group or others_hold_the_rest) and world_size() > 8:",
        (f"{_REFUSALS}::test_copies_are_warned_of_once_until_they_are_named",),
    ),
    Mutation(
        "DTensor: a replicated piece is counted on every rank",
        _DTENSOR,
        "is_owner = all(c == 0 or isinstance(p, splits) for c, p in copies)",
        "is_owner = all(c >= 0 or isinstance(p, splits) for c, p in copies)",
        (f"{_ONE_PROCESS}[tp_sequence-2]",),
    ),
    Mutation(
        "DTensor: a Partial gradient is used as it is",
        _DTENSOR,
        "grad.placements != param.placements:",
        "grad.device_mesh != param.device_mesh:",
        (f"{_ONE_PROCESS}[tp_sequence-2]",),
    ),
    Mutation(
        "DTensor: a Partial parameter is accepted",
        _DTENSOR,
        "if not isinstance(placement, (*splits, Replicate)):",
        "if not isinstance(placement, (*splits, Replicate, object)):",
        (f"{_REFUSALS}::test_a_partial_parameter[2-tensor]",),
    ),
    Mutation(
        "FSDP1: every rank of NO_SHARD counts its copy",
        _FSDP1,
        "return ShardInfo(ranks_of(group), dist.get_rank(group) == 0, lambda: (group,), None, description)",
        "return ShardInfo(ranks_of(group), True, lambda: (group,), None, description)",
        (f"{_ONE_PROCESS}[fsdp1_no_shard-2]",),
    ),
    Mutation(
        "FSDP1: the copies of a hybrid shard are summed with it, and all counted",
        _FSDP1,
        "return ShardInfo(product, dist.get_rank(copies) == 0, lambda",
        "return ShardInfo(product, True, lambda",
        (f"{_ONE_PROCESS}[fsdp1_hybrid-4]",),
    ),
    Mutation(
        "FSDP1: a flat parameter's tensors begin at their place in the whole, not in the shard",
        _FSDP1,
        "span = slice(info.offset_in_shard, info.offset_in_shard + info.numel_in_shard)",
        "span = slice(start, start + info.numel_in_shard)",
        (f"{_ONE_PROCESS}[fsdp1_flat-2]",),
    ),
    Mutation(
        "names are left out of the comparison between ranks",
        _AGREEMENT,
        "_number((logical.name, logical.shard.numel, logical.group_index))",
        "_number((logical.shard.numel, logical.group_index))",
        (f"{_REFUSALS}::test_replicas_with_another_model[name-(2,)]",),
    ),
    Mutation(
        "shards that do not add up are accepted",
        _AGREEMENT,
        "if total != expected:",
        "if total < 0:",
        (f"{_REFUSALS}::test_shards_that_do_not_add_up",),
    ),
    Mutation(
        "pipeline stages do not pool their sums",
        "am_lightning/distributed/layout.py",
        "None if pipeline_group is None else self.reduce_over_stages",
        "None",
        (f"{_PIPELINE}::test_with_the_group_of_the_stages[alone-2-global-adamw]",),
    ),
    Mutation(
        "a pipeline stage with other scopes or groups is not noticed",
        _LAYOUT,
        "check_stages(description, self.pipeline_group, device)",
        "del device",
        (f"{_PIPELINE}::test_stages_with_other_numbers_of_groups",),
    ),
    Mutation(
        "a new replica group is not used, because the layout is kept",
        _PLACEMENT,
        "self._replica_group = group\n        self.drop()",
        "self._replica_group = group",
        (f"{_REFUSALS}::test_copies_are_warned_of_once_until_they_are_named",),
    ),
    Mutation(
        "a load that one rank alone refuses does not say which",
        "am_lightning/optim/state_dict_checks.py",
        "if world_size() == 1:",
        "if world_size() >= 1:",
        (f"{_CHECKPOINTS}::test_a_piece_that_one_rank_alone_refuses[exp_avg_sq--1.0--1]",),
    ),
    Mutation(
        "a sharded state of another placement is loaded",
        "am_lightning/optim/state_dict_checks.py",
        "if placement_of(value) != placement_of(param):",
        "if (placement_of(value) is None) != (placement_of(param) is None):",
        (f"{_CHECKPOINTS}::test_a_state_of_another_placement_or_model_is_refused",),
    ),
    Mutation(
        "a sum over several tensors is formed inside ZeroRedundancyOptimizer",
        _LAYOUT,
        "if self.others_hold_the_rest:",
        "if self.others_hold_the_rest and self.reductions:",
        (f"{_GENERIC_ZERO}::test_sums_over_several_tensors_are_refused[2-global-adamw]",),
    ),
    Mutation(
        "a log looks for a checkpoint's own step at every step",
        "am_lightning/loggers/step_logger.py",
        "self._had_state = bool(optimizer.state)",
        "self._had_state = False",
        ("tests/sharding/test_call_stack.py::test_no_step_after_the_first_walks_the_stack[tensor lr-True]",),
    ),
    Mutation(
        "flat partitions count as plain tensors",
        "am_lightning/distributed/strategies/__init__.py",
        "strategy.engine in sys.modules",
        "strategy.engine is None and strategy.engine in sys.modules",
        ("tests/deepspeed/test_stages.py::test_each_tensor_has_its_own_beta[stage=2]",),
    ),
    Mutation(
        "the engine is searched for on the call stack, although attach was given it",
        "am_lightning/optim/param_layout.py",
        "self._attached, self._averaging_group = True, averaging_group",
        "self._attached, self._averaging_group = False, averaging_group",
        ("tests/deepspeed/test_stages.py::test_the_call_stack_is_looked_at_once[2]",),
    ),
]
