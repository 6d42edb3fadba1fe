"""Functions of ``test_covers.py`` that each rank runs: find the mesh that covers several."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from am_lightning.distributed.strategies.dtensor import mesh_groups, span_of_root


def cover() -> dict[str, object]:
    """Cover two halves of a mesh of 2 x 2, sum by an all-reduce in the result, and cover two roots."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "columns"))
    found = span_of_root([mesh["rows"], mesh["columns"]])
    assert found is not None
    ranks, whole = found
    total = torch.tensor(1.0 + dist.get_rank())
    dist.all_reduce(total, group=mesh_groups(whole)[0])
    other = init_device_mesh("cpu", (4,), mesh_dim_names=("all",))
    return {"ranks": sorted(ranks), "total": float(total), "roots": span_of_root([mesh["rows"], other])}
