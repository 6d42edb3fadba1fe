"""Nodes on one machine: network namespaces joined by a veth pair, with a shared file system as in a cluster."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

INTERFACE = "veth0"  # on every node; its addresses 10.77.0.x exist in the namespaces only
_numbers = itertools.count()


def missing() -> str | None:
    """Return why there can be no namespaces here, or None if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "the program ip (Debian: iproute2) is missing"
    name = f"am{os.getpid()}probe"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"cannot make network namespaces here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return None


class Node:
    """A machine: its own network, and the processes that were started in it.

    Attributes:
        address: its IPv4 address.
    """

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self.address = address

    def start(self, command: Sequence[str], env: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
        """Start `command` on this node; its output is appended to `log`."""
        with log.open("ab") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.name, *command],
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def pids(self) -> list[int]:
        found = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True)
        return [int(pid) for pid in found.stdout.split()]

    def workers(self, program: Path) -> list[int]:
        """Return the processes here that run `program`: ranks, not launchers."""
        return [pid for pid in self.pids() if os.fsencode(program) in command_line(pid)]

    def lose(self) -> None:
        """SIGKILL everything that runs here, as a power cut would."""
        deadline = time.monotonic() + 30
        while pids := self.pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > deadline:
                raise TimeoutError(f"processes {pids} in {self.name} do not die")
            time.sleep(0.05)


def command_line(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return []


@contextlib.contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Yield two nodes that reach each other and nothing else; then remove their processes and networks."""
    number = next(_numbers)
    nodes = tuple(Node(f"am{os.getpid()}-{number}-{i}", f"10.77.0.{i + 1}") for i in range(2))
    first, second = nodes
    try:
        for node in nodes:
            _ip("netns", "add", node.name)
            _ip("-n", node.name, "link", "set", "lo", "up")
        link = ["link", "add", INTERFACE, "netns", first.name, "type", "veth"]
        _ip(*link, "peer", "name", INTERFACE, "netns", second.name)
        for node in nodes:
            _ip("-n", node.name, "address", "add", f"{node.address}/24", "dev", INTERFACE)
            _ip("-n", node.name, "link", "set", INTERFACE, "up")
        yield first, second
    finally:
        for node in nodes:
            node.lose()
            subprocess.run(["ip", "netns", "del", node.name], capture_output=True)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
