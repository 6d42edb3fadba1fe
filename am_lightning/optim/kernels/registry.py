"""The kernels: one line each. What they have in common, what each needs, and which serves a group on a device.

A kernel is a class with two methods: ``sums`` (pass 1, read-only: N and D of each shard) and ``update`` (pass 2, which
writes d, v and x). All give the same result up to rounding. A new one is one file and one line of ``KERNELS``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from am_lightning.optim.kernels import compiled, foreach, single_tensor
from am_lightning.optim.kernels.cpu import build, chunked, cpp
from am_lightning.optim.kernels.inputs import Coefficients, LocalShard
from am_lightning.optim.kernels.transfer import is_capturing, is_fake
from am_lightning.optim.kernels.triton import check, launch
from am_lightning.optim.kernels.workspace import Workspace


class Passes(Protocol):
    """Both passes over the shards that a kernel serves, in as many steps as the shards' kinds stay the same."""

    def sums(self, coefficients: Coefficients, accumulate: torch.dtype) -> Tensor:
        """Pass 1, read-only: ``[shards, 2]``, N and D of each, in ``accumulate``."""

    def update(self, coefficients: Coefficients, active: Tensor) -> None:
        """Pass 2: write d, v and x of the rows where ``active`` (``[rows]`` bool) is True."""


@runtime_checkable
class Prepares(Protocol):
    """A kernel that makes something of a step's tensors before its passes; there may be a step with pass 2 alone."""

    def begin(self) -> None:
        """The shards have this step's tensors."""


class Kernel(NamedTuple):
    """A line of the table.

    Attributes:
        name: as ``describe()`` shows it.
        device_types: where it runs; None: everywhere.
        supports: whether it can do a shard; others of its group go to the next kernel.
        passes: makes both passes over shards that it supports.
        why_not: the reason why it does not work for shards of a kind here, "" where it does. May build and try it.
        scales_gradients: it multiplies gradients by the factor of clipping in registers, and leaves them as they are.
    """

    name: str
    device_types: frozenset[str] | None
    supports: Callable[[LocalShard], bool]
    passes: Callable[[Sequence[LocalShard], Workspace], Passes]
    why_not: Callable[[check.Kind], str] = lambda kind: ""
    scales_gradients: bool = False
    description: Callable[[], str] | None = None

    def describe(self) -> str:
        """The name, with what is known of how the kernel was built."""
        return self.name if self.description is None else self.description()


TRITON = Kernel("Triton", frozenset({"cuda"}), launch.supports, launch.TritonPasses, check.why_not, True)  # and ROCm
CPP = Kernel(
    "C++",
    frozenset({"cpu"}),
    cpp.supports,
    cpp.CppPasses,
    build.why_not,
    description=lambda: build.load_library().description,
)
COMPILED = Kernel("torch.compile", frozenset({"xpu", "mps", "mtia"}), compiled.supports, compiled.CompiledPasses)
CHUNKED = Kernel("chunked", frozenset({"cpu"}), chunked.supports, chunked.ChunkedPasses)
FOREACH = Kernel("foreach", None, lambda shard: True, foreach.ForeachPasses)
SINGLE_TENSOR = Kernel("single_tensor", None, lambda shard: True, single_tensor.SingleTensorPasses)

FUSED_BY_DEFAULT = frozenset({"cuda", "cpu"})  # device types on which ``fused=None`` tries the fused kernel
KERNELS = (TRITON, CPP, COMPILED, CHUNKED, FOREACH, SINGLE_TENSOR)
FUSED = (TRITON, CPP, COMPILED)


class Choice(NamedTuple):
    """A group's options ``foreach`` and ``fused``."""

    foreach: bool | None
    fused: bool | None

    @property
    def by_default(self) -> bool:
        """Neither is set."""
        return self.foreach is None and self.fused is None


def fused_kernel(device: torch.device) -> Kernel | None:
    """The fused kernel of a device, or None."""
    return next((kernel for kernel in FUSED if device.type in (kernel.device_types or ())), None)


def kernels_for(device: torch.device, choice: Choice, default: Kernel | None) -> tuple[Kernel, ...]:
    """The kernels of a group on a device: a shard goes to the first that supports it.

    ``foreach=False`` is single_tensor, ``True`` torch._foreach_*, ``fused=True`` the device's fused kernel; with
    neither set the fused kernel serves where the ranks have agreed on it, else the fastest one that needs no compiler.

    Args:
        default: the fused kernel that serves by default on this device; None: it does not.
    """
    on_cpu = device.type == "cpu"
    if is_fake():  # nothing to launch on, and no number for the host
        return (FOREACH,)
    eager = (CHUNKED, FOREACH) if on_cpu else (FOREACH,)
    fused = fused_kernel(device) if choice.fused else default if choice.by_default else None
    if fused is not None:
        return (fused, *eager)
    if choice.foreach is None:
        return eager
    return (FOREACH,) if choice.foreach else (SINGLE_TENSOR,)


def require_fused(device: torch.device) -> None:
    """Raise where ``fused=True`` cannot work on a device. On a GPU a small step is made, elsewhere nothing is built.

    Raises:
        RuntimeError: the text says what to install.
    """
    if is_fake() or device.type == "meta":  # where a model waits for its real device: step() will see that one
        return
    if fused_kernel(device) is CPP:
        build.require_compiler()
    elif is_capturing(device):  # nothing may be built or waited for; what has not stepped before is refused later
        launch.require_triton()
    else:
        require_kernel(check.Kind(device))


def require_kernel(kind: check.Kind) -> None:
    """Raise where ``fused=True`` does not work for parameters of a kind.

    Raises:
        RuntimeError: the reason, and what to install.
    """
    kernel = fused_kernel(kind.device)
    if kernel is None:
        names = sorted({name for each in FUSED for name in each.device_types or ()})
        raise RuntimeError(
            f"fused=True has no kernels for parameters on {kind.device.type!r} (only for {', '.join(names)}): use "
            "fused=None"
        )
    if reason := kernel.why_not(kind):
        raise RuntimeError(f"fused=True {needs(kernel)}, but {reason}, or use fused=None")


def needs(kernel: Kernel) -> str:
    """What ``fused=True`` needs, for a message."""
    return (
        "on a GPU needs Triton kernels"
        if kernel is TRITON
        else f"on the {'CPU' if kernel is CPP else 'device'} needs {kernel.name}"
    )
