"""A Python that starts in a tenth of a second: a process with the heavy libraries imported forks for each program.

``PYTHON`` of ``tests.python`` replaces ``sys.executable`` while pytest runs: a process with the same arguments,
environment, working directory, standard streams, signals and exit status. ``am_lightning`` and the tests' own modules
are not preloaded: every program imports the checkout that it would import from a cold start.

Programs that a fork cannot imitate start cold by themselves: those with options of the interpreter, or with other
values of variables that libraries read while they are imported (``client.READ_AT_IMPORT``). A test that depends on one
of these differences needs ``COLD`` of ``tests.python``:

- the program is not the process that the test started: SIGKILL reaches it (and its process group, if the test's
  process leads one), SIGSTOP does not, and /proc shows the server's command line;
- it stays in the network namespace of the test session;
- a signal in its first moments meets a process whose imports are done;
- the interpreter is not torn down at its end (``server.leave``).
"""

from __future__ import annotations

import os
import shlex
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

VARIABLE = "AM_TESTS_PYTHON"
COLD_VARIABLE = "AM_TESTS_COLD_PYTHON"  # ``sys.executable`` is the stand-in there
_FOLDER = Path(__file__).resolve().parent


class ForkServer:
    """The preloaded process. It ends with the process that started it, and ends what it started.

    Attributes:
        python: the executable that replaces Python.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="am-tests-")
        self.python = Path(self._folder.name) / "python"
        address = Path(self._folder.name) / "socket"
        command = [sys.executable, "-I", "-S", str(_FOLDER / "client.py"), str(address), sys.executable]
        # This is a shell script, because a script's first line cannot hold a path with a space.
        self.python.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
        self.python.chmod(self.python.stat().st_mode | stat.S_IXUSR)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(address))
            listener.listen(128)
            self._server = subprocess.Popen(
                [sys.executable, str(_FOLDER / "server.py"), str(listener.fileno()), str(self.python)],
                stdin=subprocess.PIPE,  # its end tells the server that this process has ended
                env=_without_path(os.environ),
                pass_fds=[listener.fileno()],
                start_new_session=True,  # Ctrl-C is for the programs that tests wait for
            )

    def stop(self) -> None:
        """End the server and what it started."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        try:
            self._server.wait(30)
        except subprocess.TimeoutExpired:  # it may still be importing after a short run on a busy machine
            self._server.kill()
            self._server.wait()
        self._folder.cleanup()


def _without_path(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the variables without PYTHONPATH, because programs bring their own."""
    return {key: value for key, value in variables.items() if key != "PYTHONPATH"}
