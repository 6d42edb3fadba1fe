"""The two passes as Triton kernels, for CUDA and ROCm: three launches for all tensors of one kind, without a sync."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from am_lightning.optim.kernels.inputs import Coefficients, LocalShard, is_addressable, is_flat, too_large
from am_lightning.optim.kernels.transfer import moved
from am_lightning.optim.kernels.triton.tables import BLOCK, BLOCKS, Kind, Prepared, Tables
from am_lightning.optim.kernels.workspace import Workspace
from am_lightning.optional_imports import cause_of

__all__ = ["DTYPES", "LAUNCH_OPTIONS", "Tables", "TritonPasses", "current", "require_triton", "supports"]

DTYPES = {torch.float64: "float64", torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_REDUCE_BLOCK = 2048  # chunks that a program of the second stage adds at once: 32 iterations for 537 M elements
# The default of fusing a product and a sum differs between versions of Triton.
LAUNCH_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
_LAUNCH = {"BLOCK": BLOCK, "BLOCKS": BLOCKS, **LAUNCH_OPTIONS}


def require_triton() -> Any:
    """Import and return the module of Triton kernels.

    Raises:
        RuntimeError: if Triton is not installed or cannot be imported.
    """
    try:
        from am_lightning.optim.kernels.triton import kernels as triton_kernels
    except ImportError as error:
        raise RuntimeError(
            f"Triton cannot be imported ({error}): pip install 'am-lightning[triton]', or '.[triton]' in a checkout"
        ) from cause_of(error, "triton")
    return triton_kernels


def supports(shard: LocalShard) -> bool:
    """Return whether the kernels support a shard. Other shards go to the next kernel.

    It must be flat in storage and have a second moment and no coupled weight decay. Either all four tensors are float64
    or none is.
    """
    tensors = shard.tensors()
    dtypes = {tensor.dtype for tensor in tensors}
    plain = shard.v is not None and not shard.options.l2 and is_flat(tensors) and is_addressable(tensors)
    return plain and dtypes <= DTYPES.keys() and (torch.float64 not in dtypes or len(dtypes) == 1)


class TritonPasses:
    """Both passes over shards that ``supports`` accepts, on one or several devices.

    The kernels multiply gradients by the workspace's ``gradient_factor`` in registers.
    """

    def __init__(self, shards: Sequence[LocalShard], workspace: Workspace) -> None:
        self._shards, self._workspace = shards, workspace
        self._device = shards[0].x.device
        self._groups: list[Prepared] = []
        self._kernels = require_triton()

    def begin(self) -> None:
        """Group the tensors of this step by kind, and copy their addresses to the device if they have changed."""
        self._groups = self._workspace.keep(Tables).prepare(self._shards)

    def sums(self, coefficients: Coefficients, accumulate: torch.dtype) -> Tensor:
        """Run pass 1, which only reads. Returns N and D, ``[shards, 2]``, on the device of the first shard.

        Args:
            coefficients: ``one_plus_k``, ``c_root`` and ``c_eps`` are read on the device.
            accumulate: dtype of the result; the kernels sum in float64.
        """
        parts: dict[torch.device, Tensor] = {}
        alone = len({group.kind.device for group, _, _ in self._groups}) == 1  # then every slot is written
        for group, addresses, options in self._groups:
            kind, device = group.kind, group.kind.device
            if device not in parts:
                new = torch.empty if alone else torch.zeros
                parts[device] = new(len(self._shards), 2, dtype=torch.float64, device=device)
            partial = torch.empty(group.chunk_count, 2, dtype=torch.float64, device=device)
            columns = [_on(coefficients[name], device) for name in ("one_plus_k", "c_root", "c_eps")]
            with current(device):
                if group.chunk_count:
                    self._kernels.sums_kernel[(group.chunk_count,)](
                        addresses, group.chunks, group.tensors, options, *columns,
                        _on(self._workspace.gradient_factor, device), partial,
                        **self._constants(kind), DECAYS=kind.decays, TOO_LARGE=too_large(kind.dtypes[2]), **_LAUNCH,
                    )  # fmt: skip
                self._kernels.reduce_kernel[(group.size,)](
                    partial, group.first_chunk, group.tensors, parts[device], BLOCK=_REDUCE_BLOCK, **LAUNCH_OPTIONS
                )
        total, *others = (moved(part, self._device) for part in parts.values())
        for other in others:
            total = total + other  # every slot is filled on one device only
        return total.to(accumulate)

    def update(self, coefficients: Coefficients, active: Tensor) -> None:
        """Run pass 2, which writes d, v and x of the rows where ``active``, ``[rows]`` bool, is True.

        Args:
            coefficients: ``c_root``, ``c_eps``, ``lr``, ``decay_factor``, ``omega`` are read on the device, and
                ``step`` (the steps that a row has made) where d is rounded stochastically.
        """
        for group, addresses, options in self._groups:
            kind, device = group.kind, group.kind.device
            if not group.chunk_count:
                continue
            names = ("c_root", "c_eps", "lr", "decay_factor", "omega")
            columns = [_on(coefficients[name], device) for name in names]
            steps = _on(coefficients["step"], device) if kind.stochastic else None
            with current(device):
                self._kernels.update_kernel[(group.chunk_count,)](
                    addresses, group.chunks, group.tensors, options, *columns,
                    _on(active.view(torch.uint8), device), steps, _on(self._workspace.gradient_factor, device),
                    **self._constants(kind), STOCHASTIC=kind.stochastic, **_LAUNCH,
                )  # fmt: skip

    def _constants(self, kind: Kind) -> dict[str, Any]:
        """Return the compile-time constants of a kernel."""
        dtypes = [getattr(self._kernels.tl, DTYPES[dtype]) for dtype in (*kind.dtypes, kind.compute_dtype)]
        constants = dict(zip(("G", "D", "V", "X", "COMPUTE"), dtypes, strict=True))
        return constants | dict(zip(("ALIGNED_G", "ALIGNED_STATE", "ALIGNED_X"), kind.aligned, strict=True))


def _on(tensor: Any, device: torch.device) -> Any:
    """Return ``tensor`` on the device of the kernel, contiguous."""
    return None if tensor is None else moved(tensor, device).contiguous()


def current(device: torch.device) -> Any:
    """Return a context that makes ``device`` the current one, on which Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
