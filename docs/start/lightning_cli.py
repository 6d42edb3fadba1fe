r"""The same training from the command line:

python lightning_cli.py fit --optimizer AdamW --optimizer.lr 3e-3 \
    --trainer.max_steps 100 --trainer.log_every_n_steps 1 --trainer.callbacks+=am_lightning.AdaptiveMemory
"""

import pydoc_data.topics

import lightning as L
import torch
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader


class NextByte(L.LightningModule):
    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(256, 64)
        self.gru = torch.nn.GRU(64, width, batch_first=True)
        self.head = torch.nn.Linear(width, 256)

    def training_step(self, rows: torch.Tensor, batch_idx: int) -> torch.Tensor:
        hidden, _ = self.gru(self.embed(rows[:, :-1]))
        loss = torch.nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), rows[:, 1:].flatten())
        self.log("train/loss", loss, prog_bar=True)
        return loss


class HelpTexts(L.LightningDataModule):
    def __init__(self, batch_size: int = 32) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        text = "\n".join(pydoc_data.topics.topics.values()).encode()
        rows = torch.frombuffer(bytearray(text[: len(text) // 65 * 65]), dtype=torch.uint8).long().view(-1, 65)
        return DataLoader(rows, self.batch_size, shuffle=True)


if __name__ == "__main__":
    cli = LightningCLI(NextByte, HelpTexts, seed_everything_default=0)
    print("tensorboard --logdir", cli.trainer.log_dir)
