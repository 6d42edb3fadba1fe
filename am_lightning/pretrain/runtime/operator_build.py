"""A message before DeepSpeed compiles its operator, which takes a minute or more without output."""

from __future__ import annotations

import sys
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only


@rank_zero_only
def announce_deepspeed_build() -> None:
    """Print on rank 0 that DeepSpeed is about to compile its communication operator, if it is not compiled yet.

    DeepSpeed compiles it only on a CPU, in ``init_distributed``, into ``TORCH_EXTENSIONS_DIR``. A process that finds
    the lock of another one there waits until it is removed, even if the other process was killed.
    """
    from deepspeed.accelerator import get_accelerator
    from deepspeed.git_version_info import installed_ops
    from torch.utils.cpp_extension import _get_build_directory

    # The only operator that is compiled at the start: neither torch's optimizers nor ours need cpu_adam.
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or installed_ops.get(builder.name) or not builder.is_compatible(verbose=False):
        return
    folder = Path(_get_build_directory(builder.name, verbose=False))
    lock = folder / "lock"
    if lock.exists():
        text = f"DeepSpeed waits for another process that compiles {builder.name}. Remove {lock} if there is none."
    elif (folder / f"{builder.name}.so").exists():
        return
    else:
        text = (
            f"DeepSpeed compiles {builder.name}, its communication operator for CPUs, in {folder}. This happens once "
            f"and takes about a minute. If this start is killed meanwhile, remove {lock}."
        )
    print(text, file=sys.stderr, flush=True)
