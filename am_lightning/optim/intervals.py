"""Statistics of beta_t over intervals of steps, for several readers that read at different steps."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor


class Interval(NamedTuple):
    """Statistics of beta_t over an interval of steps, each ``[tensors]``. Packed tensors have them in this order.

    Attributes:
        total: sum of beta_t over the steps.
        at_max: number of steps with beta_t at its cap.
        at_zero: number of steps with beta_t = 0.
        steps: number of steps in which the tensor took part.
        lowest: lowest beta_t, inf if the tensor took part in no step.
        highest: highest beta_t, -inf if the tensor took part in no step.
    """

    total: Tensor
    at_max: Tensor
    at_zero: Tensor
    steps: Tensor
    lowest: Tensor
    highest: Tensor


SUMMED = 4  # number of leading fields that are sums; the lowest and the highest follow


def nothing(like: Tensor, tensors: int) -> Tensor:
    """Return the ``[6, tensors]`` of an interval without steps."""
    return emptied(like.new_empty(6, tensors))


def emptied(numbers: Tensor) -> Tensor:
    """Reset ``[6, tensors]`` in place to an interval without steps."""
    numbers[:SUMMED].zero_()
    numbers[4].fill_(float("inf"))
    numbers[5].fill_(float("-inf"))
    return numbers


def merged(one: Tensor, other: Tensor) -> Tensor:
    """Return the ``[6, tensors]`` of two intervals together."""
    extremes = torch.fmin(one[4:5], other[4:5]), torch.fmax(one[5:], other[5:])
    return torch.cat([one[:SUMMED] + other[:SUMMED], *extremes])


def merged_by_name(whole: Tensor, names: Sequence[str], part: Tensor, names_of_part: Sequence[str]) -> Tensor:
    """Return ``whole`` merged with ``part``, which holds some of its tensors.

    Tensors are matched by name, or by position if no name of ``part`` is in ``names`` and their number is the same.
    """
    if tuple(names_of_part) == tuple(names):
        return merged(whole, part)
    place = {name: index for index, name in enumerate(names)}
    pairs = [(place[name], index) for index, name in enumerate(names_of_part) if name in place]
    if not pairs and len(names) == len(names_of_part):  # the tensors were renamed after these steps
        return merged(whole, part)
    if not pairs:
        return whole
    to, source = (torch.tensor(column, dtype=torch.int64, device=part.device) for column in zip(*pairs, strict=True))
    return whole.index_copy(1, to, merged(whole.index_select(1, to), part.index_select(1, source)))


class IntervalReaders:
    """The unread intervals of several readers.

    A step adds to one tally, whatever the number of readers. When one of them reads, the numbers of the tally are added
    to the unread intervals of all.
    """

    def __init__(self) -> None:
        self._unread: WeakKeyDictionary[Any, dict[Hashable, tuple[tuple[str, ...], Tensor]]] = WeakKeyDictionary()

    def begin(self, reader: Any) -> None:
        """Begin an empty interval for ``reader``."""
        self._unread[reader] = {}

    def give(self, kind: Hashable, names: tuple[str, ...], numbers: Tensor) -> None:
        """Add the numbers of a tally to the interval of every reader.

        Args:
            kind: key of the numbers. Numbers of one kind have the same names, dtype and device.
            names: names of the tensors.
            numbers: ``[6, names]``, the fields of an ``Interval``.
        """
        for unread in self._unread.values():
            before = unread.get(kind)
            unread[kind] = names, numbers if before is None else merged(before[1], numbers)

    def take(self, reader: Any, names: Sequence[str]) -> Tensor:
        """Return the ``Interval`` of ``reader``, ``[6, names]``, and begin its next one."""
        unread, self._unread[reader] = list(self._unread[reader].values()), {}
        whole = nothing(unread[-1][1] if unread else torch.empty(0, device="cpu"), len(names))
        for names_of_part, part in unread:
            whole = merged_by_name(whole, names, part.to(whole), names_of_part)
        return whole

    def __contains__(self, reader: Any) -> bool:
        return reader in self._unread
