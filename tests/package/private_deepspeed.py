"""The names that are read of DeepSpeed, also those without an underscore, because it documents few of them.

Only a running engine has them; ``tests/deepspeed/test_refusals.py`` starts one and checks them.
"""

from __future__ import annotations

from tests.package.private_names import Private

_ZERO = "am_lightning/distributed/strategies/deepspeed_zero.py"
_ENGINE = "am_lightning/deepspeed/engine.py"
_WEIGHTS = "am_lightning/pretrain/model/initial_weights.py"
_STAGE_1 = "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer"
_STAGE_3 = "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3"
_PARAM_1, _PARAM_3 = f"{_STAGE_1}.parameter", f"{_STAGE_3}.parameter"

_BOTH_STAGES = {
    "averaged_gradients": (_ENGINE, "read gradients whose step has not come"),
    "loss_scale": (_ENGINE, "divide these gradients as the engine will"),
    "clip_grad": (_ENGINE, "clip these gradients as the engine will"),
    "unscale_and_clip_grads": (_ENGINE, "learn the gradient norm that the engine clips by"),
    "overflow": (_ENGINE, "count the steps that the engine drops"),
    "elastic_checkpoint": (_ZERO, "refuse checkpoints that could not be resumed"),
    "zenflow": (_ZERO, "refuse ZenFlow, under which the sums would be wrong"),
    "torch_autocast_gradscaler": (_ZERO, "refuse torch_autocast in float16"),
}
_ONLY_STAGE_1 = {
    "cpu_offload": (_ENGINE, "know where these gradients are"),
    "single_partition_of_fp32_groups": (_ENGINE, "list the flat partitions"),
}
_ONLY_STAGE_3 = {
    "offload_optimizer": (_ENGINE, "know where these gradients are"),
    "fp32_partitioned_groups_flat": (_ENGINE, "list the flat partitions"),
    "fp16_groups": (_ZERO, "list the tensors in a flat partition"),
    "sub_group_process_groups": (_ZERO, "know the ranks that share a partition"),
    "sub_group_to_group_id": (_ENGINE, "know the parameter group of a partition"),
    "swap_optimizer": (_ZERO, "refuse offload to NVMe"),
}

DEEPSPEED = [
    *(Private(_STAGE_1, name, (file,), why) for name, (file, why) in (_BOTH_STAGES | _ONLY_STAGE_1).items()),
    *(Private(_STAGE_3, name, (file,), why) for name, (file, why) in (_BOTH_STAGES | _ONLY_STAGE_3).items()),
    Private(_PARAM_1, "_dp_group", (_ZERO,), "know a parameter in a flat partition, and its ranks"),
    Private(_PARAM_3, "_z3_optimizer", (_ZERO,), "reach the optimizer that holds a parameter's partition"),
    Private(_PARAM_3, "ds_numel", (_ZERO,), "know a tensor's size, for padding follows its last element"),
    Private(_PARAM_3, "partition_numel", (_ZERO,), "know the size of this rank's piece"),
    Private(_PARAM_3, "ds_shape", (_ZERO, _WEIGHTS), "know the shape of what is cut in pieces"),
    Private(_PARAM_3, "ds_id", (_WEIGHTS,), "know a parameter that ZeRO-3 has cut"),
    Private("deepspeed.DeepSpeedEngine", "data_parallel_group", ("am_lightning/distributed/call_stack.py", _ENGINE),
            "know the ranks whose gradients are averaged"),
]  # fmt: skip


def names_of(stage: int) -> tuple[list[str], list[str]]:
    """Return the names that DeepSpeed's optimizer of this stage must have, and those that a parameter must have."""
    optimizer, parameter = {1: (_STAGE_1, _PARAM_1), 3: (_STAGE_3, _PARAM_3)}[stage]
    return [row.name for row in DEEPSPEED if row.owner == optimizer], [
        row.name for row in DEEPSPEED if row.owner == parameter
    ]
