"""Run the parts of the check one after the other, each in a process of its own (see check.sh)."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import signal
import site
import subprocess
import sys
import time
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import part as parts_of
import right
import worth
from part import OUT_OF_TIME, ROOT, Answer, Context, Part, answer, keep, read_answers

# Timed steps of optimizers on shapes and dtypes, and training steps, with their order among all parts.
FAST = {
    **dict.fromkeys(("llama60m-float32", "llama1b-float32", "many-tiny-float32", "llama1b-bfloat16"), 20),
    **dict.fromkeys(("train-130m", "train-1b"), 30),
    **dict.fromkeys(("llama350m-float32", "llama60m-bfloat16", "ten-thousand-float32", "llama350m-bfloat16"), 50),
    **dict.fromkeys(("many-tiny-bfloat16", "ten-thousand-bfloat16", "train-130m-compiled", "train-1b-compiled"), 55),
}
# Parts that a rehearsal omits, because they run the same code at other sizes.
AS_OTHERS = (
    *("llama1b-bfloat16", "llama350m-float32", "llama350m-bfloat16", "many-tiny-bfloat16", "ten-thousand-bfloat16"),
    *("train-1b", "train-1b-compiled"),
)
GRACE = 8.0  # seconds of its process that are left to a part for writing its answer
CACHES = (
    *("TRITON_CACHE_DIR", "TRITON_HOME", "TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "CUDA_CACHE_PATH"),
    *("MPLCONFIGDIR", "HF_HOME", "XDG_CACHE_HOME", "HYPOTHESIS_STORAGE_DIRECTORY"),
)
LEAST = 0.4  # share of a part's seconds that must be left when it begins


def main() -> int:
    """Run the check, and return the exit status: 0 if nothing failed."""
    options = _options()
    out = options.out = options.out.resolve()
    if options.run:
        parts_of.die_with(options.parent)
        ends = time.monotonic() + options.seconds
        context = Context(out, options.device, options.tiny, ends)
        parts_of.run(next(p for p in all_parts(options.tiny) if p.name == options.run), context, options.command)
        return 0
    deadline = time.monotonic() + 60 * options.minutes
    command = "recipes/gpu/check.sh " + " ".join(sys.argv[1:])
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            sys.exit(f"error: another check.sh is running in {out}")
        for build in [*out.glob("work/env/torch_extensions/*/lock"), *out.glob("work/caches/*/*/lock")]:
            build.unlink()  # an interrupted build left it, and all later builds would wait for it
        known = _known(out, tiny=options.tiny)
        options.python = interpreter(options.wheels, out)
        env = environment(out, options)
        names = [p.name for p in all_parts(options.tiny)]
        keep(out, planned=names, rehearsal=options.tiny)
        for each in chosen(options, known):
            ended = run_part(each, options, deadline, env, command)
            if each.name == "facts" and ended and ended.get("result") == {}:  # the device is missing
                break
    return _summary(out, names)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="recipes/gpu/check.sh", description="see recipes/gpu/check.sh --help")
    parser.add_argument("--minutes", type=float, default=25.0)
    parser.add_argument("--wheels", type=Path, help="folder that recipes/gpu/wheels.sh filled")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu")
    parser.add_argument("--only", metavar="PART")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes: a rehearsal")
    for name in ("--run", "--command"):  # arguments of the processes that run the parts
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--parent", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.minutes > 0:
        parser.error(f"--minutes must be > 0, but got {options.minutes}")
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu is a rehearsal: it needs --tiny")
    return options


def all_parts(tiny: bool) -> list[Part]:
    """Return all parts in their order."""
    wanted = {name: value for name, value in FAST.items() if not (tiny and name in AS_OTHERS)}
    fast = [Part(f"fast/{name}", "fast", value, 180 if "train" in name else 120) for name, value in wanted.items()]
    found = [Part("facts", "facts", 0, 150), *right.parts(tiny), *fast, *worth.parts(tiny)]
    return sorted(found, key=lambda each: each.worth)


def chosen(options: argparse.Namespace, known: dict[str, Answer]) -> list[Part]:
    """Return the parts of --only, or else first those without an answer and then those that are not done."""
    found = all_parts(options.tiny)
    if options.only:
        wanted = [p for p in found if p.name == options.only or p.name.startswith(f"{options.only}/")]
        if not wanted:
            sys.exit(f"error: --only {options.only} is not a part. Parts: {', '.join(p.name for p in found)}")
        return wanted
    status = {p.name: known.get(p.name, {}).get("status") for p in found}
    return sorted((p for p in found if status[p.name] != "done"), key=lambda p: status[p.name] is not None)


def _known(out: Path, *, tiny: bool) -> dict[str, Answer]:
    """Return the answers of earlier calls."""
    try:
        known = read_answers(out)
    except ValueError as error:
        sys.exit(f"error: {out / 'results.json'} is damaged ({error}): remove it, or give another --out")
    if any(content.get("rehearsal", tiny) != tiny for content in known.values()):
        held, asked = ("measurements", "a rehearsal") if tiny else ("a rehearsal", "measurements")
        sys.exit(f"error: {out} holds {held}, and this call makes {asked}: give another --out")
    return known


def interpreter(wheels: Path | None, out: Path) -> Path:
    """Return an interpreter that sees this one's packages, and those of ``wheels`` that are missing here.

    It is a virtual environment, because programs that tests start have a PYTHONPATH of their own. No index is asked,
    and the folders of this interpreter are only read.
    """
    files = sorted(wheels.glob("*.whl")) if wheels else []
    if wheels and not files:
        sys.exit(f"error: --wheels {wheels} holds no wheel: recipes/gpu/wheels.sh {wheels} collects them")
    folder = out / "work" / "env"
    packages = folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    lacking = [path for path in files if not _is_there(path)]
    if not lacking and not (packages / "shared.pth").exists():
        return Path(sys.executable)
    import venv  # some distributions leave it out

    venv.EnvBuilder(system_site_packages=True, symlinks=True).create(folder)
    shared = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "shared.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in shared))
    _install([str(path) for path in lacking if not _is_there(path, [str(packages)])], packages)
    return folder / "bin" / "python"


def _is_there(wheel: Path, folders: list[str] | None = None) -> bool:
    """Return whether any version of a wheel's package is on this machine, or this version in ``folders``."""
    name, version = wheel.name.split("-")[:2]
    found = metadata.distributions(name=name, **({"path": folders} if folders else {}))
    return any(folders is None or each.version == version for each in found)


def _install(wheels: list[str], target: Path) -> None:
    if not wheels:
        return
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-input", "--no-index", "--no-deps"]
    pip += ["--disable-pip-version-check", "--no-cache-dir", "--upgrade", "--target", str(target), *wheels]
    done = subprocess.run(pip, capture_output=True, text=True)
    if "No module named pip" in done.stderr:  # these wheels have modules and programs only
        for path in wheels:
            zipfile.ZipFile(path).extractall(target)
        for program in target.glob("*.data/scripts/*"):
            program.chmod(0o755)
            (target / "bin").mkdir(exist_ok=True)
            program.replace(target / "bin" / program.name)
    elif done.returncode:
        sys.exit(f"error: pip cannot install {', '.join(wheels)}:\n{done.stderr}")


def environment(out: Path, options: argparse.Namespace) -> dict[str, str]:
    """Return the environment of the parts: all caches below ``out``, no network, and a writable home."""
    caches, home = out / "work" / "caches", out / "work" / "home"
    home.mkdir(parents=True, exist_ok=True)
    folders = {
        **{name: caches / name.lower() for name in CACHES},
        "HOME": home,
        "PYTHONUSERBASE": Path(site.getuserbase()),  # so that the user's packages are found
    }
    for path in folders.values():
        with contextlib.suppress(OSError):
            path.mkdir(parents=True, exist_ok=True)
    offline = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "PIP_NO_INDEX", "PYTHONUNBUFFERED")
    env = os.environ | {name: str(path) for name, path in folders.items()} | dict.fromkeys(offline, "1")
    sources = [str(ROOT)] if (ROOT / "am_lightning").is_dir() else []
    older = [env["PYTHONPATH"]] if env.get("PYTHONPATH") else []
    env["PYTHONPATH"] = os.pathsep.join([*sources, *older])
    programs = [options.python.parent, Path(sys.executable).parent, *out.glob("work/env/lib/*/site-packages/bin")]
    env["PATH"] = os.pathsep.join([*map(str, programs), env.get("PATH", "")])
    if options.device == "cpu":
        env |= {"CUDA_VISIBLE_DEVICES": "", "AM_GPU_TESTS_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}
        env.setdefault("OMP_NUM_THREADS", "1")
    return env


def run_part(
    each: Part, options: argparse.Namespace, deadline: float, env: dict[str, str], command: str
) -> Answer | None:
    """Run a part and return its answer, or None if there was no time for it. The next call then runs it."""
    left = deadline - time.monotonic()
    if left < LEAST * each.seconds:
        print(f"{each.name:32} not begun: {max(0.0, left):.0f} s are left, it may take {each.seconds:.0f}", flush=True)
        return None
    seconds, start = min(each.seconds, left), time.monotonic()
    words = [str(options.python), __file__, "--run", each.name, "--seconds", str(max(1.0, seconds - GRACE))]
    words += ["--parent", str(os.getpid()), "--command", command, "--out", str(options.out), "--device", options.device]
    log = options.out / "work" / "logs" / f"{each.name.replace('/', '.')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"{each.name:32} ", end="", flush=True)
    with open(log, "wb") as file:
        status = _status(words + ["--tiny"] * options.tiny, env, file, seconds)
    if status is None and seconds < each.seconds:
        print(f"cut off after {seconds:.0f} s: the time is over", flush=True)
        return None
    if status != 0:
        why = f"took more than its {each.seconds:.0f} s" if status is None else f"ended with status {status}"
        tail = log.read_text(errors="replace")[-4000:]
        more: dict[str, Any] = {"rehearsal": options.tiny, "command": command, "log": tail}
        keep(options.out, answer(each.name, "failed", why, **more))
    found = read_answers(options.out)[each.name]
    text = found["status"] + (f": {found['why'].splitlines()[0]}" if found["why"] else "")
    print(f"{time.monotonic() - start:6.1f} s  {text}", flush=True)
    return found


def _status(words: list[str], env: dict[str, str], log: Any, seconds: float) -> int | None:
    """Return the exit status of a process, or None if it took longer. All that it has started ends with it."""
    process = subprocess.Popen(words, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        status = process.wait(seconds)
        return None if status == OUT_OF_TIME else status
    except subprocess.TimeoutExpired:
        return None
    finally:  # this also runs if a signal ends this process
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _summary(out: Path, names: list[str]) -> int:
    known = read_answers(out)
    by_status: dict[str, list[str]] = {}
    for name in names:
        by_status.setdefault(known.get(name, {}).get("status", "missing"), []).append(name)
    for status, members in by_status.items():
        print(f"{len(members)} {status}" + ("" if status == "done" else f": {', '.join(members)}"))
    print(f"{out / 'results.json'}; the same command runs first what is missing, and then what is not done")
    return 1 if by_status.get("failed") else 0


def _stop(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped; the same command continues from here")
