"""Sums over several meshes use one all-reduce if one mesh covers them, in every release of torch."""

from __future__ import annotations


def test_dimensions_of_one_mesh_are_covered_by_it(pool) -> None:
    for rank in pool(4).run("tests.sharding.covers:cover"):
        assert rank == {"ranks": [0, 1, 2, 3], "total": 10.0, "roots": None}
