"""A part of the check, and its answer in results.json, which is written completely or not at all."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import platform
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    *("torch", "triton", "lightning", "pytorch-lightning", "accelerate", "transformers", "tokenizers", "deepspeed"),
    *("torchmetrics", "tensorboard", "jsonargparse", "schedulefree", "expecttest", "numpy", "pytest"),
)
OUT_OF_TIME = 75  # exit status of a part that ran out of time before its answer; sysexits.h: try again
Answer = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """A part of the check.

    Attributes:
        name: "facts", "right/test_fused", ...
        module: module beside this file with a function ``run(name, context) -> result``.
        worth: order of the parts, the lowest number first.
        seconds: longest time that it may take.
    """

    name: str
    module: str
    worth: int
    seconds: float


@dataclass(frozen=True)
class Context:
    """The setting in which a part runs.

    Attributes:
        out: folder of all answers.
        device: "cuda" or "cpu".
        tiny: whether this is a rehearsal at toy sizes, whose numbers mean nothing.
        ends: time at which the part must have ended, on the clock of time.monotonic().
    """

    out: Path
    device: str
    tiny: bool
    ends: float

    @property
    def work(self) -> Path:
        """Folder of packages, caches, tokens and runs, which can be rebuilt."""
        return self.out / "work"

    @property
    def left(self) -> float:
        """Seconds until the part must have ended."""
        return self.ends - time.monotonic()


class FailedError(Exception):
    """Something is wrong. The text names it, and ``result`` is what was found before."""

    status = "failed"

    def __init__(self, text: str, result: Answer | None = None) -> None:
        super().__init__(text)
        self.result = result


class NotMeasuredError(FailedError):
    """Something is missing on this machine. The text names it."""

    status = "not measured"


class OutOfTimeError(Exception):
    """The part ran out of time before its answer."""


def read_json(path: Path) -> Answer:
    """Return the content of a JSON file, or {} if it is missing."""
    content: Answer = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return content


def write_json(path: Path, content: Answer) -> None:
    """Write a JSON file completely or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def read_answers(out: Path) -> dict[str, Answer]:
    """Return the answer of each part that has one."""
    return dict(read_json(out / "results.json").get("parts", {}))


def keep(out: Path, *contents: Answer, **more: Any) -> None:
    """Add answers and other keys to results.json."""
    path = out / "results.json"
    parts = read_answers(out) | {content["part"]: content for content in contents}
    write_json(path, read_json(path) | more | {"parts": parts})


def answer(name: str, status: str, why: str = "", **more: Any) -> Answer:
    """Return an answer. ``status`` is "done", "failed" or "not measured", and ``why`` is its reason unless done."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"part": name, "status": status, "why": why, "date": now, "code": code(), **more}


def run(part: Part, context: Context, command: str) -> None:
    """Run a part in this process and write its answer, also after an error."""
    start = time.perf_counter()
    try:
        found = importlib.import_module(part.module).run(part.name, context)
        content = answer(part.name, "done", result=found)
    except OutOfTimeError:
        sys.exit(OUT_OF_TIME)
    except FailedError as error:
        content = answer(part.name, error.status, str(error), result=error.result)
    except Exception as error:
        lines = traceback.format_exc()
        print(lines, file=sys.stderr)
        content = answer(part.name, "failed", f"{type(error).__name__}: {error}", traceback=lines[-4000:])
    content |= {
        "seconds": round(time.perf_counter() - start, 1),
        "rehearsal": context.tiny,
        "device": device_name(context.device),
        "versions": versions(),
        "command": command,
    }
    keep(context.out, content)


def die_with(parent: int) -> None:
    """End this process and those that it started when its parent is killed, to free the GPU."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed PACKAGES."""
    installed = {found.name.lower(): found.version for found in metadata.distributions()}
    return {"python": platform.python_version()} | {name: installed[name] for name in PACKAGES if name in installed}


def code() -> str:
    """Return a hash of the code."""
    digest = hashlib.sha256()
    for folder in ("am_lightning", "recipes", "tests/gpu"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:10]


def device_name(device: str) -> str:
    """Return the name of the hardware."""
    try:
        import torch

        if device == "cuda":
            return torch.cuda.get_device_name()
    except Exception as error:  # the part's own answer reports it
        return f"{device} ({type(error).__name__})"
    return f"CPU, {torch.get_num_threads()} threads"
