"""Run a program of recipes/ in which something happens on one rank, as the variable AM_ONE_RANK describes it.

AM_ONE_RANK is the JSON of `Event`. Every rank writes FOLDER/rank-R.jsonl: for each micro-batch a line with the loss and
a hash of the weights that this rank holds before the step.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
import runpy
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.recipes.commands import RECIPES

VARIABLE = "AM_ONE_RANK"
MEBIBYTE = 1 << 20
GRADIENT = "model.norm.weight"  # in the parameter group without weight decay, which is stepped last


@dataclass(frozen=True)
class Event:
    """A fault of one rank.

    Args:
        program: a file of recipes/.
        folder: where the ranks write.
        kind: "nan" (the loss), "gradient" (one tensor's gradient is NaN); in the first start alone "raise", "limit" (no
            memory by RLIMIT_AS), "oom" (the kernel's OOM killer in `cgroup`); or "".
        cgroup: a memory cgroup with a limit.
        rank: where.
        batches: numbers of micro-batches, counted from the start of the process.
    """

    program: str
    folder: str
    kind: str = ""
    cgroup: str = ""
    rank: int = 1
    batches: tuple[int, ...] = ()


class Training:
    """Stands for token_loss and build_llama, which all three programs use."""

    def __init__(self, event: Event) -> None:
        from am_lightning.pretrain.model import network

        self.event, self.network, self.batch = event, network, -1
        self.build, self.loss = network.build_llama, network.token_loss
        self.models: list[Any] = []  # a program also builds one on the meta device, to check the optimizer
        network.build_llama, network.token_loss = self.build_llama, self.token_loss

    @property
    def due(self) -> bool:
        return self.batch in self.event.batches and int(os.environ.get("RANK", "0")) == self.event.rank

    def build_llama(self, shape: Any) -> Any:
        model = self.build(shape)
        self.models.append(model)
        if self.event.kind == "gradient":
            model.get_parameter(GRADIENT).register_hook(lambda grad: grad * float("nan") if self.due else grad)
        return model

    def token_loss(self, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        loss = self.loss(logits, tokens)
        if not torch.is_grad_enabled():  # a validation
            return loss
        self.batch += 1
        if self.due and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            self.end()
        if self.due and self.event.kind == "nan":
            loss = loss * float("nan")
        self.write(float(loss))
        return loss

    def end(self) -> None:
        if self.event.kind == "raise":
            raise ValueError("raised on one rank")
        if self.event.kind == "limit":
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MEBIBYTE, used + MEBIBYTE))
            torch.zeros(1024 * MEBIBYTE, dtype=torch.uint8)
        if self.event.kind == "oom":
            Path(self.event.cgroup, "cgroup.procs").write_text(str(os.getpid()))
            torch.ones(1024 * MEBIBYTE, dtype=torch.uint8)

    def write(self, loss: float) -> None:
        digest = hashlib.sha256()
        trained = next(model for model in self.models if not next(model.parameters()).is_meta)
        for param in trained.parameters():
            kept = getattr(param, "ds_tensor", param).detach()  # under ZeRO 3 each rank keeps a part
            digest.update(kept.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        line = {"batch": self.batch, "loss": loss, "weights": digest.hexdigest()[:16]}
        path = Path(self.event.folder, f"rank-{os.environ.get('RANK', '0')}.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")


@contextlib.contextmanager
def memory_cgroup() -> Iterator[Path | None]:
    """Return a cgroup whose processes may take 200 MiB more, or None if none can be made."""
    old = Path("/sys/fs/cgroup/memory")
    folder = (old if old.is_dir() else old.parent) / f"am-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / ("memory.limit_in_bytes" if old.is_dir() else "memory.max")).write_text(str(200 * MEBIBYTE))
    except OSError:
        yield None
        return
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()


def read(folder: Path) -> list[list[dict[str, Any]]]:
    """The lines of every rank."""
    paths = sorted(folder.glob("rank-*.jsonl"))
    return [[json.loads(line) for line in path.read_text().splitlines()] for path in paths]


def main() -> None:
    event = Event(**json.loads(os.environ[VARIABLE]))
    Training(event)
    program = str(RECIPES / event.program)
    sys.argv[0] = program
    sys.path.insert(0, str(RECIPES))
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main()
