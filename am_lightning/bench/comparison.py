"""The comparison of optimizers in one process."""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from am_lightning.bench.contenders import Contender, import_all, make_contenders, make_parameters
from am_lightning.bench.measure import measure
from am_lightning.bench.models import LLAMAS, make_passes, row_of, seconds_of, shapes_of
from am_lightning.bench.peers import OFFLOAD, PEERS, make_peers
from am_lightning.bench.table import BASE, device_words, rows_of

CACHES = ("TORCH_EXTENSIONS_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Return what ``--json`` prints, for the checked command line."""
    device, dtype = options.device, getattr(torch, options.dtype)
    params = make_parameters(shapes_of(options.model), dtype, device)
    wanted, missing = _contenders(params, options)
    passes = None if options.model not in LLAMAS or not options.tokens else _passes(options, dtype)
    training = passes and seconds_of(passes) * (options.tokens // row_of(options.tokens))
    if options.in_training and passes is None:
        sys.exit("error: --in-training needs the training step")
    if not options.in_training:
        passes = None
    measured, failed = measure(wanted, options.repeats, device, cpu_time=options.cpu_time, passes=passes)
    for name, reason in (missing | failed).items():
        print(f"{name} is left out: {reason}", file=sys.stderr)
    return {
        **vars(options),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "hardware": device_words(device),
        "torch": torch.__version__,
        "tensors": len(params),
        "elements": sum(p.numel() for p in params),
        "training seconds": training,
        "rows": rows_of(measured, training),
        "left out": missing | failed,
    }


def _contenders(
    params: list[torch.nn.Parameter], options: argparse.Namespace
) -> tuple[list[Contender], dict[str, str]]:
    """Return the optimizers that ``--only`` and ``--without`` leave, and why others are missing.

    Raises:
        SystemExit: if no name contains one of their words.
    """
    found, missing = make_contenders(params, decay=options.weight_decay, scope=options.scope, device=options.device)
    wanted_peers = [*(PEERS if options.peers else ()), *([OFFLOAD] if options.deepspeed else ())]
    if wanted_peers:
        peers, lacking = make_peers(params, decay=options.weight_decay, peers=wanted_peers)
        found, missing = [*found, *peers], missing | lacking
    names = [*(each.name for each in found), *missing]
    for text in [*options.only, *options.without]:
        if not any(text in name for name in names):
            sys.exit(f"error: {text!r} is in no name of {', '.join(names)}")
    out = [name for name in names if name != BASE and any(text in name for text in options.without)]
    kept = [name for name in names if name == BASE or not options.only or any(text in name for text in options.only)]
    wanted = [each for each in found if each.name in kept and each.name not in out]
    return wanted, {name: why for name, why in missing.items() if name not in out}


def _passes(options: argparse.Namespace, dtype: torch.dtype) -> Callable[[], None] | None:
    try:
        return make_passes(options.model, options.tokens, dtype, options.device)
    except ImportError as error:
        print(
            f"no training step, because {error}: pip install 'am-lightning[recipes]', or '.[recipes]' in a checkout",
            file=sys.stderr,
        )
        return None


@contextmanager
def kernel_caches(*, empty: bool) -> Iterator[None]:
    """Build kernels in an empty folder, if ``empty``, instead of the usual caches."""
    if not empty:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="am_lightning_bench_", ignore_cleanup_errors=True) as folder:
        for name in CACHES:
            os.environ[name] = os.path.join(folder, name.lower())
        yield


@contextmanager
def frozen_garbage() -> Iterator[None]:
    """Exclude what is imported from garbage collection, whose time would count for optimizers that create objects."""
    import_all()
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
