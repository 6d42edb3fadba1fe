"""A plain training loop: AMAdamW is a torch.optim.Optimizer."""

import pydoc_data.topics

import torch
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from am_lightning import AMAdamW, clip_grad_norm_
from am_lightning.loggers import attach


class NextByte(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(256, 64)
        self.gru = torch.nn.GRU(64, 128, batch_first=True)
        self.head = torch.nn.Linear(128, 256)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        hidden, _ = self.gru(self.embed(rows[:, :-1]))
        return torch.nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), rows[:, 1:].flatten())


def rows_of_bytes() -> torch.Tensor:
    text = "\n".join(pydoc_data.topics.topics.values()).encode()
    return torch.frombuffer(bytearray(text[: len(text) // 65 * 65]), dtype=torch.uint8).long().view(-1, 65)


if __name__ == "__main__":
    torch.manual_seed(0)
    model = NextByte()
    # betas: the cap of beta_t, and beta2.
    optimizer = AMAdamW(model.named_parameters(), lr=3e-3, betas=(0.89, 0.999), weight_decay=0.1)
    writer = SummaryWriter("plain_logs")
    handle = attach(optimizer, writer, every=1)  # a longer run: 50, the default
    for step, rows in zip(range(1, 101), DataLoader(rows_of_bytes(), 32, shuffle=True), strict=False):
        loss = model(rows)
        loss.backward()
        clip_grad_norm_(optimizer, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        writer.add_scalar("train/loss", loss.item(), step)
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    print(handle.finish())  # draws the last picture, returns the run in one line
    print("tensorboard --logdir plain_logs")
