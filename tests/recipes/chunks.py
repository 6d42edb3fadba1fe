"""A chunk of a data set in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from am_lightning.pretrain.data.chunks import Document


@dataclass(frozen=True)
class Texts:
    texts: tuple[bytes, ...]

    @property
    def size(self) -> int:
        return sum(map(len, self.texts))

    def documents(self) -> Iterator[Document]:
        for text in self.texts:
            yield Document(text, text)
