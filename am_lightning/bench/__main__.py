"""Step time of AMAdamW beside torch.optim.AdamW, all ways to step in turn in one process."""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from am_lightning.bench import reduce
from am_lightning.bench.contenders import Contender, import_all, make_contenders, make_parameters
from am_lightning.bench.measure import measure
from am_lightning.bench.models import LLAMAS, MODELS, forward_and_backward_seconds, row_of, shapes_of
from am_lightning.bench.peers import OFFLOAD, PEERS, make_peers
from am_lightning.bench.table import BASE, LEGEND, device_words, rows_of, text_of

CACHES = ("TORCH_EXTENSIONS_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
TOKENS = {"cpu": 512, "accelerator": 16384}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(prog="python -m am_lightning.bench", description=__doc__)
    parser.add_argument(
        "--model",
        default="llama60m",
        help=f"whose parameters are stepped: {', '.join(sorted(MODELS))}; or tensors:NxM, N tensors of M elements",
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float64"], default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's default")
    parser.add_argument("--repeats", type=int, default=10, help="timed rounds, at least 1")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="0 saves a word of memory traffic")
    parser.add_argument("--scope", choices=["tensor", "group", "global"], default="tensor")
    parser.add_argument(
        "--only", nargs="+", metavar="TEXT", default=[], help="optimizers whose name has one of these, and AdamW fused"
    )
    parser.add_argument("--without", nargs="+", metavar="TEXT", default=[], help="leave these out, but AdamW fused")
    parser.add_argument(
        "--peers", "--others", action="store_true", help=f"also what others have: {', '.join(p.name for p in PEERS)}"
    )
    parser.add_argument("--deepspeed", action="store_true", help=f"also {OFFLOAD.name}, on a CPU; builds it, in 40 s")
    parser.add_argument(
        "--tokens",
        type=int,
        help="of the training step whose share is printed, forward and backward included; 0: none. Default: 512 on a "
        "CPU, 16384 elsewhere",
    )
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count CPU seconds of all threads: for ratios on a machine that is busy with other work (set "
        "OMP_WAIT_POLICY=passive, so that waiting threads do not count)",
    )
    parser.add_argument("--cold", action="store_true", help="build all kernels anew, in an empty cache")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--reduce", action="store_true", help="instead: bytes and latency of the reduction of a step, under torchrun"
    )
    return _checked(parser, arguments)


def _checked(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    options = parser.parse_args(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    options.command = shlex.join(["python", "-m", "am_lightning.bench", *(w for w in words if w != "--json")])
    try:
        shapes_of(options.model)
    except ValueError as error:
        parser.error(f"--model {error}")
    if options.repeats < 1 or options.threads < 0:
        parser.error(f"--repeats must be >= 1 and --threads >= 0, but got {options.repeats} and {options.threads}")
    if not options.weight_decay >= 0:
        parser.error(f"--weight-decay must be >= 0, but got {options.weight_decay}")
    try:
        options.device = torch.device(options.device)
        torch.empty(1, device=options.device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        parser.error(f"--device {options.device} cannot be used: {str(error).partition(chr(10))[0]}")
    if options.deepspeed and options.device.type != "cpu":
        parser.error(f"--deepspeed steps parameters on a CPU, not on {options.device}: leave it out")
    if options.cpu_time and options.device.type != "cpu":
        parser.error(f"--cpu-time says nothing of a step on {options.device}: leave it out")
    if options.tokens is None:
        options.tokens = TOKENS["cpu" if options.device.type == "cpu" else "accelerator"]
    if options.tokens < 0 or (options.tokens and options.tokens % row_of(options.tokens)):
        parser.error(f"--tokens must be 0, at most {row_of(options.tokens)}, or a multiple of it, not {options.tokens}")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Measure and print; the arguments default to the command line's."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.reduce:
        reduce.run(options.device, options.repeats)
        return
    with _caches(empty=options.cold), _collected():
        report = run(options)
    if options.json:
        print(json.dumps(report))
        return
    print(f"{options.model}, {report['elements']:,} elements in {report['tensors']} tensors, {options.dtype}")
    clock = "CPU seconds of all threads" if options.cpu_time else "seconds on the clock"
    print(f"{report['hardware']}, torch {torch.__version__}; {options.repeats} rounds, {clock}\n")
    print(f"{text_of(report['rows'])}\n\n{LEGEND}")
    if report["training seconds"] is not None:
        print(f"Training step: {options.tokens:,} tokens, {report['training seconds']:.2f} s without the optimizer.")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """What ``--json`` prints."""
    device, dtype = options.device, getattr(torch, options.dtype)
    params = make_parameters(shapes_of(options.model), dtype, device)
    wanted, missing = _contenders(params, options)
    training = None if options.model not in LLAMAS or not options.tokens else _training_seconds(options, dtype)
    measured, failed = measure(wanted, options.repeats, device, cpu_time=options.cpu_time)
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
    """Those that ``--only`` and ``--without`` leave, and why others are missing.

    Raises:
        SystemExit: one of their words is in no name.
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


def _training_seconds(options: argparse.Namespace, dtype: torch.dtype) -> float | None:
    try:
        return forward_and_backward_seconds(options.model, options.tokens, dtype, options.device)
    except ImportError as error:
        print(
            f"no training step, for {error}: pip install 'am-lightning[recipes]', or '.[recipes]' in a checkout",
            file=sys.stderr,
        )
        return None


@contextmanager
def _caches(*, empty: bool) -> Iterator[None]:
    """Where kernels are built: where they always are, or in an empty folder."""
    if not empty:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="am_lightning_bench_", ignore_cleanup_errors=True) as folder:
        for name in CACHES:
            os.environ[name] = os.path.join(folder, name.lower())
        yield


@contextmanager
def _collected() -> Iterator[None]:
    """What is imported by now is not looked through again at the cost of whoever makes many objects."""
    import_all()
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


if __name__ == "__main__":
    main()
