"""Compilation of the C++ loop with a compiler that takes GCC's options. Does not import torch, because wheels use it.

The library works on every CPU of an architecture. It has one object for each instruction set, chosen when it is loaded.
It depends on the C and C++ libraries only, so it works with all versions of Python, torch and OpenMP.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

_FOLDER = Path(__file__).parent
_SOURCES = ("kernels.cpp", "paths.cpp", "work.h")
# -ffp-contract=off rounds every operation separately, so all compilers and instruction sets give the same bits.
_OPTIONS = [
    *("-O2", "-std=c++17", "-fno-fast-math", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *("-fopenmp-simd", "-fPIC"),
]
_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
_PORTABLE: dict[str, list[str]] = {"am_portable": []}  # function -> options of its instruction set
_X86 = {**_PORTABLE, "am_avx2": ["-mavx2"], "am_avx512": _AVX512}
_SECONDS = 300
NO_COMPILER = (
    "$CXX, c++, g++ and clang++ cannot be run. Install one (Debian, Ubuntu: apt-get install g++; conda: conda install "
    "cxx-compiler; macOS: xcode-select --install), set CXX to one that is elsewhere"
)


def find_compiler() -> list[str] | None:
    """Return the command of a C++ compiler: ``$CXX``, else the first of c++, g++ and clang++, or None.

    Raises:
        ValueError: if ``$CXX`` is not a valid command line.
    """
    if sys.platform == "win32":
        return None
    try:
        candidates = [shlex.split(os.environ["CXX"])] if os.environ.get("CXX") else [["c++"], ["g++"], ["clang++"]]
    except ValueError as error:
        raise ValueError(f"Invalid CXX: {os.environ['CXX']!r} is not a command line: {error}") from error
    return next((command for command in candidates if command and shutil.which(command[0])), None)


def version_of(command: Sequence[str]) -> str:
    """Return the first line of the compiler's ``--version``.

    Raises:
        RuntimeError, TimeoutError: if the compiler cannot be run or does not end.
    """
    return _output([[*command, "--version"]])[0].partition("\n")[0]


def source_key(*words: str) -> str:
    """Return a hash of the sources, the options and ``words``, 24 hexadecimal digits."""
    parts = [*((_FOLDER / name).read_text() for name in _SOURCES), *_OPTIONS, *_AVX512, *words]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def compile_library(command: Sequence[str], path: Path) -> None:
    """Build the library, and move it to ``path`` when it is complete.

    Raises:
        RuntimeError: if the compiler fails. The message has its output.
        OSError: if the folder cannot be written, or if the compiler does not end (TimeoutError).
    """
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    failures = []
    for functions in [_X86, _PORTABLE] if x86 else [_PORTABLE]:  # old compilers lack some instruction sets
        try:
            with tempfile.TemporaryDirectory(prefix="building_", dir=path.parent) as folder:
                _build(list(command), functions, Path(folder))
                os.chmod(Path(folder, "library.so"), 0o755)
                os.replace(Path(folder, "library.so"), path)
            return
        except RuntimeError as error:
            failures.append(str(error))
    raise RuntimeError(f"{shlex.join(command)} cannot build {_FOLDER / 'kernels.cpp'}: {failures[0]}")


def _build(command: list[str], functions: dict[str, list[str]], folder: Path) -> None:
    compile_one = [*command, *_OPTIONS, "-c", str(_FOLDER / "kernels.cpp")]
    paths = [*command, *_OPTIONS, *(["-DAM_X86"] if functions is _X86 else [])]
    objects = {name: str(folder / f"{name}.o") for name in [*functions, "paths"]}
    commands = [[*compile_one, *more, f"-DAM_PATH={name}", "-o", objects[name]] for name, more in functions.items()]
    _output([*commands, [*paths, "-c", str(_FOLDER / "paths.cpp"), "-o", objects["paths"]]])
    complete = ["-Wl,-z,defs"] if sys.platform == "linux" else []
    _output([[*paths, "-shared", *complete, *objects.values(), "-o", str(folder / "library.so")]])


def _output(commands: Sequence[Sequence[str]]) -> list[str]:
    """Run commands in parallel and return the output of each.

    Raises:
        RuntimeError: if a command fails or cannot be run.
        TimeoutError: if a command does not end. It is killed with its child processes.
    """
    running: list[subprocess.Popen[str]] = []
    printed = []
    ends = time.monotonic() + _SECONDS
    try:
        for command in commands:
            try:
                process = subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
                )
            except OSError as error:
                raise RuntimeError(f"{shlex.join(command)} cannot be run: {error}") from error
            running.append(process)
        for command, process in zip(commands, running, strict=True):
            out, err = process.communicate(timeout=max(0.0, ends - time.monotonic()))
            if process.returncode != 0:
                raise RuntimeError(f"{shlex.join(command)} failed: {err.strip()[-2000:]}")
            printed.append(out)
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"{shlex.join(error.cmd)} took more than {_SECONDS} s") from error
    finally:
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # the compiler proper is a child of the command
                process.wait()
            for pipe in (process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()
    return printed
