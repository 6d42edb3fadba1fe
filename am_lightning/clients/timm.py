"""timm: the import registers the optimizers ``amadamw`` and ``amsgd``. As a program it starts timm's ``train.py``.

torchrun --nproc_per_node=4 -m am_lightning.clients.timm train.py --opt amadamw --opt-betas 0.89 0.999 ...
"""

from __future__ import annotations

import os
import runpy
import sys
from typing import Any

import torch.distributed as dist

from am_lightning.optional_imports import cause_of

try:
    from timm.optim import OptimInfo
    from timm.optim._optim_factory import default_registry
except ImportError as error:
    raise ImportError(f"am_lightning.clients.timm needs timm 1.0 or later: pip install timm ({error})") from cause_of(
        error, "timm"
    )

from am_lightning.distributed.shard import world_size
from am_lightning.optim import AMSGD, AMAdamW


def amadamw(params: Any, **options: Any) -> AMAdamW:
    """Return AMAdamW, with ``replica_group`` under DDP, which timm starts before it creates its optimizer."""
    return AMAdamW(params, **_replicas(), **options)


def amsgd(params: Any, momentum: float = 0.9, **options: Any) -> AMSGD:
    """Return AMSGD with timm's ``--momentum`` as its cap."""
    return AMSGD(params, beta_max=momentum, **_replicas(), **options)


def _replicas() -> dict[str, Any]:
    return {"replica_group": dist.group.WORLD} if world_size() > 1 else {}


for _info in (
    OptimInfo("amadamw", amadamw, "AdamW whose beta1 is computed at every step, up to a cap", has_betas=True),
    OptimInfo("amsgd", amsgd, "SGD whose momentum is computed at every step", has_eps=False, has_momentum=True),
):
    default_registry.register(_info)


def main() -> None:
    """Run the script that is the first argument with the other arguments."""
    if len(sys.argv) < 2:
        sys.exit("usage: python -m am_lightning.clients.timm train.py [its arguments]")
    del sys.argv[0]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
