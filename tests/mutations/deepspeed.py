"""Faults under DeepSpeed: the offsets of tensors in its flat partitions, and sums that span several calls of step()."""

from __future__ import annotations

from tests.mutations.mutation import Mutation

_ATTACH = "am_lightning/deepspeed/engine.py"
_ZERO = "am_lightning/distributed/strategies/deepspeed_zero.py"
_SCALARS = "am_lightning/optim/state_store.py"
_PERSISTENCE = "am_lightning/optim/state_store.py"
_BASE = "am_lightning/optim/base.py"

_TENSOR = "tests/deepspeed/test_stages.py::test_each_tensor_has_its_own_beta"
_SHARED = "tests/deepspeed/test_stages.py::test_scopes_that_span_several_calls"
_REFUSED = "tests/deepspeed/test_refusals.py::test_refused_on_every_rank_before_anything_moves"
_RESUMED = "tests/deepspeed/test_checkpoints.py::test_resumed_at_the_same_number_of_ranks"

MUTATIONS = [
    Mutation(
        "all objects of the process are searched whenever momentum is read before the first step",
        "am_lightning/optim/param_layout.py",
        "if looked == self._without_engine:",
        "if looked is None:",
        ("tests/optim/test_deepspeed_loaded.py::test_an_engine_is_looked_for_once",),
    ),
    Mutation(
        "ZeRO 3: an engine that was searched for while its groups were empty is never found",
        "am_lightning/optim/param_layout.py",
        "looked if found is None and looked[0] else None",
        "looked if found is None else None",
        ("tests/optim/test_deepspeed_loaded.py::test_nothing_is_remembered_of_empty_groups",),
    ),
    Mutation(
        "Lightning's callback: an optimizer that DeepSpeed's engine never steps is accepted",
        "am_lightning/lightning/trainer_patches.py",
        "if [unwrap_optimizer(optimizer) for optimizer in optimizers] != [own]:",
        "if not isinstance(own, Optimizer):",
        ("tests/deepspeed/test_successors.py::test_lightning_refuses_what_would_never_step[assigned]",),
    ),
    Mutation(
        "ZeRO 3: a gradient whose square overflows spoils the partition that has it",
        "am_lightning/optim/kernels/cpu/chunked.py",
        'fits = float(c.a.amax()) < too_large(c.stored["v"].dtype)',
        "fits = True",
        ("tests/deepspeed/test_huge_gradients.py::test_all_ranks_drop_the_step[ZeRO 3, chunked]",),
    ),
    Mutation(
        "ZeRO 1 and 2: the second rank's slice is used as the first's",
        _ZERO,
        "offset = param.data.storage_offset() - begin",
        "offset = param.data.storage_offset() - begin * 0",
        (f"{_TENSOR}[stage=2]",),
    ),
    Mutation(
        "ZeRO 1 and 2: a tensor that begins in another rank's slice is left out",
        _ZERO,
        "low, high = max(offset, 0), min(offset + param.numel(), flat.numel())",
        "low, high = offset if offset >= 0 else flat.numel(), min(offset + param.numel(), flat.numel())",
        (f"{_TENSOR}[stage=2]",),
    ),
    Mutation(
        "ZeRO 3: padding is counted with the tensor",
        _ZERO,
        "real = max(0, min(size, param.ds_numel - rank * size))",
        "real = size",
        (f"{_TENSOR}[stage=3]",),
    ),
    Mutation(
        "ZeRO 3: padding is not stepped over between two tensors",
        _ZERO,
        "        start += size\n",
        "        start += real\n",
        (f"{_TENSOR}[stage=3]",),
    ),
    Mutation(
        "tensors of a mixture of experts are accepted",
        _ZERO,
        'if getattr(param, "allreduce", True) is False:',
        'if getattr(param, "allreduce", True) is None:',
        (f"{_REFUSED}[experts]",),
    ),
    Mutation(
        "a scope that spans several calls needs no attach",
        _ZERO,
        'if missing and (demand.scope == "global" or',
        'if missing and (demand.scope == "tensor" and',
        (f"{_REFUSED}[global_without_attach]",),
    ),
    Mutation(
        "the sums of the partitions stay on their rank",
        _ATTACH,
        "vector = all_reduce(vector, group)",
        "vector = vector + 0 * all_reduce(vector.clone(), group)",
        (f"{_SHARED}[stage=2-scope=global]",),
    ),
    Mutation(
        "pending gradients are not unscaled and clipped",
        _ATTACH,
        "pending: Tensor = gradient / self._scale()",
        "pending: Tensor = gradient / 1.0",
        (f"{_SHARED}[stage=2-scope=global]",),
    ),
    Mutation(
        "pending gradients are unscaled, and not clipped",
        _ATTACH,
        "if self._owner.clip_grad > 0:",
        "if self._owner.clip_grad < 0:",
        (f"{_SHARED}[stage=3-scope=global]",),
    ),
    Mutation(
        "ZeRO 3: a group's first sub-group alone counts as the group",
        _ATTACH,
        "sizes[self._group_of[k]] += len(layout.logical_params)",
        "sizes[self._group_of[k]] = len(layout.logical_params)",
        (f"{_SHARED}[stage=3-scope=group]",),
    ),
    Mutation(
        "every call of step() takes the betas of the first partition",
        _ATTACH,
        "members, decision = self._slices[turn], self._decision",
        "members, decision = slice(0, len(layout.logical_params)), self._decision",
        (f"{_SHARED}[stage=2-scope=group]",),
    ),
    Mutation(
        "adaptive scalars of flat partitions are not in the checkpoint",
        "am_lightning/optim/checkpointing.py",
        "group |= {TABLE: tables, OPTIONS: options}",
        "group |= {OPTIONS: options}",
        (f"{_RESUMED}[2-tensor]",),
    ),
    Mutation(
        "every group gets the first one's options after a load",
        "am_lightning/optim/checkpointing.py",
        "group.update(kept)  # because one engine",
        "group.update({})  # because one engine",
        ("tests/deepspeed/test_checkpoints.py::test_universal_to_one_rank[3]",),
    ),
    Mutation(
        "the moments of AdamW in a flat partition count as those of a first step",
        _PERSISTENCE,
        'found[logical.name] = [step, cap**step, cap, float(group["lr"])]',
        'found[logical.name] = [step, 1.0, cap, float(group["lr"])]',
        ("tests/deepspeed/test_checkpoints.py::test_a_checkpoint_of_adamw_is_taken_over_with_a_warning[1]",),
    ),
    Mutation(
        "the warm-up step that DeepSpeed makes decays the weights",
        "am_lightning/optim/checkpointing.py",
        "if optimizer.layout is None and inside_engine_warm_up():",
        "if optimizer.state and inside_engine_warm_up():",
        ("tests/deepspeed/test_stages.py::test_bfloat16[0-tensor]",),
    ),
]
