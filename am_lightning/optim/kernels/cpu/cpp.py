"""The two passes on the CPU as one call each of a C++ loop over all tensors."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from am_lightning.optim.kernels.cpu.build import Library, load_library
from am_lightning.optim.kernels.inputs import Numbers, Piece, is_addressable, is_flat

# As in cpu_loop.cpp.
_KINDS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_COLUMNS = ("gap", "root", "floor", "lr", "shrink", "step", "omega")


def supports(piece: Piece) -> bool:
    """Whether the loop can do a row: it walks the storage, has a second moment and no coupled decay."""
    if piece.v is None or piece.options.l2:
        return False
    tensors = (piece.x, piece.g, piece.d, piece.v)
    return is_flat(tensors) and is_addressable(tensors) and {tensor.dtype for tensor in tensors} <= _KINDS.keys()


class LoopPasses:
    """Both passes of one step over pieces that ``supports`` has accepted, all on the CPU."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._library: Library = load_library()
        self._count = len(pieces)
        self._held = pieces  # the table below has addresses only
        table: list[int] = []
        options: list[float] = []
        for piece in pieces:
            x, g, d, v = piece.x, piece.g, piece.d, piece.v
            assert v is not None
            table += [
                x.data_ptr(), g.data_ptr(), d.data_ptr(), v.data_ptr(), x.numel(), piece.row,
                _KINDS[x.dtype], _KINDS[g.dtype], _KINDS[d.dtype], _KINDS[v.dtype], piece.options.maximize,
            ]  # fmt: skip
            options += [piece.options.beta2, piece.options.lambd, piece.options.mu]
        self._pieces, self._options = array("q", table), array("d", options)

    def sums(self, numbers: Numbers, accumulate: torch.dtype) -> Tensor:
        """Pass 1, which only reads: ``[pieces, 2]``, N and D."""
        out = torch.empty(self._count, 2, dtype=torch.float64, device="cpu")
        self._call(self._library.sums, numbers, out)
        return out.to(accumulate)

    def update(self, numbers: Numbers, counts: Tensor) -> None:
        """Pass 2, which writes d, v and x of the rows where ``counts`` (``[rows]`` bool) is True."""
        self._call(self._library.update, numbers, counts.to("cpu").contiguous())

    def _call(self, function: Callable[..., None], numbers: Numbers, last: Tensor) -> None:
        columns = [numbers.columns.get(name) for name in _COLUMNS]
        known = next(column for column in columns if column is not None)
        filled = [torch.zeros_like(known) if column is None else column for column in columns]
        table = torch.stack(filled, 1).to("cpu", torch.float64)
        addresses = (self._pieces.buffer_info()[0], self._options.buffer_info()[0], table.data_ptr())
        function(
            *(ctypes.c_void_p(address) for address in addresses),
            ctypes.c_int64(self._count),
            ctypes.c_int(torch.get_num_threads()),
            ctypes.c_void_p(last.data_ptr()),
        )
