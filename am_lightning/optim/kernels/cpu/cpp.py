"""The two passes on the CPU, each as one call of a C++ loop over all tensors."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from am_lightning.optim.kernels.cpu.build import Library, load_library
from am_lightning.optim.kernels.inputs import Coefficients, LocalShard, is_addressable, is_flat
from am_lightning.optim.kernels.workspace import Workspace

# The same numbers and order as in work.h
_KINDS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_COLUMNS = ("one_plus_k", "c_root", "c_eps", "lr", "decay_factor", "step", "omega")


def supports(shard: LocalShard) -> bool:
    """Return whether the loop supports a shard: it is flat in storage, has a second moment and no coupled decay."""
    if shard.v is None or shard.options.l2:
        return False
    tensors = shard.tensors()
    return all(tensor.dtype in _KINDS for tensor in tensors) and is_flat(tensors) and is_addressable(tensors)


class CppPasses:
    """Both passes over shards that ``supports`` accepts."""

    def __init__(self, shards: Sequence[LocalShard], workspace: Workspace | None = None) -> None:
        self._library: Library = load_library()
        self._shards = shards
        facts: list[int] = []
        options: list[float] = []
        for shard in shards:
            assert shard.v is not None
            kinds = [_KINDS[tensor.dtype] for tensor in (shard.x, shard.g, shard.d, shard.v)]
            facts += [shard.x.numel(), shard.row, *kinds, shard.options.maximize]
            options += [shard.options.beta2, shard.options.lambd, shard.options.mu]
        self._facts, self._options = array("q", facts), array("d", options)

    def sums(self, coefficients: Coefficients, accumulate: torch.dtype) -> Tensor:
        """Run pass 1, which only reads. Returns N and D, ``[shards, 2]``."""
        out = torch.empty(len(self._shards), 2, dtype=torch.float64, device="cpu")
        self._call(self._library.sums, coefficients, out)
        return out.to(accumulate)

    def update(self, coefficients: Coefficients, active: Tensor) -> None:
        """Run pass 2, which writes d, v and x of the rows where ``active``, ``[rows]`` bool, is True."""
        self._call(self._library.update, coefficients, active.to("cpu").contiguous())

    def _call(self, function: Callable[..., None], coefficients: Coefficients, last: Tensor) -> None:
        columns = [coefficients.get(name) for name in _COLUMNS]
        nothing = torch.zeros_like(coefficients["lr"])
        table = torch.stack([nothing if column is None else column for column in columns], 1)
        table = table.to("cpu", torch.float64)
        shards = self._shards
        addresses = array("q", [shard.x.data_ptr() for shard in shards])
        addresses.extend([shard.g.data_ptr() for shard in shards])
        addresses.extend([shard.d.data_ptr() for shard in shards])
        addresses.extend([shard.v.data_ptr() for shard in shards])  # type: ignore[union-attr]
        function(
            ctypes.c_void_p(self._facts.buffer_info()[0]),
            ctypes.c_void_p(addresses.buffer_info()[0]),
            ctypes.c_void_p(self._options.buffer_info()[0]),
            ctypes.c_void_p(table.data_ptr()),
            ctypes.c_int64(len(shards)),
            ctypes.c_int(self._library.path),
            ctypes.c_int(torch.get_num_threads()),
            ctypes.c_void_p(self._library.parallel),
            ctypes.c_void_p(last.data_ptr()),
        )
