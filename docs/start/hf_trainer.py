"""The Hugging Face Trainer with two more arguments."""

import pydoc_data.topics

import torch
from transformers import Trainer, TrainingArguments

from am_lightning import AMAdamW
from am_lightning.huggingface import AdaptiveMemoryCallback


class NextByte(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(256, 64)
        self.gru = torch.nn.GRU(64, 128, batch_first=True)
        self.head = torch.nn.Linear(128, 256)

    def forward(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden, _ = self.gru(self.embed(rows[:, :-1]))
        return {"loss": torch.nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), rows[:, 1:].flatten())}


def rows_of_bytes() -> list[dict[str, torch.Tensor]]:
    text = "\n".join(pydoc_data.topics.topics.values()).encode()
    rows = torch.frombuffer(bytearray(text[: len(text) // 65 * 65]), dtype=torch.uint8).long().view(-1, 65)
    return [{"rows": row} for row in rows]


if __name__ == "__main__":
    arguments = TrainingArguments(
        output_dir="trainer_output",
        max_steps=100,
        per_device_train_batch_size=32,
        weight_decay=0.1,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to="tensorboard",
        save_strategy="no",
        remove_unused_columns=False,
    )
    trainer = Trainer(
        NextByte(),
        arguments,
        train_dataset=rows_of_bytes(),
        optimizer_cls_and_kwargs=(AMAdamW, {"lr": 3e-3}),
        callbacks=[AdaptiveMemoryCallback()],
    )
    trainer.train()
    print("tensorboard --logdir trainer_output")
