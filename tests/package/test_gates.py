"""The tests that a gate runs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.gates import kept


class Item:
    def __init__(self, name: str, *marks: pytest.MarkDecorator) -> None:
        self.name = name
        self.marks = {mark.name: SimpleNamespace(args=mark.args) for mark in marks}

    def get_closest_marker(self, name: str) -> object:
        return self.marks.get(name)


KILLS, ENTRY_POINTS = pytest.mark.nightly("kills"), pytest.mark.nightly("programs")
ITEMS = [
    Item("plain"),
    Item("slow", pytest.mark.slow),
    Item("kill 1", KILLS),
    Item("kill 2", KILLS, pytest.mark.slow),
    Item("entry 1", ENTRY_POINTS),
    Item("entry 2", ENTRY_POINTS, pytest.mark.sample),
]


@pytest.mark.parametrize(
    ("gate", "names"),
    [
        ("fast", ["plain"]),
        ("full", ["plain", "slow"]),
        ("ci", ["plain", "slow", "kill 1", "entry 2"]),
        ("nightly", ["plain", "slow", "kill 1", "kill 2", "entry 1", "entry 2"]),
    ],
)
def test_a_gate_keeps(gate: str, names: list[str]) -> None:
    assert [item.name for item in kept(ITEMS, gate)] == names  # type: ignore[arg-type]
