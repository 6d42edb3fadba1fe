"""A LightningModule with torch.optim.AdamW, and one callback."""

import pydoc_data.topics

import lightning as L
import torch
from torch.utils.data import DataLoader

from am_lightning import AdaptiveMemory


class NextByte(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(256, 64)
        self.gru = torch.nn.GRU(64, 128, batch_first=True)
        self.head = torch.nn.Linear(128, 256)

    def training_step(self, rows: torch.Tensor, batch_idx: int) -> torch.Tensor:
        hidden, _ = self.gru(self.embed(rows[:, :-1]))
        loss = torch.nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), rows[:, 1:].flatten())
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=0.1)


def rows_of_bytes() -> torch.Tensor:
    text = "\n".join(pydoc_data.topics.topics.values()).encode()
    return torch.frombuffer(bytearray(text[: len(text) // 65 * 65]), dtype=torch.uint8).long().view(-1, 65)


if __name__ == "__main__":
    L.seed_everything(0)
    batches = DataLoader(rows_of_bytes(), batch_size=32, shuffle=True)
    trainer = L.Trainer(max_steps=100, log_every_n_steps=1, callbacks=[AdaptiveMemory()])
    trainer.fit(NextByte(), batches)
    print("tensorboard --logdir", trainer.log_dir)
