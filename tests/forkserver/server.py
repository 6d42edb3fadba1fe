"""``python server.py SOCKET NAME``: import the heavy libraries once, then fork for every requested program.

SOCKET is the descriptor of a listening socket, NAME what programs see as ``sys.executable``.

A forked process leaves the loop, runs the program and ends with its exit hooks, its threads and its status. It does not
tear down the interpreter, because collecting what was preloaded takes longer than most programs run. What happens there
(a thread of C++ that outlives main, for example) is tested by programs that start cold.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import threading
import types
import warnings
from collections.abc import Iterator

sys.path[0] = os.path.dirname(os.path.abspath(__file__))
from client import relevant  # noqa: E402

PRELOADED = (
    "numpy",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.run",
    "torch.distributed.tensor.parallel",
    "torch.utils.tensorboard",
    "torch._dynamo",
    "lightning.pytorch.cli",
    "lightning.pytorch",
    "lightning.fabric",
    "torchmetrics",
    "accelerate.commands.launch",
    "transformers.trainer",
    "transformers.models.llama.modeling_llama",
    "tokenizers",
)
REFUSED = b"c" + bytes(4)


class Variables:
    """The environment in which the libraries were imported, and what they changed in it."""

    def __init__(self, before: dict[str, str], after: dict[str, str]) -> None:
        self.before, self.after = before, after

    def agree_with(self, other: dict[str, str]) -> bool:
        """Return whether imports under these variables give the same result. A parent's imports may have set some."""
        names = {*relevant(self.before), *relevant(other)}
        return all(other.get(name) in (self.before.get(name), self.after.get(name)) for name in names)

    def set_by_imports(self) -> dict[str, str]:
        return {key: value for key, value in self.after.items() if key not in self.before}


class Job:
    """A program that runs here in place of a client."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.pid: int | None = None
        self.leads = False  # whether the client leads a process group, which is killed as a whole

    def read(self) -> dict:
        """Read what the client sent; the descriptors are in ``streams``."""
        _, descriptors, _, _ = socket.recv_fds(self.connection, 1, 3)
        size = int.from_bytes(self._exactly(8), "big")
        return {**json.loads(self._exactly(size)), "streams": descriptors}

    def _exactly(self, size: int) -> bytes:
        content = b""
        while len(content) < size:
            content += (more := self.connection.recv(size - len(content)))
            if not more:
                raise EOFError
        return content

    def answer(self, content: bytes) -> None:
        with contextlib.suppress(OSError):  # the client may have been killed
            self.connection.sendall(content)

    def kill(self, number: int) -> None:
        if self.pid is None:
            return
        if self.leads and number == signal.SIGKILL:
            with contextlib.suppress(ProcessLookupError):  # the new process may not lead its group yet
                os.killpg(self.pid, number)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


def preload() -> None:
    for name in PRELOADED:
        with warnings.catch_warnings(), contextlib.suppress(ImportError):
            warnings.simplefilter("ignore")
            importlib.import_module(name)
    sys.stdout.flush()
    sys.stderr.flush()
    gc.collect()
    gc.freeze()


def serve(listener: socket.socket, own: Variables) -> dict:
    """Run the server's loop; it returns in forked processes only, with what they must run."""
    jobs: dict[int, Job] = {}
    with selectors.DefaultSelector() as selector, _wake_ups() as (ended, woken):
        for file in (listener, sys.stdin, ended):
            selector.register(file, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is sys.stdin:  # the process that started this one has ended
                    _end(jobs)
                elif key.fileobj is ended:
                    ended.recv(4096)
                    _reap(jobs, selector)
                elif key.fileobj is listener:
                    job = Job(listener.accept()[0])
                    if (asked := _start(job, own)) is not None:
                        _close([listener, ended, woken, *(j.connection for j in jobs.values()), job.connection])
                        return asked
                    if job.pid is not None:
                        jobs[job.pid] = job
                        selector.register(job.connection, selectors.EVENT_READ, job)
                else:
                    _pass_on(key.data, selector)


@contextlib.contextmanager
def _wake_ups() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Return both ends of a socket that is readable after a child has ended."""
    ended, woken = socket.socketpair()
    woken.setblocking(False)
    signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    yield ended, woken


def _start(job: Job, own: Variables) -> dict | None:
    """Fork for a job; return in the new process what it must run."""
    try:
        asked = job.read()
    except (OSError, EOFError, ValueError):
        job.connection.close()
        return None
    if not own.agree_with(asked["env"]):
        job.answer(REFUSED)
        job.connection.close()
    else:
        job.leads = asked["leads"]
        job.pid = os.fork()
        if job.pid == 0:
            return asked
    _close(asked["streams"])
    return None


def _pass_on(job: Job, selector: selectors.BaseSelector) -> None:
    """Pass on signals of the client; its end becomes SIGKILL."""
    try:
        numbers = job.connection.recv(64)
    except OSError:
        numbers = b""
    for number in numbers or [signal.SIGKILL]:
        job.kill(number)
    if not numbers:
        selector.unregister(job.connection)


def _reap(jobs: dict[int, Job], selector: selectors.BaseSelector) -> None:
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG)) != (0, 0):
            pid, status = found
            job = jobs.pop(pid, None)
            if job is not None:
                job.answer(b"e" + status.to_bytes(4, "big"))
                with contextlib.suppress(KeyError):
                    selector.unregister(job.connection)
                job.connection.close()


def _end(jobs: dict[int, Job]) -> None:
    for job in jobs.values():
        job.kill(signal.SIGKILL)
    os._exit(0)


def _close(files: object) -> None:
    for file in files:  # type: ignore[attr-defined]
        os.close(file) if isinstance(file, int) else file.close()


def become(job: dict, name: str) -> list[str]:
    """Take the streams, environment and folder of the client; return the arguments of Python."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number in job["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    os.setsid()
    os.umask(job["umask"])
    for number, stream in enumerate(job["streams"]):
        os.dup2(stream, number)
    _close(job["streams"])
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    arguments = job["arguments"]
    unbuffered = bool(os.environ.get("PYTHONUNBUFFERED")) or arguments[0] == "-u"
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=stream is sys.stderr or stream.isatty(), write_through=unbuffered)
    sys.executable = name
    sys.orig_argv = [name, *arguments]
    _seed()
    importlib.invalidate_caches()
    return arguments[1:] if arguments[0] == "-u" else arguments


def _seed() -> None:
    """Seed what a newly started Python draws from the system or reads from its environment."""
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    if "torch" in sys.modules:
        threads = os.environ.get("OMP_NUM_THREADS", "")
        sys.modules["torch"].set_num_threads(int(threads) if threads.isdigit() else len(os.sched_getaffinity(0)))


def run(arguments: list[str]) -> None:
    """Run what Python runs for ``-c CODE``, ``-m MODULE`` or a file's path."""
    how, main = arguments[0], types.ModuleType("__main__")
    main.__builtins__ = __builtins__  # type: ignore[attr-defined]
    sys.modules["__main__"] = main
    first = "" if how == "-c" else os.getcwd() if how == "-m" else os.path.dirname(os.path.abspath(how))
    sys.path[:1] = [first, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    if how == "-m":
        sys.argv = ["-m", *arguments[2:]]
        runpy._run_module_as_main(arguments[1])  # type: ignore[attr-defined]
    elif how == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(compile(arguments[1], "<string>", "exec"), main.__dict__)
    else:
        sys.argv = arguments
        main.__file__ = how
        with open(how, "rb") as file:
            exec(compile(file.read(), how, "exec"), main.__dict__)


def status_of(arguments: list[str]) -> int:
    """Run the program and return its exit status. An exception is printed as by Python."""
    try:
        run(arguments)
    except SystemExit as exit_:
        if exit_.code is None or isinstance(exit_.code, int):
            return exit_.code or 0
        print(exit_.code, file=sys.stderr)
        return 1
    except BaseException as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename in (__file__, runpy.__file__, "<frozen runpy>"):
            trace = trace.tb_next
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0


def leave(status: int) -> None:
    """End as Python does, as far as programs can see."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status & 0xFF)


if __name__ == "__main__":
    descriptor, name = sys.argv[1:]
    with socket.socket(fileno=int(descriptor)) as listener:
        before = dict(os.environ)
        preload()
        own = Variables(before, dict(os.environ))
        asked = serve(listener, own)
    asked["env"] = own.set_by_imports() | asked["env"]
    leave(status_of(become(asked, name)))
