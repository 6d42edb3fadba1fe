"""Where every process of a stream is: gathered into a checkpoint, and found again in it."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from am_lightning.pretrain.data.stream import Position, StreamLoader
from am_lightning.pretrain.runtime.errors import RecipeError


class StreamState:
    """The positions of the stream that this process reads, as a checkpoint holds them: those of all processes."""

    def __init__(self) -> None:
        self._loader: StreamLoader | None = None
        self._mine: dict[str, int] = {}
        self._saved: dict[str, Any] | None = None

    def follow(self, loader: StreamLoader, rank: int, world_size: int, accumulate: int) -> None:
        """From now on the positions are those of `loader`."""
        self._loader = loader
        self._mine = {"rank": rank, "world_size": world_size, "accumulate": accumulate}

    def gather(self, step: int | None) -> dict[str, Any]:
        """The positions of all processes behind `step`, or behind the newest one handed out; every process calls it.

        Returns:
            step, world_size, accumulate, and in `positions` for every rank a list of [part, document, token].
        """
        positions = self._loader.positions if self._loader else {}
        if not positions:  # nothing was read since the checkpoint was loaded, or ever
            return self._saved or {"step": 0}
        step = max(positions) if step not in positions else step
        mine = (step, self._mine["rank"], [list(position) for position in positions[step]])
        every = [mine]
        if dist.is_available() and dist.is_initialized():
            every = [mine] * dist.get_world_size()
            dist.all_gather_object(every, mine)
        by_rank = {rank: (at, found) for at, rank, found in every}
        if {at for at, _ in by_rank.values()} != {step} or len(by_rank) != self._mine["world_size"]:
            raise RuntimeError(f"the processes are not at the same step: {every}")
        return {
            "step": step,
            "world_size": self._mine["world_size"],
            "accumulate": self._mine["accumulate"],
            "positions": [by_rank[rank][1] for rank in sorted(by_rank)],
        }

    def load(self, saved: dict[str, Any]) -> None:
        """Take over what `gather` gave in an earlier run."""
        self._saved, self._loader = saved, None

    def at(self, step: int, rank: int, world_size: int, accumulate: int, readers: int) -> list[Position]:
        """The positions of the readers of `rank` behind `step`.

        Raises:
            RecipeError: the checkpoint is of another number of processes or micro-batches, or of another step.
        """
        live = self._loader.positions if self._loader else {}
        if step in live:  # the same run, iterated again
            return live[step]
        if step == 0:
            return [Position()] * readers
        saved = self._saved or {"step": 0}
        if saved["step"] != step:
            raise RecipeError(
                f"data.mode stream cannot begin at step {step}: the checkpoint holds its position behind step"
                f" {saved['step']}. Go on from a checkpoint that was saved with data.mode stream."
            )
        for name, value in {"world_size": world_size, "accumulate": accumulate}.items():
            if saved[name] != value and (name == "world_size" or readers > 1):
                raise _refused(name, saved[name], value)
        return [Position(*position) for position in saved["positions"][rank]]


def _refused(name: str, saved: int, value: int) -> RecipeError:
    words = {"world_size": "processes", "accumulate": "micro-batches in a step"}[name]
    return RecipeError(
        f"data.mode stream: the checkpoint holds the positions of {saved} {words}, this run has {value}. Go on with"
        f" {saved}. The order of shards fits any number: recipes/prepare_data.py, data.mode shards and a new run."
    )
