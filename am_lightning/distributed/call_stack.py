"""Find the wrapper or engine that steps an optimizer on the call stack, because the optimizer has no pointer to it.

An adapter that knows the engine tells the optimizer instead (``am_lightning.deepspeed.attach``). The stack is searched
when a layout is built and while an optimizer has no state, so later steps do not walk it. An optimizer is recognised by
its list ``param_groups``.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import torch

_ZERO_REDUNDANCY = "torch.distributed.optim.zero_redundancy_optimizer"


def inside_zero_redundancy(param_groups: Any) -> bool:
    """Return whether a ZeroRedundancyOptimizer steps the optimizer, which then sees only this rank's tensors."""
    return _owner(param_groups, "optim", _ZERO_REDUNDANCY) is not None


def called_by_zero_redundancy() -> bool:
    """Return whether a ZeroRedundancyOptimizer up the stack builds an optimizer or adds a group to it."""
    return any(_frames_of(_ZERO_REDUNDANCY))


def deepspeed_owner(param_groups: Any) -> Any:
    """Return DeepSpeed's optimizer up the stack that steps the one with these ``param_groups``, or None."""
    return _owner(param_groups, "optimizer", "deepspeed")


def inside_pipeline_engine() -> bool:
    """Return whether DeepSpeed's PipelineEngine makes the step."""
    return any(_frames_of("deepspeed.runtime.pipe"))


def deepspeed_replicas() -> Any:
    """Return the process group over which a DeepSpeed engine up the stack has averaged the gradients, or None."""
    groups = (getattr(frame.f_locals.get("self"), "data_parallel_group", None) for frame in _frames_of("deepspeed"))
    return next((group for group in groups if group is not None), None)


def inside_engine_warm_up() -> bool:
    """Return whether DeepSpeed, while it is being built, makes a step with zero gradients, which must have no effect.

    FP16_UnfusedOptimizer (stage 0 in 16 bit) makes such a step, which would count as a step and decay the weights.
    """
    return any(frame.f_code.co_name == "initialize_optimizer_states" for frame in _frames_of("deepspeed"))


def inside_state_creation(param_groups: Sequence[dict[str, Any]] = ()) -> bool:
    """Return whether torch.distributed.checkpoint makes a step at lr 0 with zero gradients to create the state.

    Each rank whose optimizer has no state makes this step, which must have no other effect. Under FSDP1 this may be a
    single rank, which holds no element of the optimizer's parameters and therefore has no state in mid-run either. A
    collective would then hang, and neither lr nor gradients tell this rank whether the other ranks make the step too.

    Args:
        param_groups: parameter groups of the optimizer. If a group's lr is not 0, this is no such step, and the stack
            is not searched. Default: no groups.
    """
    module = sys.modules.get("torch.distributed.checkpoint.state_dict")
    if module is None or any(isinstance(lr := group.get("lr"), (int, float)) and lr != 0 for group in param_groups):
        return False
    maker = getattr(module, "_init_optim_state", None)
    if maker is None:  # a run that saves no such checkpoint does not need it
        warnings.warn(
            f"torch {torch.__version__} has no torch.distributed.checkpoint.state_dict._init_optim_state, by which "
            "am_lightning recognises a step that only creates a state: the first checkpoint of a run may count as one "
            "more step, and one under FSDP1 may wait forever. Use a newer am-lightning, or an older torch",
            stacklevel=3,
        )
        return False
    return any(frame.f_code is maker.__code__ for frame in _frames())


def caller(kind: type) -> Any:
    """Return the nearest object of class ``kind`` up the stack whose method is running, or None."""
    owners = (frame.f_locals.get("self") for frame in _frames())
    return next((owner for owner in owners if isinstance(owner, kind)), None)


def _owner(param_groups: Any, attribute: str, module: str) -> Any:
    """Return the nearest ``self`` in ``module`` whose ``attribute`` is the optimizer with ``param_groups``, or None."""
    owners = (frame.f_locals.get("self") for frame in _frames_of(module))
    held = ((owner, getattr(owner, attribute, None)) for owner in owners)
    return next((owner for owner, inner in held if getattr(inner, "param_groups", None) is param_groups), None)


def _frames_of(module: str) -> Iterator[FrameType]:
    """Yield the frames of code in ``module`` or its submodules. If it is not imported, the stack is not walked."""
    if module in sys.modules:
        yield from (frame for frame in _frames() if str(frame.f_globals.get("__name__", "")).startswith(module))


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
