"""The scalars of a run, read back from its TensorBoard event files."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from am_lightning.pretrain.runtime.errors import RecipeError

PATTERN = "events.out.tfevents.*"
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """A scalar's history: steps (n,) rising, values (n,)."""

    steps: NDArray[np.int64]
    values: Floats

    @property
    def last(self) -> float:
        """The newest value."""
        return float(self.values[-1])

    @property
    def median(self) -> float:
        """The middle value: what a pause does not move."""
        return float(np.median(self.values))


def read_curves(log_dir: Path) -> dict[str, Curve]:
    """All scalars in a folder's event files by tag; see ``read_files``.

    Raises:
        RecipeError: there is no event file.
    """
    files = sorted(log_dir.glob(PATTERN))
    if not files:
        raise RecipeError(f"{log_dir} holds no event file: was the run started with a TensorBoard logger?")
    return read_files(files)


def read_files(files: Iterable[Path], *, first_step: int = 0) -> dict[str, Curve]:
    """All scalars of one run by tag.

    A resumed run has a file for each of its lives. A later file takes back what the earlier ones logged at and after
    its own first step (of its longest curve), so that every step is there once and the later life counts.

    Args:
        files: event files; the time of a file's first event orders them. Names hold whole seconds, and the number that
            ends them counts on from 9 to 10.
        first_step: what the writer calls its first step. Lightning counts from 0; here a point at n is after n steps.
    """
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of every resume
    points: dict[str, dict[int, float]] = {}
    for events in sorted(map(_loaded, files), key=_opened):
        newer = {tag: {e.step: float(e.value) for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
        if not newer:
            continue
        longest = max(newer, key=lambda tag: len(newer[tag]))
        start = min(newer[longest])
        for tag in [*points, *(tag for tag in newer if tag not in points)]:
            own = newer.get(tag, {})
            first = min([start, *own])
            points[tag] = {step: value for step, value in points.get(tag, {}).items() if step < first} | own
    return {tag: _curve(found, 1 - first_step) for tag, found in points.items() if found}


def last_picture(files: Iterable[Path], tag: str) -> bytes | None:
    """The newest PNG under ``tag``, or under it with words before it; None where there is none."""
    for events in sorted(map(_loaded, files), key=_opened, reverse=True):
        for own in events.Tags()["images"]:
            if own == tag or own.endswith(f"/{tag}"):
                return bytes(events.Images(own)[-1].encoded_image_string)
    return None


def _loaded(file: Path) -> EventAccumulator:
    events = EventAccumulator(str(file), size_guidance={"scalars": 0, "histograms": 1, "tensors": 1, "images": 1})
    return events.Reload()


def _opened(events: EventAccumulator) -> tuple[float, str]:
    try:
        return events.FirstEventTimestamp(), events.path
    except ValueError:  # nothing has been written yet
        return 0.0, events.path


def _curve(points: dict[int, float], shift: int) -> Curve:
    steps = sorted(points)
    return Curve(np.array(steps, dtype=np.int64) + shift, np.array([points[step] for step in steps]))
