"""Tables that the Triton kernels read: the chunk of each program, options, and addresses of the tensors.

Everything except addresses stays on the device until other tensors step. Addresses change when gradients are allocated
again. One asynchronous copy then updates them, and nothing waits for it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from am_lightning.optim.kernels.inputs import GroupOptions, LocalShard
from am_lightning.optim.kernels.transfer import is_capturing, upload, uploaded

BLOCK, BLOCKS = 1024, 8  # elements that a program holds at once, and how often: a chunk is their product
_ALIGNMENT = 16  # bytes of the widest load
_KEPT_GROUPS = 32  # sets of tensors whose tables are kept: more than the calls of step() in a training step


class Kind(NamedTuple):
    """Everything that a compiled kernel is specialised for."""

    device: torch.device
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype]  # dtypes of g, d, v, x
    decays: bool
    aligned: tuple[bool, bool, bool]  # g; d and v; x. Gradients may be views at any address, states are not

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.promote_types(self.dtypes[3], torch.float32)

    @property
    def stochastic(self) -> bool:
        """Whether d is bfloat16 and x float32. Rounding to nearest would lose small gradients."""
        return self.dtypes[1] == torch.bfloat16 and self.dtypes[3] == torch.float32


class Member(NamedTuple):
    """The properties of a tensor in a group that stay the same from step to step."""

    slot: int  # index among the shards
    row: int
    numel: int


class Following:
    """A small table on the device that follows a list on the host. It is copied only after a change."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._values: list[Any] = []
        self._table: Tensor | None = None
        self._spare: Tensor | None = None

    def follow(self, values: list[Any], captured: list[Any]) -> Tensor:
        """Return the table with these values on the device.

        Every copy has a page-locked buffer of its own; torch gives its memory out again only when the copy is done.
        A CUDA graph reads its buffer at every replay, so that buffer, and the table it fills, go into ``captured``.
        """
        if is_capturing(self._device):
            buffer = self._buffer(len(values)) if self._spare is None else self._spare
            self._spare = None
            buffer.copy_(torch.tensor(values, dtype=self._dtype, device="cpu"))
            table = buffer.to(self._device, non_blocking=True)
            captured += [buffer, table]
            return table
        if self._device.type == "cuda" and self._spare is None:
            self._spare = self._buffer(len(values))  # older torch locks no memory during a capture
        if self._table is None or values != self._values:
            self._table = uploaded(values, self._device, self._dtype)
            self._values = values
        return self._table

    def _buffer(self, numel: int) -> Tensor:
        return torch.empty(numel, dtype=self._dtype, device="cpu", pin_memory=True)


class Group:
    """The tensors of one kind that step together.

    Attributes:
        chunks: ``[chunks, 2]`` int32, tensor and index in it of each chunk.
        first_chunk: ``[size + 1]`` int32, where each tensor's chunks begin and the last one's end.
        tensors: ``[size, 3]`` int64, elements, row and slot.
    """

    def __init__(self, kind: Kind, members: Sequence[Member]) -> None:
        self.kind = kind
        self.size = len(members)
        chunk = BLOCK * BLOCKS
        count = torch.tensor([-(-member.numel // chunk) for member in members], device="cpu")
        end = count.cumsum(0)
        owner = torch.repeat_interleave(count)
        index = torch.arange(owner.numel(), device="cpu") - (end - count)[owner]
        integers = [(member.numel, member.row, member.slot) for member in members]
        self.chunk_count = owner.numel()
        self.chunks = upload(torch.stack([owner, index], 1).to(torch.int32), kind.device)
        self.first_chunk = upload(torch.cat([end.new_zeros(1), end]).to(torch.int32), kind.device)
        self.tensors = uploaded(integers, kind.device, torch.int64)
        self.addresses = Following(kind.device, torch.int64)
        self.options = Following(kind.device, torch.float64)


class Prepared(NamedTuple):
    """A group in this step: ``addresses`` ``[size, 4]`` of g, d, v, x; ``options`` ``[size, 5]``."""

    group: Group
    addresses: Tensor
    options: Tensor


class Tables:
    """Groups that have stepped, the last used last. They live as long as this process, like scratch memory."""

    def __init__(self) -> None:
        self._groups: OrderedDict[tuple[Kind, tuple[Member, ...]], Group] = OrderedDict()
        self._captured: list[Any] = []  # what CUDA graphs read

    def prepare(self, shards: Sequence[LocalShard]) -> list[Prepared]:
        """Return the groups of these shards, with their addresses and options on the device."""
        sorted_out: dict[Kind, tuple[list[Member], list[int], list[float]]] = {}
        for slot, shard in enumerate(shards):
            kind, addresses = _kind(shard)
            members, pointers, options = sorted_out.setdefault(kind, ([], [], []))
            members.append(Member(slot, shard.row, shard.x.numel()))
            pointers += addresses
            options += _numbers(shard.options)
        result = []
        for kind, (members, pointers, options) in sorted_out.items():
            group, keep = self._group(kind, tuple(members)), self._captured
            result.append(Prepared(group, group.addresses.follow(pointers, keep), group.options.follow(options, keep)))
        return result

    def _group(self, kind: Kind, members: tuple[Member, ...]) -> Group:
        key = kind, members
        capturing = is_capturing(kind.device)
        if key not in self._groups:
            if capturing:
                raise RuntimeError(
                    f"a CUDA graph is being captured, and {len(members)} tensors in it have never stepped together: "
                    "make a step with the same gradients before the capture, as torch's warm-up does"
                )
            self._groups[key] = Group(kind, members)
        self._groups.move_to_end(key)
        while len(self._groups) > _KEPT_GROUPS:
            self._groups.popitem(last=False)
        group = self._groups[key]
        if capturing:
            self._captured.append(group)
        return group


def _kind(shard: LocalShard) -> tuple[Kind, list[int]]:
    g, d, v, x = shard.g, shard.d, shard.v, shard.x
    assert v is not None  # supports() requires it
    addresses = [g.data_ptr(), d.data_ptr(), v.data_ptr(), x.data_ptr()]
    at_g, at_d, at_v, at_x = (address % _ALIGNMENT == 0 for address in addresses)
    aligned = at_g, at_d and at_v, at_x
    return Kind(x.device, (g.dtype, d.dtype, v.dtype, x.dtype), shard.options.mu != 0, aligned), addresses


def _numbers(options: GroupOptions) -> list[float]:
    """Return beta2, 1 - beta2, lambda, mu and the sign of the gradient."""
    beta2, sign = options.beta2, -1.0 if options.maximize else 1.0
    return [beta2, 1 - beta2, options.lambd, options.mu, sign]
