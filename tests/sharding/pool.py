"""Processes of one gloo group that stay up and run functions by name: a test costs milliseconds, not a launch."""

from __future__ import annotations

import faulthandler
import importlib
import multiprocessing as mp
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from tests.ports import free_port

CONTEXT = mp.get_context("spawn")


class RankError(Exception):
    """What a rank raised: ``kind`` is the exception's class, ``text`` its message."""

    def __init__(self, rank: int, kind: str, text: str, trace: str) -> None:
        super().__init__(f"rank {rank}: {kind}: {text}\n{trace}")
        self.rank, self.kind, self.text = rank, kind, text


class HangError(Exception):
    """Some rank did not answer in time; the others did."""


class Pool:
    """``world`` ranks. A hang or a death kills all of them; the next run starts new ones."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._ranks: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, function: str, *, timeout: float = 90, **arguments: Any) -> list[Any]:
        """``module:name`` called with ``arguments`` on every rank; its results by rank.

        Raises:
            RankError: the first rank's exception, when any raised.
            HangError: no answer in time.
        """
        answers = self.attempt(function, timeout=timeout, **arguments)
        for answer in answers:
            if isinstance(answer, RankError):
                raise answer
        return answers

    def attempt(self, function: str, *, timeout: float = 90, **arguments: Any) -> list[Any]:
        """As :meth:`run`, but a rank's exception is its answer."""
        self._start()
        for pipe in self._pipes:
            pipe.send((function, arguments))
        deadline = time.monotonic() + timeout
        answers: list[Any] = []
        for rank, pipe in enumerate(self._pipes):
            try:
                if not pipe.poll(max(0.0, deadline - time.monotonic())):
                    raise HangError(f"{function}{arguments}: rank {rank} gave no answer within {timeout} s")
                answers.append(pipe.recv())
            except (HangError, EOFError, ConnectionError):
                self.stop(dump=True)
                raise
        return [RankError(r, *a[1:]) if a[0] == "error" else a[1] for r, a in enumerate(answers)]

    def stop(self, *, dump: bool = False) -> None:
        for process in self._ranks:
            if dump and process.is_alive():
                os.kill(process.pid, signal.SIGUSR1)  # prints its stacks
                time.sleep(0.2)
            process.kill()
            process.join()
        self._ranks, self._pipes = [], []

    def _start(self) -> None:
        if self._ranks and all(process.is_alive() for process in self._ranks):
            return
        self.stop()
        port = free_port()
        for rank in range(self.world):
            here, there = CONTEXT.Pipe()
            process = CONTEXT.Process(target=_serve, args=(rank, self.world, port, there), daemon=True)
            process.start()
            self._ranks.append(process)
            self._pipes.append(here)


@contextmanager
def pools() -> Iterator[Callable[[int], Pool]]:
    """``start(world)``: a running group of that many processes, kept until the end."""
    started: dict[int, Pool] = {}
    try:
        yield lambda world: started.setdefault(world, Pool(world))
    finally:
        for pool in started.values():
            pool.stop()


def _serve(rank: int, world: int, port: int, pipe: Connection) -> None:
    faulthandler.register(signal.SIGUSR1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            module, name = function.split(":")
            pipe.send(("result", getattr(importlib.import_module(module), name)(**arguments)))
        except BaseException as error:  # CheckpointException is one
            pipe.send(("error", type(error).__name__, str(error), traceback.format_exc()))
