"""Compiles the CPU's C++ loop at its first use: once for each machine, into torch's cache of extensions.

Not torch.utils.cpp_extension.load: it needs ninja, and a process killed while it builds leaves a lock for which all
later ones wait. Here every process compiles into a file of its own and renames it: nothing waits, and no half-written
library is ever seen.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

_SOURCE = Path(__file__).with_name("kernels.cpp")
_ALWAYS = ["-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC"]
_SECONDS = 300
_NO_COMPILER = (
    "$CXX, c++, g++ and clang++ cannot be run. Install one (Debian, Ubuntu: apt-get install g++; conda: conda install "
    "cxx-compiler; macOS: xcode-select --install), set CXX to one that is elsewhere"
)


class Library:
    """The loaded C++ loop, and how it was built: ``description`` for people, ``build`` a number below 2^20 that tells
    builds apart, where OpenMP's runtime lies left out."""

    def __init__(self, path: Path, compiler: str, options: list[str]) -> None:
        self.build = int(_key([compiler, *options])[:5], 16)
        self._loaded = ctypes.CDLL(str(path))
        self.sums, self.update = self._loaded.am_sums, self._loaded.am_update
        self.sums.restype = self.update.restype = None
        threads = "OpenMP" if self._loaded.am_has_openmp() else "one thread, for the compiler has no OpenMP"
        self.description = f"C++ loop ({compiler}, {threads})"


def find_compiler() -> list[str] | None:
    """The command of a C++ compiler with GCC's options: ``$CXX``, else the first of c++, g++, clang++; None without.

    Raises:
        ValueError: ``$CXX`` is no command line.
    """
    if sys.platform == "win32":
        return None
    try:
        candidates = [shlex.split(os.environ["CXX"])] if os.environ.get("CXX") else [["c++"], ["g++"], ["clang++"]]
    except ValueError as error:
        raise ValueError(f"Invalid CXX: {os.environ['CXX']!r} is no command line: {error}") from error
    return next((command for command in candidates if command and shutil.which(command[0])), None)


@functools.cache
def load_library() -> Library:
    """Build the loop where no earlier process has, and load it.

    Raises:
        RuntimeError: there is no compiler, or it fails; the text holds what it said.
    """
    command = find_compiler()
    if command is None:
        raise RuntimeError(_NO_COMPILER)
    version = _output([*command, "--version"]).partition("\n")[0]
    runtime = _loaded_openmp()
    failures = []
    # The last ones serve compilers that do not know this CPU, or have no OpenMP (Apple's).
    for extra in (["-march=native", "-fopenmp"], ["-fopenmp"], ["-march=native"], []):
        libraries = [runtime, f"-Wl,-rpath,{Path(runtime).parent}"] if runtime and "-fopenmp" in extra else []
        options = [*_ALWAYS, *extra, *(["-Wl,-z,defs"] if sys.platform == "linux" else [])]
        path = _folder() / f"loop_{_key([version, *command, *options, *libraries])}.so"
        try:
            if path.exists() and _is_ours_alone(path):
                try:
                    return Library(path, version, options)
                except (OSError, AttributeError):  # damaged, or made where another C library is: build it anew
                    pass
            _compile([*command, *options], libraries, path)
            return Library(path, version, options)
        except (OSError, RuntimeError) as error:
            failures.append(str(error))
    raise RuntimeError(f"{shlex.join(command)} cannot build {_SOURCE}: {failures[0]}")


def why_not(kind: object = None) -> str:
    """The reason why the loop cannot be had, "" where it can. Builds it where no earlier process has."""
    try:
        load_library()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


def require_compiler() -> None:
    """Raise where ``fused=True`` cannot be built; nothing is built yet.

    Raises:
        RuntimeError: there is no compiler; the text says what to install.
        ValueError: ``$CXX`` is no command line.
    """
    if find_compiler() is None:
        raise RuntimeError(f"fused=True on the CPU needs a C++ compiler, but {_NO_COMPILER}, or use fused=None")


def _compile(command: list[str], libraries: list[str], path: Path) -> None:
    handle, name = tempfile.mkstemp(suffix=".so", prefix="building_", dir=path.parent)
    os.close(handle)
    # What is linked by -fopenmp comes after torch's own runtime, and so is not needed: one set of threads, not two.
    middle = ["-Wl,--as-needed"] if sys.platform == "linux" else []
    try:
        _output([*command, str(_SOURCE), "-o", name, *middle, *libraries])
        os.chmod(name, 0o755)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{shlex.join(command)} took more than {_SECONDS} s") from error
    except OSError as error:
        raise RuntimeError(f"{shlex.join(command)} cannot be run: {error}") from error
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)} failed: {done.stderr.strip()[-2000:]}")
    return done.stdout


def _key(words: list[str]) -> str:
    """Source, compiler, C library and CPU: a home folder may be shared by machines of several kinds."""
    parts = [_SOURCE.read_text(), *words, platform.machine(), *platform.libc_ver(), _cpu(), torch.__version__]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


@functools.cache
def _cpu() -> str:
    """The CPU's name and instruction sets, for ``-march=native`` is good for no other."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part", "cpu\t")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


@functools.cache
def _folder() -> Path:
    """In torch's cache of extensions; a folder of this process's where that cannot be written, or others can.

    What lies there is loaded as code: a folder that another user owns or may write to is not used.
    """
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    folder = (Path(root) if root else _user_cache() / "torch_extensions") / "am_lightning"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            if _is_ours_alone(folder):
                return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="am_lightning_"))


def _is_ours_alone(path: Path) -> bool:
    """This user owns it, and nobody else may write to it."""
    found = path.stat()
    return found.st_uid == os.getuid() and not found.st_mode & 0o022


def _user_cache() -> Path:
    """Where programs of this user keep what they can make again, as torch finds it. Nothing is built on Windows."""
    if sys.platform == "darwin":
        return Path("~/Library/Caches").expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()


def _loaded_openmp() -> str | None:
    """The OpenMP runtime that torch has loaded, its own before any other's: a second would keep threads spinning."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    paths = [line.split(maxsplit=5)[5] for line in lines if line.count(" ") >= 5 and line.rstrip().find(".so") > 0]
    names = ("libgomp", "libiomp5", "libomp")
    found = [path for name in names for path in paths if Path(path).name.startswith(name)]
    homes = (str(Path(torch.__file__).parent) + os.sep, str(Path(torch.__file__).parents[1] / "torch.libs"))
    return next((path for path in found if path.startswith(homes)), found[0] if found else None)
