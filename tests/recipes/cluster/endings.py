"""Endings of runs over two nodes: each program trains, and no agent restarts its processes after the end.

    python -m tests.recipes.cluster.endings --times 6

It needs root and iproute2. Two network namespaces with an agent of launch/torchrun.sh each run the laptop recipe with a
tiny model for 40 steps. Kinds: a run that finishes, `validate` of its checkpoint, a run that both agents' SIGTERM ends,
and one that an error ends (a batch that two processes cannot share). Agents may not restart processes, so that a
process which fails on its way out makes its agent fail. It prints a table and exits with 1 if a run ended otherwise.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.ports import free_port
from tests.processes import wait_until
from tests.python import COLD  # a fork server would start processes outside their namespace
from tests.recipes.commands import RECIPES, TINY

from . import namespaces
from .fault_injection import corpus
from .namespaces import Node
from .runs import Agents, options, variables

PROGRAMS = ("pretrain.py", "pretrain_accelerate.py", "pretrain_hf_trainer.py")
KINDS = ("finished", "validate", "SIGTERM", "error")
TIMEOUT = 240.0  # seconds of one run


def end(nodes: Sequence[Node], root: Path, source: Path, program: str, kind: str) -> str:
    """Run once; return "" if it ended as it must, and otherwise what happened."""
    if kind == "validate":
        return _validate(nodes, root, source)
    steps = 40 if kind != "SIGTERM" else 100_000
    more = ["--data.batch_size", "3"] if kind == "error" else []
    agents = Agents(nodes, root, [*options(source, steps, 20), *more], PROGRAM=str(RECIPES / program), MAX_RESTARTS="0")
    if kind == "SIGTERM":
        wait_until(lambda: any((root / "checkpoints").glob("*[0-9]*")), f"no checkpoint\n{agents.tail()}")
        for process in agents.processes:
            process.terminate()
    states = agents.end(TIMEOUT)
    said = agents.tail()
    wanted = {"finished": "validation loss", "SIGTERM": "stopped by SIGTERM", "error": "error: data.batch_size 3"}
    right = states == [0, 0] if kind == "finished" else 0 not in states
    return "" if right and wanted[kind] in said else f"ended with {states}\n{said}"


def _validate(nodes: Sequence[Node], root: Path, source: Path) -> str:
    """Validate a finished run's checkpoint. The launchers only start `fit`, so torchrun's own command is used."""
    settings = {**TINY, "data.source": source, "trainer.default_root_dir": root, "trainer.num_nodes": 2}
    words = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    port, started = str(free_port()), []
    logs = [root.with_name(f"{root.name}.validate{i}.log") for i in range(2)]
    for rank, node in enumerate(nodes):
        command = [COLD, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(rank), "--nproc-per-node"]
        command += ["1", "--master-addr", nodes[0].address, "--master-port", port, str(RECIPES / "pretrain.py")]
        command += ["validate", "--config", "laptop", "--ckpt_path", "last", "--trainer.devices", "1", *words]
        env = variables(root, GLOO_SOCKET_IFNAME=namespaces.INTERFACE, TP_SOCKET_IFNAME=namespaces.INTERFACE)
        started.append(node.start(command, env, logs[rank]))
    states = [process.wait(TIMEOUT) for process in started]
    said = "\n".join(log.read_text() for log in logs)
    return "" if states == [0, 0] and "validation loss" in said else f"ended with {states}\n{said[-6000:]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=6)
    parser.add_argument("--programs", nargs="+", default=PROGRAMS, choices=PROGRAMS)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    args = parser.parse_args()
    if reason := namespaces.missing():
        sys.exit(f"error: {reason}")
    right, tried = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    with tempfile.TemporaryDirectory(prefix="am-endings-") as made, namespaces.two_nodes() as nodes:
        source = corpus(Path(made))
        for number in range(args.times):
            for program in args.programs:
                for kind in args.kinds:
                    if kind == "validate" and program != "pretrain.py":
                        continue
                    name = f"{number}-{program}" + ("" if kind in ("finished", "validate") else f"-{kind}")
                    began = time.monotonic()
                    problem = end(nodes, Path(made, name), source, program, kind)
                    tried[program, kind] += 1
                    right[program, kind] += not problem
                    print(f"{program} {kind}: {problem or 'right'} ({time.monotonic() - began:.0f} s)", flush=True)
    print("\n| program | ending | runs | right |\n|---|---|---|---|")
    for program, kind in tried:
        print(f"| {program} | {kind} | {tried[program, kind]} | {right[program, kind]} |")
    return int(right != tried)


if __name__ == "__main__":
    sys.exit(main())
