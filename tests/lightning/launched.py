"""``python -m tests.lightning.launched FOLDER``: a program whose second rank Lightning's launcher starts."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.lightning.cluster import fit


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    results = {placed: fit(placed, world=2) for placed in ("fsdp1", "fsdp2", "ddp")}
    torch.save(results, folder / f"rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
