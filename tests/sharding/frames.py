"""Count the frames of the call stack that the package looks at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from unittest.mock import patch

from am_lightning.distributed import call_stack


@contextmanager
def count_frames() -> Iterator[list[int]]:
    """Yield a count that grows."""
    counter, frames = [0], call_stack._frames

    def counted() -> Iterator[FrameType]:
        for frame in frames():
            counter[0] += 1
            yield frame

    with patch.object(call_stack, "_frames", counted):
        yield counter
