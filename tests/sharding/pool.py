"""Running processes of one group that call functions by name: a test costs milliseconds instead of a launch."""

from __future__ import annotations

import faulthandler
import importlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import current_process
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

from tests.ports import free_port
from tests.python import PYTHON

ROOT = Path(__file__).resolve().parents[2]
START_S = 300
KEY = "AM_TESTS_POOL_KEY"
BACKEND = "AM_TESTS_POOL_BACKEND"


class RankError(Exception):
    """An exception of a rank: ``kind`` is its class, ``text`` its message."""

    def __init__(self, rank: int, kind: str, text: str, trace: str) -> None:
        super().__init__(f"rank {rank}: {kind}: {text}\n{trace}")
        self.rank, self.kind, self.text = rank, kind, text


class HangError(Exception):
    """A rank did not answer in time; the others did."""


class Pool:
    """``world`` ranks. A hang or a death kills all of them, and the next run starts new ones."""

    def __init__(self, world: int, backend: str = "gloo") -> None:
        self.world, self.backend = world, backend
        self._ranks: list[subprocess.Popen[bytes]] = []
        self._pipes: list[Connection] = []

    def run(self, function: str, *, timeout: float = 90, **arguments: Any) -> list[Any]:
        """Call ``module:name`` with ``arguments`` on every rank and return the results by rank.

        Raises:
            RankError: the first rank's exception, if any rank raised.
            HangError: if a rank does not answer in time.
        """
        answers = self.attempt(function, timeout=timeout, **arguments)
        for answer in answers:
            if isinstance(answer, RankError):
                raise answer
        return answers

    def attempt(self, function: str, *, timeout: float = 90, **arguments: Any) -> list[Any]:
        """Call as :meth:`run` does, but return an exception as its rank's result."""
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
            if dump and process.poll() is None:
                process.send_signal(signal.SIGUSR1)  # it prints its stacks
                time.sleep(0.2)
            process.kill()
            process.wait()
        for pipe in self._pipes:
            pipe.close()
        self._ranks, self._pipes = [], []

    def _start(self) -> None:
        if self._ranks and all(process.poll() is None for process in self._ranks):
            return
        self.stop()
        variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(self.world)}
        # Tensors in an answer are fetched from the rank that made them, which needs the key.
        variables |= {"PYTHONPATH": str(ROOT), KEY: bytes(current_process().authkey).hex(), BACKEND: self.backend}
        with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address := f"{folder}/ranks")
            listener.listen(self.world)
            listener.settimeout(START_S)  # without it, a rank that died would be waited for
            command = [PYTHON, "-m", "tests.sharding.pool", address]
            for rank in range(self.world):
                env = {**os.environ, **variables, "RANK": str(rank)}
                self._ranks.append(subprocess.Popen(command, env=env, cwd=ROOT))
            pipes = [Connection(listener.accept()[0].detach()) for _ in range(self.world)]
            self._pipes = [
                pipe for _, pipe in sorted(((pipe.recv(), pipe) for pipe in pipes), key=lambda found: found[0])
            ]
        port = self._pipes[0].recv()
        for pipe in self._pipes:
            pipe.send(port)


@contextmanager
def pools() -> Iterator[Callable[[int], Pool]]:
    """Return ``start(world)``, which returns a running group of ``world`` processes that are kept until the end."""
    started: dict[int, Pool] = {}
    try:
        yield lambda world: started.setdefault(world, Pool(world))
    finally:
        for pool in started.values():
            pool.stop()


def serve(address: str) -> None:
    """Run as a rank what the pool sends, until the pool ends."""
    faulthandler.register(signal.SIGUSR1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    current_process().authkey = bytes.fromhex(os.environ[KEY])
    pipe = Client(address, "AF_UNIX")
    pipe.send(rank)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, world, is_master=True, wait_for_workers=False)  # on a free port
        pipe.send(store.port)
    port = pipe.recv()
    if rank:
        store = dist.TCPStore("127.0.0.1", port, world, is_master=False)
    dist.init_process_group(os.environ[BACKEND], store=store, rank=rank, world_size=world)
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


if __name__ == "__main__":
    serve(*sys.argv[1:])
