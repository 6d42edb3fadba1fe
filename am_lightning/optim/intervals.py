"""beta_t over an interval of steps: what is known of it, and who has read it up to which step."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor


class Interval(NamedTuple):
    """What is known of beta_t over an interval of steps: ``[tensors]`` each, in this order wherever they are packed.

    Attributes:
        total: sum of beta_t over the steps.
        at_max: steps with beta_t at its cap.
        at_zero: steps with beta_t = 0.
        steps: steps in which the tensor took part.
        lowest: inf where it took part in none.
        highest: -inf where it took part in none.
    """

    total: Tensor
    at_max: Tensor
    at_zero: Tensor
    steps: Tensor
    lowest: Tensor
    highest: Tensor


SUMMED = 4  # the first of them; then the lowest and the highest


def nothing(like: Tensor, tensors: int) -> Tensor:
    """``[6, tensors]`` of an interval without steps."""
    return emptied(like.new_empty(6, tensors))


def emptied(numbers: Tensor) -> Tensor:
    """``[6, tensors]``, in place: without steps."""
    numbers[:SUMMED].zero_()
    numbers[4].fill_(float("inf"))
    numbers[5].fill_(float("-inf"))
    return numbers


def merged(one: Tensor, other: Tensor) -> Tensor:
    """``[6, tensors]`` of two intervals together."""
    extremes = torch.fmin(one[4:5], other[4:5]), torch.fmax(one[5:], other[5:])
    return torch.cat([one[:SUMMED] + other[:SUMMED], *extremes])


def merged_by_name(whole: Tensor, names: Sequence[str], part: Tensor, names_of_part: Sequence[str]) -> Tensor:
    """``whole`` with ``part``, which has some of its tensors; where all names are others they are known by place."""
    if tuple(names_of_part) == tuple(names):
        return merged(whole, part)
    place = {name: index for index, name in enumerate(names)}
    pairs = [(place[name], index) for index, name in enumerate(names_of_part) if name in place]
    if not pairs and len(names) == len(names_of_part):  # they were named after the steps
        return merged(whole, part)
    if not pairs:
        return whole
    to, source = (torch.tensor(column, dtype=torch.int64, device=part.device) for column in zip(*pairs, strict=True))
    return whole.index_copy(1, to, merged(whole.index_select(1, to), part.index_select(1, source)))


class IntervalReaders:
    """Several readers, each of which has an interval of its own.

    A step adds to one tally, however many readers there are; whoever reads it leaves what was in it to the others.
    """

    def __init__(self) -> None:
        self._unread: WeakKeyDictionary[Any, dict[Hashable, tuple[tuple[str, ...], Tensor]]] = WeakKeyDictionary()

    def begin(self, reader: Any) -> None:
        """From now on ``reader`` has an interval, which begins here."""
        self._unread[reader] = {}

    def give(self, kind: Hashable, names: tuple[str, ...], numbers: Tensor) -> None:
        """To every reader.

        Args:
            kind: numbers of one kind have the same names, dtype and device.
            numbers: ``[6, names]``.
        """
        for unread in self._unread.values():
            before = unread.get(kind)
            unread[kind] = names, numbers if before is None else merged(before[1], numbers)

    def take(self, reader: Any, names: Sequence[str]) -> Tensor:
        """``[6, names]``, an ``Interval`` since ``reader`` took last, or began; its next one begins here."""
        unread, self._unread[reader] = list(self._unread[reader].values()), {}
        whole = nothing(unread[-1][1] if unread else torch.empty(0, device="cpu"), len(names))
        for names_of_part, part in unread:
            whole = merged_by_name(whole, names, part.to(whole), names_of_part)
        return whole

    def __contains__(self, reader: Any) -> bool:
        return reader in self._unread
