"""A part of the check: what it is given, and its answer, one JSON file that is written whole or not at all."""

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
OUT_OF_TIME = 75  # exit status of a part that wrote no answer because its time was over; sysexits.h: try again
Answer = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """
    Attributes:
        name: "facts", "right/test_fused", ...; its JSON is called after it.
        module: beside this file, with a function ``run(name, context) -> result``.
        worth: parts with lower numbers come first.
        seconds: that it may take.
    """

    name: str
    module: str
    worth: int
    seconds: float


@dataclass(frozen=True)
class Context:
    """
    Attributes:
        out: folder of all answers.
        device: "cuda" or "cpu".
        tiny: toy sizes: a rehearsal, whose numbers say nothing.
        ends: when the part must have ended, on time.monotonic()'s clock.
    """

    out: Path
    device: str
    tiny: bool
    ends: float

    @property
    def work(self) -> Path:
        """Folder of what can be made again: packages, caches, tokens, runs."""
        return self.out / "work"

    @property
    def left(self) -> float:
        """Seconds."""
        return self.ends - time.monotonic()


class NotMeasuredError(Exception):
    """Something is missing that nobody can mend here; the text says what."""


class FailedError(Exception):
    """Something is wrong; the text says what. ``result`` is what was found all the same."""

    def __init__(self, text: str, result: Answer | None = None) -> None:
        super().__init__(text)
        self.result = result


class OutOfTimeError(Exception):
    """The part's time is over, and it has no answer yet."""


def path_of(out: Path, name: str) -> Path:
    """The JSON of a part."""
    return out / "parts" / f"{name.replace('/', '.')}.json"


def write_json(path: Path, content: Answer) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def read_json(path: Path) -> Answer | None:
    """None where there is no whole JSON."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def answer(name: str, status: str, why: str = "", **more: Any) -> Answer:
    """What every answer says. ``status``: "done", "failed" or "not measured"; ``why``: in words, unless done."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"part": name, "status": status, "why": why, "date": now, "code": code(), **more}


def run(part: Part, context: Context, command: str) -> None:
    """Run a part in this process and write its answer, whatever happens."""
    start = time.perf_counter()
    try:
        found = importlib.import_module(part.module).run(part.name, context)
        content = answer(part.name, "done", result=found)
    except OutOfTimeError:
        sys.exit(OUT_OF_TIME)
    except NotMeasuredError as error:
        content = answer(part.name, "not measured", str(error))
    except FailedError as error:
        content = answer(part.name, "failed", str(error), result=error.result)
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
    write_json(path_of(context.out, part.name), content)


def die_with(parent: int) -> None:
    """End this process and those that it started when its parent is killed, so that the GPU is free then."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def versions() -> dict[str, str]:
    """Of Python and of what is installed here."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def code() -> str:
    """A few letters that change when the code does."""
    digest = hashlib.sha256()
    for folder in ("am_lightning", "recipes", "tests/gpu"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:10]


def device_name(device: str) -> str:
    """The hardware's."""
    try:
        import torch

        if device == "cuda":
            return torch.cuda.get_device_name()
    except Exception as error:  # whatever it is, the part's own answer tells of it
        return f"{device} ({type(error).__name__})"
    return f"CPU, {torch.get_num_threads()} threads"
