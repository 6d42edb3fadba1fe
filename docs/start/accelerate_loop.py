"""An Accelerate loop: python accelerate_loop.py, or accelerate launch accelerate_loop.py."""

import pydoc_data.topics

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

from am_lightning import am_adamw
from am_lightning.huggingface import attach


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
    set_seed(0)
    accelerator = Accelerator(log_with="tensorboard", project_dir="accelerate_logs")
    accelerator.init_trackers("am")
    model = NextByte()
    model, optimizer, batches = accelerator.prepare(
        model, am_adamw(model, lr=3e-3, weight_decay=0.1), DataLoader(rows_of_bytes(), 32, shuffle=True)
    )
    reader = attach(accelerator, optimizer, log_every_n_steps=1)  # names parameters, sums over ranks, logs the curves

    for step, rows in zip(range(1, 101), batches, strict=False):
        loss = model(rows)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.log({"train/loss": loss.item()}, step=step)
        if step % 20 == 0:
            accelerator.print(f"step {step}: loss {loss.item():.3f}")
    accelerator.print(reader.finish())  # draws the last picture, returns the run in one line
    accelerator.print("tensorboard --logdir accelerate_logs")
    accelerator.end_training()
