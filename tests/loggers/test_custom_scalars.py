"""TensorBoard's Custom Scalars layout, which several programs write: TensorBoard shows the last one written."""

from __future__ import annotations

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from am_lightning.loggers.custom_scalars import add_custom_scalars
from tests.huggingface.events import pages_in

LOSS = {"training": {"loss": ["Multiline", ["^loss$"]]}}
MOMENTUM = {"momentum": {"beta_t": ["Margin", ["train/am/beta/mean", "train/am/beta/min", "train/am/beta/max"]]}}


def test_what_is_written_later_leaves_what_is_there(tmp_path: Path) -> None:
    """This holds for the same board and no other; an equal layout is not written again."""
    one, other = SummaryWriter(tmp_path / "one"), SummaryWriter(tmp_path / "other")
    for pages in (LOSS, MOMENTUM, LOSS, MOMENTUM):
        add_custom_scalars(one, pages)
    add_custom_scalars(other, LOSS)
    one.close(), other.close()
    first, last = pages_in(tmp_path / "one")
    assert first == {"training": {"loss": ["^loss$"]}}
    edges = ["train/am/beta/floor", "train/am/beta/cap"]  # they extend the axis
    assert last == first | {"momentum": {"beta_t": ["train/am/beta/mean", *edges]}}
    assert pages_in(tmp_path / "other") == [first]
