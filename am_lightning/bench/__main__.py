"""Step times of AMAdamW and torch.optim.AdamW, each in all its forms, in one process."""

from __future__ import annotations

import argparse
import json
import shlex
import sys

from am_lightning.bench.models import LLAMAS, MODELS, row_of, shapes_of
from am_lightning.bench.peers import OFFLOAD, PEERS
from am_lightning.bench.table import LEGEND, text_of

TOKENS = {"cpu": 512, "accelerator": 16384}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the checked command line."""
    parser = argparse.ArgumentParser(prog="python -m am_lightning.bench", description=__doc__)
    parser.add_argument(
        "--model",
        default="llama60m",
        help=f"model of the parameters: {', '.join(sorted(MODELS))}; or tensors:NxM, N tensors of M elements",
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float64"], default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's default")
    parser.add_argument("--repeats", type=int, default=10, help="timed rounds, at least 1")
    parser.add_argument(
        "--weight-decay", type=float, default=0.1, help="weight decay; 0 saves one read of the parameters"
    )
    parser.add_argument("--scope", choices=["tensor", "group", "global"], default="tensor")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="TEXT",
        default=[],
        help="only optimizers whose name contains one of these, and AdamW fused",
    )
    parser.add_argument("--without", nargs="+", metavar="TEXT", default=[], help="leave these out, except AdamW fused")
    parser.add_argument(
        "--peers",
        "--others",
        action="store_true",
        help=f"also optimizers of other packages: {', '.join(p.name for p in PEERS)}",
    )
    parser.add_argument("--deepspeed", action="store_true", help=f"also {OFFLOAD.name}, on a CPU; its build takes 40 s")
    parser.add_argument(
        "--tokens",
        type=int,
        help="tokens of the training step (forward, backward and optimizer) of which the share is printed; 0: none. "
        "Default: 512 on a CPU, 16384 elsewhere",
    )
    parser.add_argument(
        "--in-training",
        action="store_true",
        help="run a forward and a backward pass of a row of --tokens before each timed step, as training does: caches "
        "and freed memory are then those of a training step",
    )
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count CPU seconds of all threads, for ratios on a machine that is busy with other work (set "
        "OMP_WAIT_POLICY=passive, so that waiting threads do not count)",
    )
    parser.add_argument("--cold", action="store_true", help="build all kernels again, in an empty cache")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--reduce",
        action="store_true",
        help="instead measure bytes and latency of the reduction of a step, under torchrun",
    )
    return _checked(parser, arguments)


def _checked(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    options = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    options.command = shlex.join(["python", "-m", "am_lightning.bench", *(word for word in given if word != "--json")])
    try:
        shapes_of(options.model)
    except ValueError as error:
        parser.error(f"--model {error}")
    if options.repeats < 1 or options.threads < 0:
        parser.error(f"--repeats must be >= 1 and --threads >= 0, but got {options.repeats} and {options.threads}")
    if not options.weight_decay >= 0:
        parser.error(f"--weight-decay must be >= 0, but got {options.weight_decay}")
    import torch  # takes seconds, which --help and most errors do not need

    try:
        options.device = torch.device(options.device)
        torch.empty(1, device=options.device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        parser.error(f"--device {options.device} cannot be used: {str(error).partition(chr(10))[0]}")
    if options.deepspeed and options.device.type != "cpu":
        parser.error(f"--deepspeed steps parameters on a CPU, not on {options.device}: leave it out")
    if options.cpu_time and options.device.type != "cpu":
        parser.error(f"--cpu-time does not measure a step on {options.device}: leave it out")
    if options.tokens is None:
        options.tokens = TOKENS["cpu" if options.device.type == "cpu" else "accelerator"]
    if options.tokens < 0 or (options.tokens and options.tokens % row_of(options.tokens)):
        parser.error(f"--tokens must be 0, at most {row_of(options.tokens)}, or a multiple of it, not {options.tokens}")
    if options.in_training and not (options.tokens and options.model in LLAMAS):
        parser.error(f"--in-training needs --tokens > 0 and one of the models {', '.join(LLAMAS)}")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Measure and print a comparison; `arguments` defaults to the command line."""
    options = parse(arguments)
    import torch

    from am_lightning.bench import reduce
    from am_lightning.bench.comparison import frozen_garbage, kernel_caches, run

    if options.threads:
        torch.set_num_threads(options.threads)
    if options.reduce:
        reduce.run(options.device, options.repeats)
        return
    with kernel_caches(empty=options.cold), frozen_garbage():
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


if __name__ == "__main__":
    main()
