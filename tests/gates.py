"""Select the tests of a gate: tests/run.sh --fast, tests/run.sh itself, .ci/run and --nightly."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import pytest

GATES = ("fast", "full", "ci", "nightly")

GPU_TESTS = Path(__file__).resolve().parent / "gpu"
DEVICE_VARIABLE = "AM_GPU_TESTS_DEVICE"  # "cpu": tests/gpu is rehearsed there


def asks_for_gpu(paths: Sequence[str], folder: Path) -> bool:
    """Return whether pytest was given tests/gpu and nothing else: all other tests start programs that take the GPU."""
    places = [(folder / path.partition("::")[0]).resolve() for path in paths]
    return bool(places) and all(place.is_relative_to(GPU_TESTS) for place in places)


def let_see_gpu(paths: Sequence[str], folder: Path) -> bool:
    """Show the GPU to tests/gpu alone, and hide it in a rehearsal. Call it before any process or CUDA is started.

    Returns:
        Whether it is shown.
    """
    shown = asks_for_gpu(paths, folder) and os.environ.setdefault(DEVICE_VARIABLE, "cuda") != "cpu"
    if not shown:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return shown


def kept(items: list[pytest.Item], gate: str) -> list[pytest.Item]:
    """Return the tests of a gate.

    - fast: those that are marked neither ``slow`` nor ``nightly``.
    - full: all except ``nightly`` ones.
    - ci: those of full, and of each kind of nightly test the one marked ``sample``, or else the first.
    - nightly: all.
    """
    if gate == "nightly":
        return items
    chosen = set(samples(items)) if gate == "ci" else set()
    hidden = ("slow", "nightly") if gate == "fast" else ("nightly",)
    return [item for item in items if item in chosen or not any(item.get_closest_marker(name) for name in hidden)]


def samples(items: list[pytest.Item]) -> list[pytest.Item]:
    """Return one test of each kind of nightly test, or those marked as its samples."""
    kinds: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if marker := item.get_closest_marker("nightly"):
            kinds[marker.args[0]].append(item)
    return [
        item
        for several in kinds.values()
        for item in ([item for item in several if item.get_closest_marker("sample")] or several[:1])
    ]
