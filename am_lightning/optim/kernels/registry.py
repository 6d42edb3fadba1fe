"""The table of kernels, their interface, and the choice of kernels for a group on a device.

A kernel is a class with two methods: ``sums`` (pass 1, which only reads and returns N and D of each shard) and
``update`` (pass 2, which writes d, v and x). All kernels give the same result up to rounding. A new kernel takes one
file and one line of ``KERNELS``.
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
    """Both passes over the shards that a kernel serves, for all steps until the kinds of the shards change."""

    def sums(self, coefficients: Coefficients, accumulate: torch.dtype) -> Tensor:
        """Run pass 1, which only reads. Returns N and D, ``[shards, 2]``, in the dtype ``accumulate``."""

    def update(self, coefficients: Coefficients, active: Tensor) -> None:
        """Run pass 2, which writes d, v and x of the rows where ``active``, ``[rows]`` bool, is True."""


@runtime_checkable
class Prepares(Protocol):
    """A kernel that prepares each step before its passes. A step may consist of pass 2 alone."""

    def begin(self) -> None:
        """Prepare a step, after the shards have received its tensors."""


class Kernel(NamedTuple):
    """An entry of the table.

    Attributes:
        name: name in ``describe()``.
        device_types: device types on which it runs, or None for all.
        supports: a function that returns whether it supports a shard. Other shards go to the next kernel.
        passes: a function that creates the passes over shards that it supports.
        why_not: a function that returns the reason why it does not work for shards of a kind on this machine, or "". It
            may build and try the kernel.
        scales_gradients: whether it applies gradient clipping in registers, so that the gradients stay unchanged.
        description: a function that returns a description for ``describe()``, or None to use ``name``.
    """

    name: str
    device_types: frozenset[str] | None
    supports: Callable[[LocalShard], bool]
    passes: Callable[[Sequence[LocalShard], Workspace], Passes]
    why_not: Callable[[check.Kind], str] = lambda kind: ""
    scales_gradients: bool = False
    description: Callable[[], str] | None = None

    def describe(self) -> str:
        """Return the name, with details of the build if the kernel has them."""
        return self.name if self.description is None else self.description()


TRITON = Kernel("Triton", frozenset({"cuda"}), launch.supports, launch.TritonPasses, check.why_not, True)  # ROCm too
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
    """The options ``foreach`` and ``fused`` of a group."""

    foreach: bool | None
    fused: bool | None

    @property
    def by_default(self) -> bool:
        """Whether neither option is set."""
        return self.foreach is None and self.fused is None


def fused_kernel(device: torch.device) -> Kernel | None:
    """Return the fused kernel of a device, or None if it has none."""
    return next((kernel for kernel in FUSED if device.type in (kernel.device_types or ())), None)


def kernels_for(device: torch.device, choice: Choice, default: Kernel | None) -> tuple[Kernel, ...]:
    """Return the kernels of a group on a device. A shard goes to the first of them that supports it.

    ``foreach=False`` selects single_tensor, ``foreach=True`` torch._foreach_*, and ``fused=True`` the fused kernel of
    the device. If neither is set, it is the fused kernel if the ranks have agreed on it, else the fastest kernel that
    needs no compiler.

    Args:
        device: the device of the shards.
        choice: the options of the group.
        default: the fused kernel that serves by default on this device, or None.
    """
    on_cpu = device.type == "cpu"
    if is_fake():  # fake tensors have no memory for a kernel and no values for the host
        return (FOREACH,)
    eager = (CHUNKED, FOREACH) if on_cpu else (FOREACH,)
    fused = fused_kernel(device) if choice.fused else default if choice.by_default else None
    if fused is not None:
        return (fused, *eager)
    if choice.foreach is None:
        return eager
    return (FOREACH,) if choice.foreach else (SINGLE_TENSOR,)


def require_fused(device: torch.device) -> None:
    """Require that ``fused=True`` can work on a device. This runs a small step on a GPU, and builds nothing on the CPU.

    Raises:
        RuntimeError: if it cannot work. The message says what to install.
    """
    if is_fake() or device.type == "meta":  # the model gets its real device later, which step() checks
        return
    if fused_kernel(device) is CPP:
        build.require_compiler()
    elif is_capturing(device):  # a capture allows no build and no sync; step() refuses one without a step before it
        launch.require_triton()
    else:
        require_kernel(check.Kind(device))


def require_kernel(kind: check.Kind) -> None:
    """Require that ``fused=True`` works for parameters of a kind.

    Raises:
        RuntimeError: if it does not. The message has the reason and says what to install.
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
    """Return the middle of an error message, which says what ``fused=True`` needs."""
    return (
        "on a GPU needs Triton kernels"
        if kernel is TRITON
        else f"on the {'CPU' if kernel is CPP else 'device'} needs {kernel.name}"
    )
