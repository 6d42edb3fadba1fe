"""A program started by the fork server behaves as one that Python starts: both are compared."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.python import COLD, PYTHON

pytestmark = pytest.mark.skipif(PYTHON == COLD, reason="no fork server in this session")
BOTH = pytest.mark.parametrize("python", [PYTHON, COLD], ids=["forked", "started"])
WITHOUT_TORCH = "import sys; print('torch' in sys.modules)"
PROGRAM = """
import os, sys
print(sys.argv, __name__, os.getcwd(), os.environ["GIVEN"], "unset" in os.environ, sys.stdin.read(), sys.path[0])
print("error", file=sys.stderr)
"""


def run(python: str, *arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([python, *arguments], capture_output=True, text=True, timeout=120, **options)  # type: ignore


@pytest.mark.parametrize("how", ["code", "file", "module"])
def test_arguments_environment_folder_and_streams(tmp_path: Path, how: str) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    arguments = {"code": ["-c", PROGRAM], "file": ["program.py"], "module": ["-m", "program"]}[how]
    found = []
    for python in (PYTHON, COLD):
        env = {**os.environ, "GIVEN": "é \udcff", "PYTHONPATH": "/nowhere"}
        done = run(python, *arguments, "an argument", cwd=tmp_path, env=env, input="typed", errors="surrogateescape")
        found.append((done.returncode, done.stdout, done.stderr))
    assert found[0] == found[1]
    assert found[0][0] == 0 and "typed" in found[0][1] and found[0][2] == "error\n"


@pytest.mark.parametrize(
    "code",
    [
        "raise SystemExit",
        "raise SystemExit(7)",
        "raise SystemExit('words')",
        "raise ValueError('wrong')",
        "raise KeyboardInterrupt",
        "import os; os._exit(300)",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
        "import atexit; atexit.register(print, 'last')",
        "import threading, time; threading.Thread(target=lambda: (time.sleep(0.2), print('thread'))).start()",
        "import multiprocessing as mp; p = mp.get_context('fork').Process(target=print, args=('child',)); p.start()",
    ],
)
def test_every_end_is_that_of_a_started_one(code: str) -> None:
    forked, started = run(PYTHON, "-c", code), run(COLD, "-c", code)
    assert forked.returncode == started.returncode
    assert forked.stdout == started.stdout
    shown = f"    {code}\n"  # Python 3.13 shows it for a program that is not a file and started itself
    assert forked.stderr.replace(shown, "") == started.stderr.replace(shown, "")


@BOTH
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_reach_the_program(python: str, number: signal.Signals) -> None:
    code = f"import signal, sys, time\nsignal.signal({int(number)}, lambda n, f: sys.exit(40 + n))\n"
    # A Python handler waits for the end of a sleep that began as the signal came, so sleeps are short.
    code += "print('ready', flush=True)\nfor _ in range(600): time.sleep(0.1)"
    with subprocess.Popen([python, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.wait(30) == 40 + number


@BOTH
@pytest.mark.parametrize("handled", [True, False])
def test_a_signal_that_was_ignored_at_the_start(python: str, handled: bool) -> None:
    """A program's own handler gets the signal; otherwise it stays ignored, as in the background of a shell."""
    code = "import signal, sys, time\n"
    code += "signal.signal(signal.SIGINT, lambda n, f: sys.exit(40))\n" if handled else ""
    code += "print('ready', flush=True)\ntime.sleep(1)"
    command = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", python, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == (40 if handled else 0)


@BOTH
def test_a_killed_group_takes_what_the_program_started(python: str, tmp_path: Path) -> None:
    fifo = tmp_path / "alive"
    os.mkfifo(fifo)
    inner = f"import time; file = open({str(fifo)!r}, 'w'); file.write('x'); file.flush(); time.sleep(60)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    process = subprocess.Popen([python, "-c", code], start_new_session=True)
    with fifo.open() as alive:
        assert alive.read(1) == "x"
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL
        assert alive.read() == ""  # the last writer has ended


def test_what_is_preloaded_and_what_is_not() -> None:
    assert run(PYTHON, "-c", WITHOUT_TORCH).stdout == "True\n"
    code = "import sys; print([name for name in sys.modules if name.startswith(('am_lightning', 'tests'))])"
    assert run(PYTHON, "-c", code).stdout == "[]\n"


@pytest.mark.parametrize("change", [{"TRITON_INTERPRET": "1"}, {"PYTHONHASHSEED": "1"}, {"LC_ALL": "C"}])
def test_variables_that_imports_read_make_a_cold_start(change: dict[str, str]) -> None:
    assert run(PYTHON, "-c", WITHOUT_TORCH, env={**os.environ, **change}).stdout == "False\n"


def test_variables_that_imports_set_do_not() -> None:
    """A test's own process has imported the same libraries and passes on what they have set."""
    code = "import os; print({k: v for k, v in os.environ.items() if k.startswith(('PYTORCH_', 'TORCH'))})"
    found = eval(run(PYTHON, "-c", code).stdout)
    assert found
    assert run(PYTHON, "-c", WITHOUT_TORCH, env={**os.environ, **found}).stdout == "True\n"


def test_the_environment_of_a_test_makes_a_warm_start() -> None:
    """This holds whatever this process has imported and set. A cold start would be slower, without a message."""
    pytest.importorskip("sklearn")
    assert run(PYTHON, "-c", WITHOUT_TORCH).stdout == "True\n"


@pytest.mark.slow
def test_ranks_that_torchrun_starts_are_forked(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(f"{WITHOUT_TORCH}; import os; assert os.environ['WORLD_SIZE'] == '2'")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "rank.py"]
    done = run(PYTHON, *launcher, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "True\nTrue\n"


def test_options_of_the_interpreter_make_a_cold_start() -> None:
    assert run(PYTHON, "-W", "error", "-c", WITHOUT_TORCH).stdout == "False\n"


def test_a_rank_has_the_threads_that_its_environment_says() -> None:
    for threads in ("1", "2"):
        env = {**os.environ, "OMP_NUM_THREADS": threads}
        assert run(PYTHON, "-c", "import torch; print(torch.get_num_threads())", env=env).stdout == f"{threads}\n"


def test_numpy_draws_other_numbers_in_every_program() -> None:
    code = "import numpy; print(numpy.random.rand())"
    assert run(PYTHON, "-c", code).stdout != run(PYTHON, "-c", code).stdout


def test_the_python_of_a_forked_program_is_the_stand_in() -> None:
    assert run(PYTHON, "-c", "import sys; print(sys.executable)").stdout.strip() == PYTHON
    assert sys.executable == COLD
