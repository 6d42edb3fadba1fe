"""DeepSpeed ZeRO-2: deepspeed deepspeed_engine.py, or torchrun --nproc-per-node 2 deepspeed_engine.py."""

import pydoc_data.topics

import deepspeed
import torch

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
    optimizer = am_adamw(model, lr=3e-3, weight_decay=0.1)
    engine, _, loader, _ = deepspeed.initialize(  # every rank gets its own rows
        model=model, optimizer=optimizer, training_data=list(rows_of_bytes()), config=config
    )
    optimizer = attach(engine)  # names parameters; scope="global" needs it

    for _, rows in zip(range(100), loader, strict=False):
        loss = engine(rows.to(engine.device))
        engine.backward(loss)
        engine.step()
        beta = float(torch.stack(list(optimizer.momentum().values())).mean())
        points = {"train/loss": float(loss), "am/beta/mean": beta}
        engine.monitor.write_events([(tag, value, engine.global_samples) for tag, value in points.items()])
        if engine.global_steps % 10 == 1 and engine.global_rank == 0:
            print(f"step {engine.global_steps}: loss {float(loss):.3f}, mean beta_t {beta:.3f}")
    if engine.global_rank == 0:
        print("tensorboard --logdir deepspeed_logs")
    torch.distributed.destroy_process_group()
