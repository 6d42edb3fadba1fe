"""Many tensors as one matrix of blocks, so that what differs between rows is a column beside it.

torch's multi-tensor route is closed to a list of 0-dim numbers beside a list of tensors: that costs a launch for each
tensor. Here the tensors of a bucket are copied into a matrix ``[blocks, elements of a block]`` (one list, one launch
for some fifty tensors), every block within one tensor. A number of the rows is then ``[blocks, 1]`` and broadcasts,
and sums of blocks are one reduction along the matrix.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from am_lightning.optim.kernels.inputs import SUM_BLOCK, LocalShard, flat, is_flat
from am_lightning.optim.kernels.transfer import upload, uploaded

_BUCKET_ELEMENTS = 4 << 20
_BUCKET_ELEMENTS_ON_CPU = 1 << 16  # a bucket and what is made of it stay in the cache
_SMALLEST_BLOCK = 64
_BLOCKS_OF_A_TENSOR = 16  # on average, so that what fills up the last block is 3 % where tensors are not tiny
_FAN_IN = 64  # numbers that one level of the sum over blocks takes together


class Matrices:
    """The memory of an optimizer's buckets, which take turns: made when first needed, and used at every step."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, name: str, dtype: torch.dtype, device: torch.device, numel: int) -> Tensor:
        """``[numel]``, uninitialised; the same memory for every bucket but one that is a large tensor with gaps."""
        most, key = _most_elements(device), (name, dtype, device)
        most += most // _BLOCKS_OF_A_TENSOR  # what fills up blocks
        if numel > most:
            return torch.empty(numel, dtype=dtype, device=device)
        if key not in self._made:
            self._made[key] = torch.empty(most, dtype=dtype, device=device)
        return self._made[key][:numel]


@dataclass(eq=False)
class Bucket:
    """Parts of equal options, device and dtypes. ``rows`` and ``starts`` are ``[blocks]`` on the device."""

    members: list[tuple[int, int]]  # shard, and the index of its first element that is here
    block: int
    is_flat: bool
    places: list[int]  # of each member's first element in the matrix
    rows: Tensor  # the row of each block
    starts: Tensor  # the index of its first element in the row's shard, less ``first``
    first: int
    filling: Tensor | None  # ``[blocks, 1]``, the place in the block from which on it is filled up; None: nowhere
    matrices: Matrices
    views: dict[tuple[str, torch.dtype], tuple[Tensor, list[Tensor]]] = field(default_factory=dict)

    def pack(self, name: str, tensors: list[Tensor]) -> Tensor:
        """``[blocks, block]`` in the dtype of the tensors; what fills up the blocks is undefined.

        Args:
            name: of the matrix, which is the same memory for all buckets.
        """
        first, key = tensors[0], (name, tensors[0].dtype)
        if key in self.views:
            matrix, members = self.views[key]
        else:
            matrix = self.matrices.take(name, first.dtype, first.device, len(self.rows) * self.block)
            matrix = matrix.view(len(self.rows), self.block)
            members = self._members_of(matrix, tensors)
            if len(tensors) > 1:  # not of parts of a large tensor, which are very many and quickly made
                self.views[key] = matrix, members
        torch._foreach_copy_(members, tensors)
        return matrix

    def unpack(self, name: str, matrix: Tensor, tensors: list[Tensor]) -> None:
        """Write what is in the matrix that ``pack`` gave under this name."""
        kept = self.views.get((name, matrix.dtype))
        torch._foreach_copy_(tensors, self._members_of(matrix, tensors) if kept is None else kept[1])

    def _members_of(self, matrix: Tensor, tensors: list[Tensor]) -> list[Tensor]:
        """The part of each tensor: in the order of its storage where that has no gaps."""
        line, pairs = matrix.view(-1), zip(tensors, self.places, strict=True)
        if self.is_flat:
            return [line.as_strided(tensor.shape, tensor.stride(), line.storage_offset() + at) for tensor, at in pairs]
        return [line[at : at + tensor.numel()].view(tensor.shape) for tensor, at in pairs]

    def block_sums(self, matrix: Tensor) -> Tensor:
        """``[blocks]`` in the matrix' dtype; overwrites what fills up the blocks."""
        return self._filled_up(matrix).sum(1)

    def block_max(self, matrix: Tensor) -> Tensor:
        """``[blocks]``, of numbers >= 0; overwrites what fills up the blocks."""
        return self._filled_up(matrix).amax(1)

    def _filled_up(self, matrix: Tensor) -> Tensor:
        if self.filling is not None:
            matrix.masked_fill_(torch.arange(self.block, device=matrix.device) >= self.filling, 0)
        return matrix


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
    return (_most_elements(shards[0].x.device), *((p.row, p.x.shape, p.x.stride(), _kind(p)) for p in shards))


def plan_of(shards: Sequence[LocalShard], parts: Sequence[tuple[int, LocalShard]], matrices: Matrices) -> BucketPlan:
    """Parts of at most a bucket each, in buckets of at most 4 Mi elements, 64 Ki on the CPU.

    Args:
        parts: what ``in_parts`` made of the shards.
        matrices: what buckets are copied into.
    """
    kinds: dict[Hashable, list[list[int]]] = {}
    elements: dict[Hashable, int] = {}
    vectors: dict[Hashable, Tensor] = {}
    for at, (_, part) in enumerate(parts):
        kind, numel = _kind(part), -(-part.x.numel() // _SMALLEST_BLOCK) * _SMALLEST_BLOCK
        if not part.x.numel():
            continue
        if kind not in kinds or elements[kind] + numel > _most_elements(part.x.device):
            kinds.setdefault(kind, []).append([])
            elements[kind] = 0
        kinds[kind][-1].append(at)
        elements[kind] += numel
    positions: list[list[int]] = [[] for _ in shards]
    buckets: list[Bucket] = []
    total = 0
    for members in (members for lists in kinds.values() for members in lists):
        block = _block_of([parts[at][1].x.numel() for at in members])
        offset = parts[members[0]][1].first  # of parts of one tensor, which so have one vector
        rows: list[int] = []
        starts: list[int] = []
        filling: list[int] = []
        places: list[int] = []
        for at in members:
            owner, part = parts[at]
            numel = part.x.numel()
            count = -(-numel // block)
            places.append(len(rows) * block)
            rows += [part.row] * count
            starts += range(part.first - offset, part.first - offset + count * block, block)
            filling += [block] * (count - 1) + [numel - (count - 1) * block]
            positions[owner] += range(total, total + count)
            total += count
        first = parts[members[0]][1]
        device = first.x.device
        keys = [(device, *values) for values in (rows, starts, filling)]
        for key in keys:
            if key not in vectors:
                vectors[key] = uploaded(key[1:], device, torch.int64)
        of_rows, of_starts, ends = (vectors[key] for key in keys)
        of_filling = None if min(filling) == block else ends[:, None]
        places_of = [(parts[at][0], parts[at][1].first) for at in members]
        flat_ones = is_flat(first.tensors())
        buckets.append(Bucket(places_of, block, flat_ones, places, of_rows, of_starts, offset, of_filling, matrices))
    return BucketPlan(buckets, [upload(index, shards[0].x.device) for index in _tree(positions, total)])


def in_parts(shards: Sequence[LocalShard]) -> Iterator[tuple[int, LocalShard]]:
    """Shards of at most a bucket each, and which shard each belongs to."""
    for owner, shard in enumerate(shards):
        most = _most_elements(shard.x.device)
        whole = shard.x.numel() <= most or not is_flat(shard.tensors())  # elements that do not lie close together
        for first in (0,) if whole else range(0, shard.x.numel(), most):
            yield owner, shard if whole else part_of(shard, first)


def part_of(shard: LocalShard, first: int) -> LocalShard:
    """The elements of a bucket from ``first`` on, of a shard that is larger."""
    end = first + _most_elements(shard.x.device)
    x, g, d, *v = (flat(tensor)[first:end] for tensor in shard.tensors())
    return LocalShard(shard.row, x, g, d, v[0] if v else None, shard.options, first)


def _most_elements(device: torch.device) -> int:
    return _BUCKET_ELEMENTS_ON_CPU if device.type == "cpu" else _BUCKET_ELEMENTS


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
