"""Start real processes with torch's launcher, as users do."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.python import PYTHON

ROOT = Path(__file__).resolve().parents[2]


def launch(module: str, folder: Path, *, processes: int, timeout: float = 150, **job: Any) -> list[Any]:
    """Run ``python -m module JOB.json`` on ``world`` processes; return what each saved to ``JOB.json.rank<r>.pt``.

    The exit code is not checked, because gloo sometimes aborts at exit, after the results have been written.
    """
    path = folder / f"job-{processes}.json"
    path.write_text(json.dumps({"folder": str(folder), **job}))
    env = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_PORT")}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [PYTHON, *torchrun, "-m", module, str(path)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)
    results = [Path(f"{path}.rank{rank}.pt") for rank in range(processes)]
    assert all(result.exists() for result in results), f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return [torch.load(result, weights_only=False) for result in results]


def finish(results: dict[str, Any], path: Path) -> None:
    """Save this rank's results for :func:`launch` as the last act of a launched program."""
    torch.save(results, f"{path}.rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()
