"""The choice of a kernel for each tensor. It is kept from step to step until the kinds or options of tensors change."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import repeat
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from am_lightning.distributed import LogicalParam, ShardLayout, local_grad, local_shard
from am_lightning.optim.closed_form import RowOptions
from am_lightning.optim.kernels.inputs import (
    Coefficients,
    GroupOptions,
    LocalShard,
    is_flat,
    scale_,
)
from am_lightning.optim.kernels.registry import Choice, Kernel, Passes, Prepares, fused_kernel, kernels_for
from am_lightning.optim.kernels.transfer import is_capturing, moved
from am_lightning.optim.kernels.workspace import Workspace
from am_lightning.optim.param_state import sums_live_on

_ndim = attrgetter("ndim")

_NOTHING = torch.empty(0, device="cpu")


def choice_of(group: dict[str, Any]) -> Choice:
    """Return the kernel options of a group. Groups of AMSGD have no ``fused``."""
    return Choice(group["foreach"], group.get("fused"))


class StepTensors(NamedTuple):
    """The local tensors of the logical parameters that have a gradient on this rank in this step.

    Attributes:
        rows: indices of the logical parameters in the packed sums.
        x, g, d, v: local shards of the parameters, gradients, directions and second moments. ``v`` is None if P = 1.
    """

    rows: tuple[int, ...]
    x: Sequence[Tensor]
    g: Sequence[Tensor]
    d: Sequence[Tensor]
    v: Sequence[Tensor] | None

    def kinds(self) -> Hashable:
        """Return everything that the choice of kernels depends on. Values and addresses of tensors are not in it."""
        columns = (self.x, self.g, self.d) if self.v is None else (self.x, self.g, self.d, self.v)
        layouts = [[(tensor.dtype, tensor.stride()) for tensor in column] for column in columns]
        shapes = [(tensor.shape, tensor.device) for tensor in self.x]
        return self.rows, layouts, shapes, set(map(type, self.x))  # the types tell fake tensors apart


class KernelPlan:
    """Both passes over the shards of one layout, each shard by the kernel chosen for it.

    Attributes:
        made_for: kinds of the tensors and options that the plan serves.
        present: ``[rows]``, 1 for rows with a gradient on this rank, on the device and in the dtype of the sums.
        kernels: ``kernel -> number of shards`` that it serves.
    """

    def __init__(
        self,
        tensors: StepTensors,
        options: Sequence[tuple[GroupOptions, Choice]],
        workspace: Workspace,
        layout: ShardLayout,
    ) -> None:
        """Choose the kernels.

        Args:
            tensors: the tensors of the step.
            options: options of each row that has a gradient.
            workspace: the workspace of the optimizer.
            layout: the layout of the step.
        """
        params = [logical.param for logical in layout.logical_params]
        self._workspace, self._row_count = workspace, len(params)
        self._device, self._dtype = sums_live_on(params)
        self.made_for = tensors.kinds(), options
        self._columns: dict[int, tuple[tuple[float | Tensor, ...], Tensor]] = {}
        here = set(tensors.rows)
        present = tuple(int(row in here) for row in range(self._row_count))
        self.present = workspace.constants.vector(present, self._device, self._dtype)
        second: Sequence[Tensor | None] = [None] * len(tensors.rows) if tensors.v is None else tensors.v
        self._shards = [
            LocalShard(row, x, g, d, v, of)
            for row, x, g, d, v, (of, _) in zip(
                tensors.rows, tensors.x, tensors.g, tensors.d, second, options, strict=True
            )
        ]
        self._copied: list[LocalShard] = []  # shards whose gradients are copied to the strides of the parameters
        served: dict[tuple[Kernel, str], list[LocalShard]] = {}
        choices: dict[tuple[torch.device, Choice], tuple[Kernel, ...]] = {}
        for shard, (_, choice) in zip(self._shards, options, strict=True):
            device = shard.x.device
            if (device, choice) not in choices:
                default = fused_kernel(device) if device.type in workspace.fused_by_default else None
                choices[device, choice] = kernels_for(device, choice, default)
            served.setdefault((self._kernel_of(shard, choices[device, choice]), device.type), []).append(shard)
        self.kernels: dict[Kernel, int] = {}
        for (kernel, _), shards in served.items():
            self.kernels[kernel] = self.kernels.get(kernel, 0) + len(shards)
        self._unscaled = [shard for (kernel, _), of in served.items() if not kernel.scales_gradients for shard in of]
        self._passes: list[tuple[tuple[int, ...] | None, Passes]] = []  # rows: None for all of them, in order
        for (kernel, _), shards in served.items():
            rows = tuple(shard.row for shard in shards)
            every = rows == tuple(range(self._row_count))
            self._passes.append((None if every else rows, kernel.passes(shards, workspace)))
        self._begins = [passes.begin for _, passes in self._passes if isinstance(passes, Prepares)]

    def _kernel_of(self, shard: LocalShard, kernels: Sequence[Kernel]) -> Kernel:
        for kernel in kernels:
            if kernel.supports(shard):
                return kernel
            if kernel is fused_kernel(shard.x.device) and _has_other_gradient_strides(shard):
                given, shard.g = shard.g, _like_parameter(shard)
                if kernel.supports(shard):
                    self._copied.append(shard)
                    return kernel
                shard.g = given
        raise AssertionError("the last kernel supports everything")

    def describe(self) -> str:
        """Describe the kernels, and the reason if no fused kernel serves by default."""
        parts = [f"{kernel.describe()} for {count}" for kernel, count in self.kernels.items()]
        why = self._workspace.why_no_fused
        return f"; kernels: {', '.join(parts)}{f' (no fused kernel: {why})' if why else ''}" if parts else ""

    def begin(self, tensors: StepTensors, *read: Any) -> None:
        """Set the tensors of this step, and apply gradient clipping that is left to the step.

        Args:
            tensors: the tensors of this step, of the kinds in ``made_for``.
            read: other objects that the step reads, kept alive if a CUDA graph is being captured.
        """
        if self._device.type == "cuda" and is_capturing(self._device):
            self._workspace.captured += [self, *self._columns.values(), *read]
        for shard, x, g, d in zip(self._shards, tensors.x, tensors.g, tensors.d, strict=True):
            shard.x, shard.g, shard.d = x, g, d
        if tensors.v is not None:
            for shard, v in zip(self._shards, tensors.v, strict=True):
                shard.v = v
        for shard in self._copied:
            shard.g = _like_parameter(shard)
        factor = self._workspace.gradient_factor
        if factor is not None and self._unscaled:
            scale_([shard.g for shard in self._unscaled], factor)
        for begin in self._begins:
            begin()

    def gradients(self) -> list[Tensor]:
        """Return the local gradients of this step."""
        return [shard.g for shard in self._shards]

    def over_rows(self, options: Sequence[RowOptions], sizes: Sequence[int]) -> RowOptions:
        """Return the options of each row, ``[rows]`` each, on the device of the sums.

        Python numbers are filled in on the device, without a copy or a sync, and kept until they change.

        Args:
            options: options of each group.
            sizes: number of rows of each group.
        """
        return RowOptions(*map(self._column, range(len(RowOptions._fields)), zip(*options, strict=True), repeat(sizes)))

    def _column(self, place: int, values: tuple[float | Tensor, ...], sizes: Sequence[int]) -> Tensor:
        on_host = not any(isinstance(value, Tensor) for value in values)
        if on_host and place in self._columns and self._columns[place][0] == values:
            return self._columns[place][1]
        parts = []
        for value, size in zip(values, sizes, strict=True):
            if isinstance(value, Tensor):
                parts.append(moved(value.detach().reshape(1), self._device, self._dtype).expand(size))
            else:
                parts.append(torch.full((size,), float(value), dtype=self._dtype, device=self._device))
        column = torch.cat(parts)
        if on_host and not is_capturing(self._device):  # a tensor created in a capture has values after a replay only
            self._columns[place] = values, column
        return column

    def sums(self, coefficients: Coefficients) -> Tensor:
        """Run pass 1, which only reads. Returns N and D, ``[rows, 2]``, 0 for rows without a gradient on this rank."""
        out: Tensor | None = None
        for rows, passes in self._passes:
            pairs = passes.sums(coefficients, self._dtype)
            pairs = pairs if pairs.device == self._device else moved(pairs, self._device)
            if rows is None:
                return pairs
            if out is None:
                out = torch.zeros(self._row_count, 2, dtype=self._dtype, device=self._device)
            out.index_copy_(0, self._workspace.constants.vector(rows, self._device), pairs)
        # None if a pipeline stage or a rank has no parameters
        return torch.zeros(self._row_count, 2, dtype=self._dtype, device=self._device) if out is None else out

    def update(self, coefficients: Coefficients, active: Tensor) -> None:
        """Run pass 2, which writes d, v and x of the rows where ``active``, ``[rows]`` bool, is True.

        For shards on the CPU the host reads ``active``. Otherwise nothing waits for the device.
        """
        for _, passes in self._passes:
            passes.update(coefficients, active)
        self._workspace.gradient_factor = None
        self.release()

    def release(self) -> None:
        """Drop the tensors of the step, because its gradients take as much memory as the model."""
        for shard in self._shards:
            shard.x = shard.g = shard.d = _NOTHING
            shard.v = None if shard.v is None else _NOTHING


def _has_other_gradient_strides(shard: LocalShard) -> bool:
    others = [tensor for tensor in shard.tensors() if tensor is not shard.g]
    return shard.g.stride() != shard.x.stride() and is_flat(others)


def _like_parameter(shard: LocalShard) -> Tensor:
    """Return a copy of the gradient with the strides of the parameter, which fused kernels require."""
    like = torch.empty_like(shard.x, dtype=shard.g.dtype, memory_format=torch.preserve_format)
    return like.copy_(shard.g)


def step_tensors(
    layout: ShardLayout, moments_of: Callable[[list[LogicalParam]], list[list[Tensor]]], who: str
) -> StepTensors:
    """Collect the tensors of all parameters that have a gradient on this rank.

    All gradients are checked before the first state is created.

    Args:
        layout: the layout of the step.
        moments_of: a function that returns the moments of logical parameters, and creates missing ones.
        who: name of the optimizer, for messages.

    Raises:
        RuntimeError: if a gradient is sparse or complex.
    """
    rows = tuple([i for i, logical in enumerate(layout.logical_params) if logical.param.grad is not None])
    here = [layout.logical_params[i] for i in rows]
    x: Sequence[Any] = [logical.param for logical in here]
    grads: Sequence[Any] = [param.grad for param in x]
    for logical, grad in zip(here, grads, strict=True):
        if grad.layout is not torch.strided or grad.is_complex():
            _refuse_gradient(logical, who)
    moments: Sequence[Sequence[Tensor]] = moments_of(here)
    if not layout.holds_whole_tensors:
        x, grads = [local_shard(p, p.param) for p in here], [local_grad(p) for p in here]
        moments = [[local_shard(*pair) for pair in zip(here, column, strict=True)] for column in moments]
    columns: Sequence[Sequence[Any]] = (x, grads, *moments)
    if not all(map(_ndim, x)):  # a 0-dim operand would be promoted to the dtype of a 0-dim coefficient
        columns = [[tensor if tensor.ndim else tensor.reshape(1) for tensor in column] for column in columns]
    x, g, d, *v = columns
    return StepTensors(rows, x, g, d, v[0] if v else None)


def _refuse_gradient(logical: LogicalParam, who: str) -> None:
    param = logical.param
    assert param.grad is not None
    if param.grad.layout is not torch.strided:
        raise RuntimeError(
            f"{who} does not support sparse gradients: parameter {logical.name!r} has a gradient of layout "
            f"{param.grad.layout}"
        )
    raise RuntimeError(
        f"{who} does not support complex parameters: parameter {logical.name!r} is {param.dtype}; use view_as_real"
    )
