"""Many tensors as one matrix of blocks, so that what differs between rows is a column beside it.

torch's multi-tensor route is closed to a list of 0-dim numbers beside a list of tensors: that costs a launch for each
tensor. Here the tensors of a bucket are copied into a matrix ``[blocks, elements of a block]`` (one list, one launch
for some fifty tensors), every block within one tensor. A number of the rows is then ``[blocks, 1]`` and broadcasts,
and sums of blocks are one reduction along the matrix.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from am_lightning.optim.kernels.inputs import SUM_BLOCK, LocalShard, flat, is_flat
from am_lightning.optim.kernels.transfer import upload, uploaded

_BUCKET_ELEMENTS = 4 << 20
_SMALLEST_BLOCK = 64
_BLOCKS_OF_A_TENSOR = 16  # on average, so that what fills up the last block is 3 % where tensors are not tiny
_FAN_IN = 64  # numbers that one level of the sum over blocks takes together


@dataclass(eq=False)
class Bucket:
    """Parts of equal options, device and dtypes. ``rows`` and ``starts`` are ``[blocks]`` on the device."""

    members: list[int]
    block: int
    sizes: list[int]  # elements of a member, what fills up its last block, and so on
    is_flat: bool
    rows: Tensor  # the row of each block
    starts: Tensor  # the index of its first element in the row's shard

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """``[blocks, block]`` in the dtype of the tensors; what fills up the blocks is undefined."""
        matrix = torch.empty(len(self.rows), self.block, dtype=tensors[0].dtype, device=tensors[0].device)
        torch._foreach_copy_(self._members_of(matrix, tensors), self._flats(tensors))
        return matrix

    def unpack(self, matrix: Tensor, tensors: Sequence[Tensor]) -> None:
        """Write what ``pack`` has read."""
        torch._foreach_copy_(self._flats(tensors), self._members_of(matrix, tensors))

    def block_sums(self, matrix: Tensor) -> Tensor:
        """``[blocks]`` in the matrix' dtype; overwrites what fills up the blocks."""
        return self._filled_up(matrix).sum(1)

    def block_max(self, matrix: Tensor) -> Tensor:
        """``[blocks]``, of numbers >= 0; overwrites what fills up the blocks."""
        return self._filled_up(matrix).amax(1)

    def _filled_up(self, matrix: Tensor) -> Tensor:
        filling = [part for part in torch.split(matrix.view(-1), self.sizes)[1::2] if part.numel()]
        if filling:
            torch._foreach_zero_(filling)
        return matrix

    def _members_of(self, matrix: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
        parts = torch.split(matrix.view(-1), self.sizes)[::2]
        return list(parts) if self.is_flat else [p.view(t.shape) for p, t in zip(parts, tensors, strict=True)]

    def _flats(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        if not self.is_flat:
            return list(tensors)
        return [t.view(-1) if t.is_contiguous() else flat(t) for t in tensors]


@dataclass(eq=False)
class BucketPlan:
    """How the shards of a step are taken; it holds nothing of theirs and serves all steps of such shards."""

    buckets: list[Bucket]
    levels: list[Tensor]  # the tree of sums over blocks, each ``[groups, members]`` of the level below

    def over_blocks(self, partial: Tensor) -> Tensor:
        """``[2, blocks]`` of all buckets -> ``[shards, 2]``, in an order that does not change from run to run."""
        for index in self.levels:
            partial = torch.cat([partial, partial.new_zeros(2, 1)], 1)  # the last fills up groups
            partial = partial.index_select(1, index.view(-1)).view(2, *index.shape).sum(2)
        return partial.t().contiguous()


def key_of(shards: Sequence[LocalShard]) -> Hashable:
    """What a plan depends on."""
    return (_BUCKET_ELEMENTS, *((p.row, p.x.numel(), _kind(p)) for p in shards))


def plan_of(shards: Sequence[LocalShard], parts: Sequence[tuple[int, LocalShard]]) -> BucketPlan:
    """Parts of at most a bucket each, in buckets of at most 4 Mi elements.

    Args:
        parts: what ``in_parts`` made of the shards.
    """
    kinds: dict[Hashable, list[list[int]]] = {}
    elements: dict[Hashable, int] = {}
    for at, (_, part) in enumerate(parts):
        kind, numel = _kind(part), part.x.numel()
        if not numel:
            continue
        if kind not in kinds or elements[kind] + numel > _BUCKET_ELEMENTS:
            kinds.setdefault(kind, []).append([])
            elements[kind] = 0
        kinds[kind][-1].append(at)
        elements[kind] += numel
    positions: list[list[int]] = [[] for _ in shards]
    buckets, total = [], 0
    for members in (members for lists in kinds.values() for members in lists):
        block = _block_of([parts[at][1].x.numel() for at in members])
        rows: list[int] = []
        starts: list[int] = []
        sizes: list[int] = []
        for at in members:
            owner, part = parts[at]
            numel = part.x.numel()
            count = -(-numel // block)
            rows += [part.row] * count
            starts += range(part.first, part.first + count * block, block)
            sizes += [numel, count * block - numel]
            positions[owner] += range(total, total + count)
            total += count
        first = parts[members[0]][1]
        vectors = (uploaded(values, first.x.device, torch.int64) for values in (rows, starts))
        buckets.append(Bucket(members, block, sizes, is_flat(first.tensors()), *vectors))
    return BucketPlan(buckets, [upload(index, shards[0].x.device) for index in _tree(positions, total)])


def in_parts(shards: Sequence[LocalShard]) -> list[tuple[int, LocalShard]]:
    """Shards of at most a bucket each, and which shard each belongs to."""
    result = []
    for owner, shard in enumerate(shards):
        if shard.x.numel() <= _BUCKET_ELEMENTS or not is_flat(shard.tensors()):
            result.append((owner, shard))  # one whose elements do not lie close together is taken whole
            continue
        columns = zip(*(torch.split(flat(tensor), _BUCKET_ELEMENTS) for tensor in shard.tensors()), strict=True)
        for i, (x, g, d, *v) in enumerate(columns):
            first = i * _BUCKET_ELEMENTS
            result.append((owner, LocalShard(shard.row, x, g, d, v[0] if v else None, shard.options, first)))
    return result


def _kind(shard: LocalShard) -> Hashable:
    tensors = shard.tensors()
    return shard.options, shard.x.device, tuple(t.dtype for t in tensors), shard.v is None, is_flat(tensors)


def _block_of(numels: Sequence[int]) -> int:
    """A power of two: the number of blocks is bounded by that of the tensors, the filling by their elements."""
    wanted = sum(numels) // (len(numels) * _BLOCKS_OF_A_TENSOR)
    return min(max(1 << max(wanted, 1).bit_length() - 1, _SMALLEST_BLOCK), SUM_BLOCK)


def _tree(positions: list[list[int]], total: int) -> list[Tensor]:
    """Indices of each level; the number ``total`` of a level is a zero. The last level has one group for each shard."""
    levels: list[Tensor] = []
    while not levels or any(len(at) > 1 for at in positions):
        groups: list[list[int]] = []
        above = []
        for at in positions:
            mine = [at[i : i + _FAN_IN] for i in range(0, len(at), _FAN_IN)] or [[]]
            above.append(list(range(len(groups), len(groups) + len(mine))))
            groups += mine
        width = max(max(map(len, groups)), 1)
        levels.append(torch.tensor([group + [total] * (width - len(group)) for group in groups], device="cpu"))
        positions, total = above, len(groups)
    return levels
