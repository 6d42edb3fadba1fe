"""A picture, and the tag, step and pixels that loggers have kept of it, read back from their own files."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

_Y, _X = np.indices((24, 40))
IMAGE = np.stack([_X * 6, 240 - _Y * 10, _X * 2 + _Y * 5], axis=2).astype(np.uint8)  # smooth: a JPEG keeps it
Kept = list[tuple[str, int, np.ndarray]]


def same(kept: Kept, tag: str, step: int, *, atol: int = 0) -> bool:
    """Return whether IMAGE was kept once with this tag and step, up to the loss of a format."""
    if [(tag, step, IMAGE.shape)] != [(name, at, pixels.shape) for name, at, pixels in kept]:
        return False
    return bool(np.abs(kept[0][2].astype(int) - IMAGE).mean() <= atol)


def pixels(source: Path | bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(source) if isinstance(source, bytes) else source).convert("RGB"))


def in_events(folder: Path) -> Kept:
    found = []
    for path in folder.rglob("*tfevents*"):
        events = EventAccumulator(str(path), {"images": 0}).Reload()
        for tag in events.Tags()["images"]:
            found += [(tag, event.step, pixels(event.encoded_image_string)) for event in events.Images(tag)]
    return found


def wandb_rows(folder: Path) -> list[dict[str, Any]]:
    """Return what was logged in order, one dict per row."""
    from wandb.proto import wandb_internal_pb2

    rows: list[dict[str, Any]] = []
    (path,) = folder.rglob("*.wandb")
    for data in _wandb_records(path.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            rows.append({})
            for item in record.history.item:
                tag, *part = item.nested_key or [item.key]
                value = json.loads(item.value_json)
                rows[-1][tag] = rows[-1].get(tag, {}) | {part[0]: value} if part else value
    return rows


def _wandb_records(data: bytes) -> Iterator[bytes]:
    """Yield the records of a LevelDB log after W&B's seven bytes: blocks of 32 KiB, records in one or more parts."""
    at, record = 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, part = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if part in (1, 4):  # whole, last
            yield record
            record = b""


def in_wandb(folder: Path, axis: str) -> Kept:
    found = []
    for row in wandb_rows(folder):
        for tag, value in row.items():
            if isinstance(value, dict):
                names = value.get("filenames") or [value["path"]]
                found += [(tag, row[axis], pixels(path)) for name in names for path in folder.rglob(f"files/{name}")]
    return found


def in_mlflow(folder: Path) -> Kept:
    parts = ((path.name.split("+"), path) for path in folder.rglob("artifacts/images/*.png"))
    return [(tag.replace("~", "/"), int(step), pixels(path)) for (tag, _, step, *_), path in parts]


def in_comet(folder: Path) -> Kept:
    (path,) = folder.glob("*.zip")
    with zipfile.ZipFile(path) as archive:
        messages = [json.loads(line)["payload"] for line in archive.read("messages.json").splitlines()]
        sent = [(row["additional_params"], row["file_path"]) for row in messages if "file_path" in row]
        return [
            (about["figName"], about["step"], pixels(archive.read(name))) for about, name in sent if "figName" in about
        ]


def in_trackio(folder: Path, axis: str) -> Kept:
    """Read ``folder``, which is also the TRACKIO_DIR of this process."""
    from trackio.sqlite_storage import SQLiteStorage

    found = []
    for project in SQLiteStorage.get_projects():
        for row in (row for run in SQLiteStorage.get_runs(project) for row in SQLiteStorage.get_logs(project, run)):
            files = [(tag, value["file_path"]) for tag, value in row.items() if isinstance(value, dict)]
            found += [(tag, row[axis], pixels(folder / "media" / name)) for tag, name in files]
    return found


def in_clearml(folder: Path) -> Kept:
    events = [event for path in folder.rglob("metrics.jsonl") for line in path.open() for event in json.loads(line)]
    shown = [event for event in events if event["type"] == "training_debug_image"]
    files = {path.name: path for path in folder.rglob("*.jpeg")}
    return [
        (f"{event['metric']}/{event['variant']}", event["iter"], pixels(files[event["key"].rpartition("/")[2]]))
        for event in shown
    ]


def in_swanlab(folder: Path) -> Kept:
    """Read SwanLab's folder, whose file has no reader; the picture's name begins with the step."""
    return [("", int(path.name.partition("-")[0]), pixels(path)) for path in folder.rglob("media/image/*.png")]
