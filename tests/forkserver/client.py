"""Stand in for a program that the fork server runs: pass on its arguments, then signals, then the exit status.

It is started as ``python -I -S client.py SOCKET REAL_PYTHON ARGUMENTS...`` for every program and therefore kept small.
If the server cannot run the program, the real Python replaces this process.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import socket
import sys

# Prefixes of variables that preloaded libraries read while they are imported. A program with a value that differs from
# the server's starts cold.
READ_AT_IMPORT = (
    "HF_",
    "LANG",
    "LC_",
    "LD_",
    "LOGLEVEL",
    "MKL_",
    "PYTHON",
    "TORCH",
    "TRANSFORMERS_",
    "TRITON_",
)
READ_LATER = (
    "PYTHONPATH",
    "PYTHONUNBUFFERED",
    "TORCH_EXTENSIONS_DIR",
    "TORCH_NCCL_",
    "TORCHELASTIC_",
    "TORCHINDUCTOR_CACHE_DIR",
)
FORWARDED = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)


def relevant(variables: dict[str, str]) -> dict[str, str]:
    """Return the variables that a program and the server must have in common."""
    return {k: v for k, v in variables.items() if k.startswith(READ_AT_IMPORT) and not k.startswith(READ_LATER)}


def can_serve(arguments: list[str]) -> bool:
    """Return whether the arguments name a script, a module or code, without interpreter options except ``-u``."""
    given = [argument for argument in arguments[:1] if argument != "-u"] or arguments[1:2]
    if not given:
        return False
    return os.path.isfile(given[0]) if not given[0].startswith("-") else given[0] in ("-m", "-c")


def main() -> None:
    address, real, *arguments = sys.argv[1:]
    if not can_serve(arguments) or not all(map(_is_open, range(3))):
        os.execv(real, [real, *arguments])
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        server.connect(address)
    except OSError:
        os.execv(real, [real, *arguments])
    ignored = [int(number) for number in FORWARDED if signal.getsignal(number) is signal.SIG_IGN]
    job = {
        "arguments": arguments,
        "ignored": ignored,
        "cwd": os.getcwd(),
        "env": dict(os.environ),
        "umask": _umask(),
        "leads": os.getpgrp() == os.getpid(),
    }
    content = json.dumps(job).encode()
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # a signal's number must not arrive inside the job
    for number in FORWARDED:  # ignored ones, too: the program may set a handler of its own
        signal.signal(number, lambda caught, frame: None)  # its number still goes to the server, see below
    socket.send_fds(server, [b"j"], [0, 1, 2])
    server.sendall(len(content).to_bytes(8, "big") + content)
    # A Python handler would wait for recv() to return if the signal came just before it.
    server.setblocking(False)
    signal.set_wakeup_fd(server.fileno(), warn_on_full_buffer=False)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    answer = b""
    while len(answer) < 5:
        select.select([server], [], [])
        answer += (more := server.recv(5 - len(answer)))
        if not more:
            sys.exit("the fork server has ended")
    if answer[:1] == b"c":  # it must start cold
        os.execv(real, [real, *arguments])
    leave(int.from_bytes(answer[1:], "big"))


def leave(status: int) -> None:
    """End as the program did, also by a signal."""
    if not os.WIFSIGNALED(status):
        os._exit(os.waitstatus_to_exitcode(status))
    number = os.WTERMSIG(status)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if number in FORWARDED:
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)


def _umask() -> int:
    mask = os.umask(0o77)
    os.umask(mask)
    return mask


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main()
