"""Runs on disk: which folders hold one, its configuration, and its curves, whichever program wrote them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from am_lightning.pretrain.commands.report.events import PATTERN, Curve, last_picture, read_files
from am_lightning.pretrain.model.shape import LlamaShape, count_parameters
from am_lightning.pretrain.runtime.errors import RecipeError
from am_lightning.pretrain.runtime.settings import saved_config

_LAYERS, _ALL = "am/beta/layer/", "am/beta/"
# Below a run's folder: other runs (of --compare, and those that a newer one moved away), never its own events.
_NOT_ITS_OWN = ("compare", "earlier", "data", "checkpoints")
# Where the programs put their event files: pretrain.py, Accelerate's and the HF Trainer's trackers.
_LOG_FOLDERS = ("logs", "runs", "tensorboard")
# Keys of a configuration's `model` section from which the number of parameters follows.
_SHAPE = {"hidden_size", "intermediate_size", "num_heads", "num_layers", "vocab_size", "seq_len"}


def _logged(*patterns: str) -> cached_property[Curve | None]:
    """Return an attribute of `RunData`: the curve that `find` finds, or None if it was not logged."""
    return cached_property(lambda run: run.find(*patterns))


@dataclass(frozen=True)
class RunData:
    """A run as its files describe it. A curve is None if the run did not log it."""

    name: str  # name in the legend
    folder: Path  # the run's folder
    config: dict[str, Any]  # resolved configuration; {} if none was saved
    curves: dict[str, Curve] = field(repr=False)  # scalars by tag
    files: Sequence[Path] = ()  # event files, which may hold a picture of the layers

    train_loss = _logged("*/train/loss", "*/train_loss", "/loss")  # nats per token
    learning_rate = _logged("*/learning_rate", "*/lr", "/lr-*")  # the first parameter group's
    grad_norm = _logged("*/am/grad_norm", "*/grad_norm")  # global norm before clipping
    tokens_per_second = _logged("*/throughput/tokens_per_second", "*/tokens_per_second", "*/device/items_per_sec")
    mfu = _logged("*/throughput/mfu", "*/mfu")  # share of the device's peak
    skipped = _logged("*/am/skipped_steps", "*/skipped_steps")  # steps dropped so far
    beta_mean = _logged("*/am/beta/mean")  # mean of beta_t over the tensors and the steps since the last point
    at_max = _logged("*/am/clamp/at_max")  # share of the tensors' steps with beta_t at its cap
    at_zero = _logged("*/am/clamp/at_zero")  # share of the tensors' steps with beta_t = 0

    def find(self, *patterns: str) -> Curve | None:
        """Return the first curve that a pattern fits. A tag begins with "/", or with a tracker's prefix (`/train/`)."""
        fitting = (tag for pattern in patterns for tag in self.curves if fnmatchcase(f"/{tag}", pattern))
        return next((self.curves[tag] for tag in fitting), None)

    @property
    def val_loss(self) -> Curve | None:
        """Loss of the validations during training, in nats per token."""
        found = self.find("*/val/loss", "*/eval/loss", "*/val_loss", "*/eval_loss")
        return None if found is self.find("*/final/val_loss") else found

    @property
    def beta_ends(self) -> tuple[Curve, Curve] | None:
        """The lowest and the highest beta_t of any tensor in any step since the last point."""
        low, high = self.find("*/am/beta/min"), self.find("*/am/beta/max")
        return None if low is None or high is None or len(low.steps) != len(high.steps) else (low, high)

    @property
    def cap(self) -> float | None:
        """Upper limit of beta_t."""
        found = self.find("*/am/beta/cap")
        return float(found.values.max()) if found else None

    @property
    def has_layers(self) -> bool:
        """True if `momentum` has a curve for each layer, False if it has one for each layer group."""
        return bool(self._lowest(_LAYERS))

    @cached_property
    def layers_picture(self) -> bytes | None:
        """A PNG of the layers' momentum over the steps, if the run logged one and no curves of layers."""
        return None if self.has_layers else last_picture(self.files, "am/beta/layers")

    @cached_property
    def momentum(self) -> dict[str, Curve]:
        """The lowest beta_t of the tensors and the steps since the last point, by layer, or by layer group if no layers
        were logged, in the order of the tags, which is the optimizer's; {} without adaptive memory."""
        return self._lowest(_LAYERS) or self._lowest(_ALL)

    def _lowest(self, start: str) -> dict[str, Curve]:
        """Return the curves of tags `start`NAME/min by NAME."""
        found = {tag: curve for tag, curve in self.curves.items() if fnmatchcase(f"/{tag}", f"*/{start}*/min")}
        return {tag.split(start, 1)[1].removesuffix("/min"): curve for tag, curve in found.items()}

    @property
    def steps(self) -> int:
        """Optimizer steps done, up to the last point of the loss or the momentum; 0 without both."""
        return max((int(curve.steps[-1]) for curve in (self.train_loss, self.beta_mean) if curve), default=0)

    @property
    def tokens(self) -> int | None:
        """Tokens of all these steps; None if the configuration does not tell."""
        rows, length = self.setting("data.batch_size"), self.setting("data.seq_len") or self.setting("model.seq_len")
        return self.steps * rows * length if isinstance(rows, int) and isinstance(length, int) else None

    @property
    def parameters(self) -> int | None:
        """Parameters of the configured Llama; None if none is configured."""
        model = self.setting("model")
        known = isinstance(model, dict) and model.keys() >= _SHAPE
        return count_parameters(LlamaShape.among(model)) if known else None

    @property
    def final_val_loss(self) -> float | None:
        """Loss of the validation after the last step; None if there was none yet."""
        found = self.find("*/final/val_loss")
        return found.last if found else None

    @property
    def validation_points(self) -> list[tuple[int, float]]:
        """(steps done, validation loss) of all validations, the one after the last step included."""
        found, final = self.val_loss, self.final_val_loss
        points = dict(zip(found.steps.tolist(), found.values.tolist(), strict=True)) if found else {}
        if final is not None:
            points[max([self.steps, *points])] = final
        return sorted(points.items())

    def setting(self, path: str) -> Any:
        """Return a value of the configuration by its dotted path, or None."""
        value: Any = self.config
        for word in path.split("."):
            value = value.get(word) if isinstance(value, dict) else None
        return value


def find_runs(names: list[str]) -> list[RunData]:
    """Return the runs in some folders, each `PATH` or `NAME=PATH`.

    A folder that holds several runs stands for all of them. A run brings along the runs that `--compare` trained.

    Raises:
        RecipeError: if a folder is missing or holds no run.
    """
    given = []
    for name, path in map(split_name, names):
        if not path.is_dir():
            raise RecipeError(f"{path} is not a folder: give the folder of a run, where its logs are")
        if not (found := list(_runs_in(path))):
            raise RecipeError(
                f"{path} holds no run: no event file ({PATTERN}) in it, in {', '.join(_LOG_FOLDERS)} or one level below"
                ". Was the run started with a TensorBoard logger, and has it made its first steps?"
            )
        given.append((name, found))
    names_given: dict[Path, str | None] = {}
    for name, (first, *_) in given:
        names_given[first] = name or names_given.get(first)
    # A folder that was itself given comes at its own position.
    order = [folder for _, found in given for folder in found if folder == found[0] or folder not in names_given]
    folders = {folder: names_given.get(folder) for folder in order}
    labels = _labels(folders)
    return [_read(labels[folder], folder) for folder in folders]


def split_name(text: str) -> tuple[str | None, Path]:
    """Return the name and the folder in `PATH` or `NAME=PATH`."""
    name, equals, path = text.rpartition("=")
    if equals and not Path(text).is_dir():
        return name, Path(path).expanduser().resolve()
    return None, Path(text).expanduser().resolve()


def _runs_in(folder: Path, depth: int = 2) -> Iterator[Path]:
    """Yield the run in this folder and those compared with it, or else the runs in its sub-folders."""
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
        # A folder called `runs` may also hold whole runs, each with logs of its own.
        if inside.is_dir() and not list(inside.glob("*/logs")):
            yield from inside.rglob(PATTERN)


def _read(label: str, folder: Path) -> RunData:
    files = list(_event_files(folder))
    # Lightning, which writes hparams.yaml, counts its first step as 0. The other programs count the steps done.
    lightning = any((place / "hparams.yaml").exists() for place in (folder, folder / "logs"))
    return RunData(label, folder, saved_config(folder), read_files(files, first_step=0 if lightning else 1), files)


def _labels(folders: dict[Path, str | None]) -> dict[Path, str]:
    """Return a name for each run: the given one, or as many of its last folders as distinguish it.

    Runs in the same folder get equally many.
    """
    labels = {folder: name or folder.name for folder, name in folders.items()}
    for words in range(2, 6):
        twice = [label for label in labels.values() if list(labels.values()).count(label) > 1]
        places = {folder.parent for folder, given in folders.items() if labels[folder] in twice and not given}
        for folder, given in folders.items():
            if folder.parent in places and not given:
                labels[folder] = "/".join(folder.parts[-words:])
    return labels
