"""Image data sets in memory: scikit-learn's digits, and CIFAR-10 / CIFAR-100 from their published Python archives."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from am_lightning.pretrain.runtime.errors import RecipeError

DATA = ("digits", "cifar10", "cifar100")
_TEST_SHARE = 0.3  # share of digits, which has no split of its own
_CIFAR = {  # folder of the unpacked archive, its training and test files, the key of the labels
    "cifar10": ("cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"], b"labels"),
    "cifar100": ("cifar-100-python", ["train"], ["test"], b"fine_labels"),
}


@dataclass(frozen=True)
class Images:
    """A split image data set.

    Attributes:
        train, test: float32 (images, channels, height, width), standardised by the training images' channels.
        train_labels, test_labels: int64 (images,).
        classes: number of classes.
        padding: padding of the random crops in training. 0: no augmentation.
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    classes: int
    padding: int

    def batches(self, batch_size: int, epoch: int, seed: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield shuffled full batches of one epoch, a function of seed and epoch."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.train), generator=generator)
        for rows in order[: len(order) // batch_size * batch_size].view(-1, batch_size):
            images = self.train[rows]
            if self.padding:
                images = _augment(images, self.padding, generator)
            yield images.to(device), self.train_labels[rows].to(device)


def load_images(name: str, folder: Path | None) -> Images:
    """Return an image data set.

    Args:
        name: one of DATA.
        folder: folder in which the archive of CIFAR was unpacked.

    Raises:
        RecipeError: if a file is missing.
    """
    if name == "digits":
        return _digits()
    if folder is None:
        raise RecipeError(f"data {name} needs --data-dir: the folder that {_CIFAR[name][0]} was unpacked in")
    return _cifar(name, folder)


def _digits() -> Images:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch: Any = load_digits()
    images = bunch.images.astype(np.float32)[:, None]
    parts = train_test_split(images, bunch.target, test_size=_TEST_SHARE, random_state=0, stratify=bunch.target)
    train, test, train_labels, test_labels = (torch.from_numpy(part) for part in parts)
    return _standardised(train, train_labels.long(), test, test_labels.long(), padding=0)


def _cifar(name: str, root: Path) -> Images:
    folder, train_files, test_files, key = _CIFAR[name]
    train, test = ([_read(root / folder / file, key) for file in files] for files in (train_files, test_files))
    parts = [torch.cat([split[i] for split in half]) for half in (train, test) for i in (0, 1)]
    return _standardised(parts[0].float(), parts[1], parts[2].float(), parts[3], padding=4)


def _read(path: Path, key: bytes) -> tuple[Tensor, Tensor]:
    """Return the images of a file of the archive, uint8 (images, 3, 32, 32), and their labels."""
    if not path.is_file():
        raise RecipeError(f"{path} is not there: unpack the Python version of the data set below --data-dir")
    with open(path, "rb") as file:
        content = pickle.load(file, encoding="bytes")
    images = torch.from_numpy(np.asarray(content[b"data"], dtype=np.uint8)).view(-1, 3, 32, 32)
    return images, torch.tensor(content[key])


def _standardised(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, *, padding: int) -> Images:
    mean, std = train.mean((0, 2, 3), keepdim=True), train.std((0, 2, 3), keepdim=True)
    classes = int(train_labels.max()) + 1
    return Images((train - mean) / std, train_labels, (test - mean) / std, test_labels, classes, padding)


def _augment(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Return random crops of the padded images, half of them mirrored."""
    size = images.shape[-1]
    padded = F.pad(images, [padding] * 4)
    rows, columns = torch.randint(2 * padding + 1, (2, len(images)), generator=generator)
    windows = padded.unfold(2, size, 1).unfold(3, size, 1)  # (batch, channels, shifts, shifts, size, size)
    crops = windows[torch.arange(len(images)), :, rows, columns]
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(mirrored[:, None, None, None], crops.flip(3), crops)
