"""A message before DeepSpeed compiles, which it does in silence for a minute or more."""

from __future__ import annotations

import sys
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

_OPERATOR = "ShareMemCommBuilder"  # the only one that a start compiles: torch's optimizers and ours need no cpu_adam


@rank_zero_only
def announce_deepspeed_build() -> None:
    """Say on rank 0 that DeepSpeed is about to compile its communication operator, where it is not compiled yet.

    DeepSpeed compiles it on a CPU alone, in ``init_distributed``, into ``TORCH_EXTENSIONS_DIR``. A process that finds
    another's lock there waits until it is gone, also where the other process was killed.
    """
    from deepspeed.accelerator import get_accelerator
    from deepspeed.git_version_info import installed_ops
    from torch.utils.cpp_extension import _get_build_directory

    builder = get_accelerator().create_op_builder(_OPERATOR)
    if builder is None or installed_ops.get(builder.name) or not builder.is_compatible(verbose=False):
        return
    folder = Path(_get_build_directory(builder.name, verbose=False))
    lock = folder / "lock"
    if lock.exists():
        text = f"DeepSpeed waits for another process that compiles {builder.name}. Remove {lock} if there is none."
    elif not (folder / f"{builder.name}.so").exists():
        text = (
            f"DeepSpeed compiles {builder.name}, its communication operator for CPUs, in {folder}. This happens once "
            f"and takes about a minute. If this start is killed meanwhile, remove {lock}."
        )
    else:
        return
    print(text, file=sys.stderr, flush=True)
