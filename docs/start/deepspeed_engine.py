"""DeepSpeed ZeRO-2: deepspeed deepspeed_engine.py, or torchrun --nproc-per-node 2 deepspeed_engine.py."""

import pydoc_data.topics

import deepspeed
import torch
from torch.utils.data import DataLoader

from am_lightning import am_adamw
from am_lightning.deepspeed import attach


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
    config = {
        "train_micro_batch_size_per_gpu": 32,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "tensorboard": {"enabled": True, "output_path": "deepspeed_logs", "job_name": "am"},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=am_adamw(model, lr=3e-3, weight_decay=0.1), config=config)
    optimizer = attach(engine)  # the model's names, and what scope="global" needs

    for step, rows in zip(range(100), DataLoader(rows_of_bytes(), 32, shuffle=True), strict=False):
        loss = engine(rows.to(engine.device))
        engine.backward(loss)
        engine.step()
        if step % 10 == 0 and engine.global_rank == 0:
            betas = optimizer.momentum()
            print(f"step {step}: loss {loss.item():.3f}, beta_t {min(betas.values()):.3f} to {max(betas.values()):.3f}")
    torch.distributed.destroy_process_group()
