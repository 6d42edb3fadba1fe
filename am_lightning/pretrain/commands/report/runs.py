"""Runs on the disk: which folders hold one, what it was configured with, and its curves whatever program wrote them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from am_lightning.pretrain.commands.report.events import PATTERN, Curve, last_picture, read_files
from am_lightning.pretrain.model.shape import LlamaShape, count_parameters
from am_lightning.pretrain.runtime.errors import RecipeError
from am_lightning.pretrain.runtime.saved_config import saved_config

LAYER_TAG = "am/beta/layer/"
_KIND_TAG = "am/beta/"
_OF_ALL = {"mean", "min", "max", "cap", "floor", "effective_steps"}  # after it: of no layer group
_ENDS = ("/min", "/max")
_PICTURE_TAG = "am/beta/layers"
# Below a run's folder: other runs (of --compare, and those that a newer one moved away), never its own events.
_NOT_ITS_OWN = ("compare", "earlier", "data", "checkpoints")
# Where the programs put their event files: pretrain.py, Accelerate's and the HF Trainer's trackers.
_LOG_FOLDERS = ("logs", "runs", "tensorboard")
# What a configuration's `model` section needs to say how many parameters there are.
_SHAPE = {"hidden_size", "intermediate_size", "num_heads", "num_layers", "vocab_size", "seq_len"}


@dataclass(frozen=True)
class RunData:
    """One run.

    Attributes:
        name: in the legend.
        folder: everything it wrote is there.
        config: resolved; {} where none was saved.
        curves: its scalars by tag.
        layers_picture: a PNG of the layers' momentum over the steps, where it logged no curves of layers.
        final: validation loss after the last step; None: as logged.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    curves: dict[str, Curve] = field(repr=False)
    final: float | None = None
    layers_picture: bytes | None = field(default=None, repr=False)

    def find(self, *tags: str) -> Curve | None:
        """The first of the tags that was logged; trackers may have put words before it (`train/am/grad_norm`)."""
        for tag in tags:
            for own, curve in self.curves.items():
                if own == tag or own.endswith(f"/{tag}"):
                    return curve
        return None

    @property
    def train_loss(self) -> Curve | None:
        """Nats per token."""
        return self.find("train/loss", "train_loss", "train/train_loss") or self.curves.get("loss")

    @property
    def val_loss(self) -> Curve | None:
        """Nats per token, of the validations before the one after the last step."""
        found = self.find("val/loss", "eval/loss", "val_loss", "eval_loss")
        return None if found is self.find("final/val_loss") else found

    @property
    def grad_norm(self) -> Curve | None:
        """Global norm of the gradient before clipping."""
        return self.find("am/grad_norm", "grad_norm")

    @property
    def tokens_per_second(self) -> Curve | None:
        """Over all processes."""
        return self.find("throughput/tokens_per_second", "tokens_per_second", "device/items_per_sec")

    @property
    def mfu(self) -> Curve | None:
        """Share of the device's peak."""
        return self.find("throughput/mfu", "mfu", "device/mfu")

    @property
    def skipped(self) -> Curve | None:
        """Steps dropped so far."""
        return self.find("am/skipped_steps", "skipped_steps")

    @property
    def learning_rate(self) -> Curve | None:
        """Of the first parameter group."""
        found = self.find("learning_rate", "lr")
        return found or next((curve for tag, curve in self.curves.items() if tag.startswith("lr-")), None)

    @property
    def beta_mean(self) -> Curve | None:
        """Mean of beta_t over the tensors and the steps since the point before."""
        return self.find("am/beta/mean")

    @property
    def beta_ends(self) -> tuple[Curve, Curve] | None:
        """The lowest and the highest beta_t of any tensor in any of those steps."""
        low, high = self.find("am/beta/min"), self.find("am/beta/max")
        return None if low is None or high is None or len(low.steps) != len(high.steps) else (low, high)

    @property
    def cap(self) -> float | None:
        """Of beta_t; None where the run did not log it."""
        found = self.find("am/beta/cap")
        return float(found.values.max()) if found else None

    @property
    def at_max(self) -> Curve | None:
        """Share of the tensors' steps with beta_t at its cap."""
        return self.find("am/clamp/at_max")

    @property
    def at_zero(self) -> Curve | None:
        """Share of the tensors' steps with beta_t = 0."""
        return self.find("am/clamp/at_zero")

    @property
    def has_layers(self) -> bool:
        """Whether `momentum` is of layers; else it is of layer groups."""
        return any(LAYER_TAG in f"/{tag}" for tag in self.curves)

    @property
    def has_lowest(self) -> bool:
        """Whether `momentum` is the lowest of all steps and tensors; else it is the mean of logged steps."""
        return any(_after(tag, _KIND_TAG).endswith("/min") for tag in self.curves if f"/{_KIND_TAG}" in f"/{tag}")

    @cached_property
    def momentum(self) -> dict[str, Curve]:
        """beta_t by layer, in the order of the logger's tags, which is the optimizer's; by layer group where the logger
        had no layers; {} without adaptive memory.

        It is the lowest of the steps since the point before, where the run logged it, else the mean.
        """
        layers = {_after(tag, LAYER_TAG): c for tag, c in self.curves.items() if LAYER_TAG in f"/{tag}"}
        if not layers:
            layers = {_after(tag, _KIND_TAG): c for tag, c in self.curves.items() if f"/{_KIND_TAG}" in f"/{tag}"}
        means = {name: curve for name, curve in layers.items() if name not in _OF_ALL and not name.endswith(_ENDS)}
        return {name: _lowest(curve, layers.get(f"{name}/min")) for name, curve in means.items()}

    @property
    def steps(self) -> int:
        """Optimizer steps done, as far as a loss or the momentum was logged; 0 where neither was."""
        return max((int(curve.steps[-1]) for curve in (self.train_loss, self.beta_mean) if curve), default=0)

    @property
    def tokens(self) -> int | None:
        """Read in all these steps; None where the configuration does not say."""
        rows, length = self.setting("data.batch_size"), self.setting("data.seq_len") or self.setting("model.seq_len")
        return self.steps * rows * length if isinstance(rows, int) and isinstance(length, int) else None

    @property
    def parameters(self) -> int | None:
        """Of the configured Llama; None where there is none."""
        model = self.setting("model")
        return parameters(model) if isinstance(model, dict) and model.keys() >= _SHAPE else None

    @property
    def final_val_loss(self) -> float | None:
        """Of the validation after the last step; None where there was none yet."""
        found = self.find("final/val_loss")
        return self.final if self.final is not None else found.last if found else None

    @property
    def newest_val_loss(self) -> tuple[int, float] | None:
        """Steps done, and the loss: the final one, else the newest."""
        if self.final_val_loss is not None:
            return self.steps, self.final_val_loss
        found = self.val_loss
        return (int(found.steps[-1]), found.last) if found else None

    @property
    def validation_points(self) -> list[tuple[float, float]]:
        """(steps done, validation loss), with the one after the last step."""
        found = self.val_loss
        points = dict(zip(found.steps.tolist(), found.values.tolist(), strict=True)) if found else {}
        if self.final_val_loss is not None and self.steps:
            points[self.steps] = self.final_val_loss
        return sorted(points.items())

    def setting(self, path: str) -> Any:
        """A value of the configuration by its dotted path; None where there is none."""
        value: Any = self.config
        for word in path.split("."):
            value = value.get(word) if isinstance(value, dict) else None
        return value


def parameters(model: dict[str, Any]) -> int:
    """Parameters of the Llama in a configuration's `model` section."""
    shape = {key: value for key, value in model.items() if key in LlamaShape.__dataclass_fields__}
    return count_parameters(LlamaShape(**shape))


def find_runs(names: list[str]) -> list[RunData]:
    """The runs in some folders, each `PATH` or `NAME=PATH`.

    A folder that holds several runs stands for all of them, and a run brings what `--compare` trained beside it.

    Raises:
        RecipeError: a folder is missing or holds no run.
    """
    given = [(name, _found_in(path)) for name, path in map(_split, names)]
    first = {found[0] for _, found in given}
    folders: dict[Path, str | None] = {}
    for name, found in given:
        for folder in found:
            if folder == found[0] or folder not in first:  # what is named itself keeps its own place
                folders.setdefault(folder, None)
        folders[found[0]] = name or folders[found[0]]
    labels = _labels(folders)
    return [_read(labels[folder], folder) for folder in folders]


def _found_in(path: Path) -> list[Path]:
    if not path.is_dir():
        raise RecipeError(f"{path} is not a folder: give the folder of a run, where its logs are")
    found = list(_runs_in(path))
    if not found:
        raise RecipeError(
            f"{path} holds no run: no event file ({PATTERN}) in it, in {', '.join(_LOG_FOLDERS)} or one level below. "
            "Was the run started with a TensorBoard logger, and has it made its first steps?"
        )
    return found


def folder_of(text: str) -> Path:
    """The folder in `PATH` or `NAME=PATH`."""
    return _split(text)[1]


def _split(text: str) -> tuple[str | None, Path]:
    name, equals, path = text.rpartition("=")
    if equals and not Path(text).is_dir():
        return name, Path(path).expanduser().resolve()
    return None, Path(text).expanduser().resolve()


def _runs_in(folder: Path, depth: int = 2) -> Iterator[Path]:
    """The run in this folder and those compared with it; else the runs in its sub-folders."""
    if list(_event_files(folder)):
        yield folder
        for other in sorted((folder / "compare").glob("*")):
            yield from _runs_in(other, 0)
    elif depth:
        for child in sorted(p for p in folder.iterdir() if p.is_dir() and p.name not in _NOT_ITS_OWN):
            yield from _runs_in(child, depth - 1)


def _event_files(folder: Path) -> Iterator[Path]:
    yield from folder.glob(PATTERN)
    for name in _LOG_FOLDERS:
        inside = folder / name
        # A folder called `runs` may also be where whole runs are kept: those have a configuration of their own.
        if inside.is_dir() and not list(inside.glob("*/logs")):
            yield from inside.rglob(PATTERN)


def _read(label: str, folder: Path) -> RunData:
    files = list(_event_files(folder))
    # Lightning's first step is 0, the HF Trainer's and Accelerate's programs count the steps done.
    curves = read_files(files, first_step=0 if _by_lightning(folder) else 1)
    layers = any(LAYER_TAG in f"/{tag}" for tag in curves)
    return RunData(
        label, folder, saved_config(folder), curves, None, None if layers else last_picture(files, _PICTURE_TAG)
    )


def _by_lightning(folder: Path) -> bool:
    return any((place / "hparams.yaml").exists() for place in (folder, folder / "logs"))


def _labels(folders: dict[Path, str | None]) -> dict[Path, str]:
    """A name for each run: the one given, else as many of the last folders as it takes to tell them apart.

    Runs in one folder have equally many.
    """
    labels = {folder: name or folder.name for folder, name in folders.items()}
    for words in range(2, 6):
        twice = [label for label in labels.values() if list(labels.values()).count(label) > 1]
        places = {folder.parent for folder, given in folders.items() if labels[folder] in twice and not given}
        for folder, given in folders.items():
            if folder.parent in places and not given:
                labels[folder] = "/".join(folder.parts[-words:])
    return labels


def _lowest(mean: Curve, low: Curve | None) -> Curve:
    """The lowest; before it, of a run that logged only means when it began, the mean."""
    if low is None:
        return mean
    before = mean.steps < low.steps[0]
    steps = np.concatenate([mean.steps[before], low.steps])
    return Curve(steps, np.concatenate([mean.values[before], low.values]))


def _after(tag: str, start: str) -> str:
    return tag.split(start, 1)[1]
