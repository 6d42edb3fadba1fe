"""Run the chunked kernel for tensors of every size: it leaves small ones to foreach, and most tests have only those."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from am_lightning.optim.kernels.cpu import chunked

WORTH_IT: int = chunked._WORTH_IT


@contextmanager
def chunked_for_every_size() -> Iterator[None]:
    """Use the chunked kernel for all sizes in this process alone."""
    before, chunked._WORTH_IT = chunked._WORTH_IT, 0
    try:
        yield
    finally:
        chunked._WORTH_IT = before
