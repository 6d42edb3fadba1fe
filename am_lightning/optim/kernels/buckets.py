"""Buckets: many tensors copied into one matrix of blocks, so that coefficients of the rows become a column.

The multi-tensor operators of torch launch one kernel for each tensor if they take a list of 0-dim numbers beside a list
of tensors. Therefore the tensors of a bucket are copied into a matrix ``[blocks, elements of a block]``, with one
launch for about fifty tensors. Each block belongs to one tensor. A coefficient is then ``[blocks, 1]`` and broadcasts,
and the sums of blocks are one reduction along the matrix.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from am_lightning.optim.kernels.inputs import SUM_BLOCK, LocalShard, flat, is_flat
from am_lightning.optim.kernels.transfer import upload, uploaded

_BUCKET_ELEMENTS = 4 << 20
_BUCKET_ELEMENTS_ON_CPU = 1 << 16  # a bucket and its temporaries stay in the cache
_SMALLEST_BLOCK = 64
_BLOCKS_OF_A_TENSOR = 16  # on average, so that the padding of last blocks is 3 % unless tensors are tiny
_FAN_IN = 64  # numbers that one level of the sum over blocks adds up


class Matrices:
    """Scratch memory that all buckets of an optimizer share. It is allocated at its first use and kept."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, name: str, dtype: torch.dtype, device: torch.device, numel: int) -> Tensor:
        """Return uninitialised memory, ``[numel]``. It is shared, except for a bucket of one large tensor with gaps."""
        most, key = _most_elements(device), (name, dtype, device)
        most += most // _BLOCKS_OF_A_TENSOR  # room for the padding
        if numel > most:
            return torch.empty(numel, dtype=dtype, device=device)
        if key not in self._made:
            self._made[key] = torch.empty(most, dtype=dtype, device=device)
        return self._made[key][:numel]


@dataclass(eq=False)
class Bucket:
    """Parts of shards with the same options, device and dtypes. ``rows`` and ``starts`` are ``[blocks]`` there."""

    members: list[tuple[int, int]]  # for each part, its shard and the index of its first element in the shard
    block: int  # elements of a block
    is_flat: bool
    places: list[int]  # index of the first element of each part in the matrix
    rows: Tensor  # row of each block
    starts: Tensor  # index of the first element of each block in the shard, minus ``first``
    first: int
    filling: Tensor | None  # ``[blocks, 1]``, index in the block at which its padding begins; None: no padding
    matrices: Matrices
    views: dict[tuple[str, torch.dtype], tuple[Tensor, list[Tensor]]] = field(default_factory=dict)

    def pack(self, name: str, tensors: list[Tensor]) -> Tensor:
        """Copy the tensors into a matrix, ``[blocks, block]``, in their dtype. The padding is undefined.

        Args:
            name: name of the matrix. Matrices of one name share their memory in all buckets.
            tensors: one tensor for each member.
        """
        first, key = tensors[0], (name, tensors[0].dtype)
        if key in self.views:
            matrix, members = self.views[key]
        else:
            matrix = self.matrices.take(name, first.dtype, first.device, len(self.rows) * self.block)
            matrix = matrix.view(len(self.rows), self.block)
            members = self._members_of(matrix, tensors)
            if len(tensors) > 1:  # parts of a large tensor are numerous, and their views take little time
                self.views[key] = matrix, members
        torch._foreach_copy_(members, tensors)
        return matrix

    def unpack(self, name: str, matrix: Tensor, tensors: list[Tensor]) -> None:
        """Copy the matrix that ``pack`` returned under this name back into the tensors."""
        kept = self.views.get((name, matrix.dtype))
        torch._foreach_copy_(tensors, self._members_of(matrix, tensors) if kept is None else kept[1])

    def _members_of(self, matrix: Tensor, tensors: list[Tensor]) -> list[Tensor]:
        """Return a view of the matrix for each tensor, in the order of its storage if the storage has no gaps."""
        line, pairs = matrix.view(-1), zip(tensors, self.places, strict=True)
        if self.is_flat:
            return [line.as_strided(tensor.shape, tensor.stride(), line.storage_offset() + at) for tensor, at in pairs]
        return [line[at : at + tensor.numel()].view(tensor.shape) for tensor, at in pairs]

    def block_sums(self, matrix: Tensor) -> Tensor:
        """Return the sum of each block, ``[blocks]``, in the dtype of the matrix. Overwrites the padding."""
        return self._filled_up(matrix).sum(1)

    def block_max(self, matrix: Tensor) -> Tensor:
        """Return the maximum of each block of numbers >= 0, ``[blocks]``. Overwrites the padding."""
        return self._filled_up(matrix).amax(1)

    def _filled_up(self, matrix: Tensor) -> Tensor:
        if self.filling is not None:
            matrix.masked_fill_(torch.arange(self.block, device=matrix.device) >= self.filling, 0)
        return matrix


@dataclass(eq=False)
class BucketPlan:
    """The buckets of the shards of a step. It holds no tensor of the shards, so it serves all steps of such shards."""

    buckets: list[Bucket]
    levels: list[Tensor]  # tree of sums over blocks; each level is ``[groups, members]``, indices of the level below

    def over_blocks(self, partial: Tensor) -> Tensor:
        """Sum ``[2, blocks]`` of all buckets to ``[shards, 2]``, in an order that is the same in every run."""
        for index in self.levels:
            partial = torch.cat([partial, partial.new_zeros(2, 1)], 1)  # the last number, 0, is the padding of groups
            partial = partial.index_select(1, index.view(-1)).view(2, *index.shape).sum(2)
        return partial.t().contiguous()


def key_of(shards: Sequence[LocalShard]) -> Hashable:
    """Return a key of everything that a plan depends on."""
    return (_most_elements(shards[0].x.device), *((p.row, p.x.shape, p.x.stride(), _kind(p)) for p in shards))


def plan_of(shards: Sequence[LocalShard], parts: Sequence[tuple[int, LocalShard]], matrices: Matrices) -> BucketPlan:
    """Distribute the parts of the shards over buckets of at most 4 Mi elements, or 64 Ki on the CPU.

    Args:
        shards: the shards of a step.
        parts: the result of ``in_parts`` for them.
        matrices: the memory of the buckets.
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
        offset = parts[members[0]][1].first  # subtracted, so that parts of one tensor share their vector of starts
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
    """Split shards into parts that fit in a bucket, and yield each with the index of its shard."""
    for owner, shard in enumerate(shards):
        most = _most_elements(shard.x.device)
        whole = shard.x.numel() <= most or not is_flat(shard.tensors())  # only flat tensors can be split
        for first in (0,) if whole else range(0, shard.x.numel(), most):
            yield owner, shard if whole else part_of(shard, first)


def part_of(shard: LocalShard, first: int) -> LocalShard:
    """Return the part of a large shard that begins at ``first`` and fills a bucket."""
    end = first + _most_elements(shard.x.device)
    x, g, d, *v = (flat(tensor)[first:end] for tensor in shard.tensors())
    return LocalShard(shard.row, x, g, d, v[0] if v else None, shard.options, first)


def _most_elements(device: torch.device) -> int:
    return _BUCKET_ELEMENTS_ON_CPU if device.type == "cpu" else _BUCKET_ELEMENTS


def _kind(shard: LocalShard) -> Hashable:
    tensors = shard.tensors()
    return shard.options, shard.x.device, tuple(t.dtype for t in tensors), shard.v is None, is_flat(tensors)


def _block_of(numels: Sequence[int]) -> int:
    """Return the elements of a block, a power of two.

    It bounds the number of blocks by the number of tensors, and the padding by their elements.
    """
    wanted = sum(numels) // (len(numels) * _BLOCKS_OF_A_TENSOR)
    return min(max(1 << max(wanted, 1).bit_length() - 1, _SMALLEST_BLOCK), SUM_BLOCK)


def _tree(positions: list[list[int]], total: int) -> list[Tensor]:
    """Return the indices of each level. Index ``total`` stands for 0, and the last level has a group for each shard."""
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
