"""TensorBoard's Custom Scalars page, which several write: the last to write is what TensorBoard shows."""

from __future__ import annotations

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from am_lightning.loggers.custom_scalars import add_custom_scalars
from tests.huggingface.events import pages_in

LOSS = {"training": {"loss": ["Multiline", ["^loss$"]]}}
MOMENTUM = {"momentum": {"beta_t": ["Margin", ["train/am/beta/mean", "train/am/beta/min", "train/am/beta/max"]]}}


def test_what_is_written_later_leaves_what_is_there(tmp_path: Path) -> None:
    """On the same board, and not on another one; the same page is not written again."""
    one, other = SummaryWriter(tmp_path / "one"), SummaryWriter(tmp_path / "other")
    for pages in (LOSS, MOMENTUM, LOSS, MOMENTUM):
        add_custom_scalars(one, pages)
    add_custom_scalars(other, LOSS)
    one.close(), other.close()
    first, last = pages_in(tmp_path / "one")
    assert first == {"training": {"loss": ["^loss$"]}}
    edges = ["train/am/beta/floor", "train/am/beta/cap"]  # which the axis reaches to
    assert last == first | {"momentum": {"beta_t": ["train/am/beta/mean", *edges]}}
    assert pages_in(tmp_path / "other") == [first]
