"""Step time of AMAdamW beside torch.optim.AdamW, interleaved in one process: ``python -m am_lightning.bench``."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from am_lightning import bench_reduce
from am_lightning.optim import AMAdamW

Shape = tuple[int, ...]


def llama60m() -> list[Shape]:
    """Parameter shapes of a 60M Llama (hidden 512, MLP 1376, 8 layers, vocabulary 32000)."""
    layer: list[Shape] = [(512, 512)] * 4 + [(1376, 512)] * 2 + [(512, 1376)] + [(512,)] * 2
    return [(32000, 512), *layer * 8, (512,), (32000, 512)]


def many_tiny() -> list[Shape]:
    """400 vectors: call overhead, not bytes."""
    return [((64, 256, 512, 768)[i % 4],) for i in range(400)]


MODELS: dict[str, Callable[[], list[Shape]]] = {"llama60m": llama60m, "many-tiny": many_tiny}


def build(shapes: list[Shape], dtype: torch.dtype, device: torch.device) -> dict[str, torch.optim.Optimizer]:
    """The optimizers to compare, on the same parameters with fixed gradients."""
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in shapes:
        param = torch.nn.Parameter((torch.randn(shape, generator=generator) * 0.05).to(device, dtype))
        param.grad = (torch.randn(shape, generator=generator) * 1e-3).to(device, dtype)
        params.append(param)
    lr, decay = 1e-6, 0.1
    return {
        "AdamW single": torch.optim.AdamW(params, lr, weight_decay=decay, foreach=False, fused=False),
        "AdamW foreach": torch.optim.AdamW(params, lr, weight_decay=decay, foreach=True),
        "AdamW fused": torch.optim.AdamW(params, lr, weight_decay=decay, fused=True),
        "AMAdamW reference": AMAdamW(params, lr, weight_decay=decay, foreach=False),
        "AMAdamW eager": AMAdamW(params, lr, weight_decay=decay),
        "AMAdamW eager, global": AMAdamW(params, lr, weight_decay=decay, scope="global"),
        "AMAdamW foreach": AMAdamW(params, lr, weight_decay=decay, foreach=True),
    }


def measure(optimizers: dict[str, torch.optim.Optimizer], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each step, all optimizers in turn at every repeat, after two warm-up rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for repeat in range(repeats + 2):
        for name, optimizer in optimizers.items():
            start = time.perf_counter()
            optimizer.step()
            if device.type != "cpu":
                torch.accelerator.synchronize()
            if repeat >= 2:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def table(seconds: dict[str, list[float]]) -> list[dict[str, float | str]]:
    """One row for each optimizer: median ms, and the median over repeats of the ratio to AdamW foreach and fused."""
    rows: list[dict[str, float | str]] = []
    for name, times in seconds.items():
        row: dict[str, float | str] = {"optimizer": name, "ms": statistics.median(times) * 1e3}
        for base in ("foreach", "fused"):
            pairs = zip(times, seconds[f"AdamW {base}"], strict=True)
            row[f"x {base}"] = statistics.median(a / b for a, b in pairs)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m am_lightning.bench", description=__doc__)
    parser.add_argument("--model", choices=sorted(MODELS), default="llama60m")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float64"], default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's default")
    parser.add_argument("--repeats", type=int, default=10, help="timed rounds, at least 1")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--reduce", action="store_true", help="instead: bytes and latency of the reduction of a step, under torchrun"
    )
    options = parser.parse_args()
    if options.repeats < 1 or options.threads < 0:
        parser.error(f"--repeats must be >= 1 and --threads >= 0, but got {options.repeats} and {options.threads}")
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if options.reduce:
        bench_reduce.run(device, options.repeats)
        return
    optimizers = build(MODELS[options.model](), getattr(torch, options.dtype), device)
    if not options.json:
        print(f"{options.repeats + 2} rounds of {len(optimizers)} optimizers ...", flush=True)
    rows = table(measure(optimizers, options.repeats, device))
    if options.json:
        print(json.dumps({**vars(options), "threads": torch.get_num_threads(), "rows": rows}))
        return
    print(f"{options.model}, {options.dtype}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("ms: median; ratios: median over the rounds, each optimizer against AdamW in the same round")
    print(f"{'':24}{'ms':>9}{'x AdamW foreach':>17}{'x AdamW fused':>15}")
    for row in rows:
        print(f"{row['optimizer']:24}{row['ms']:9.1f}{row['x foreach']:17.2f}{row['x fused']:15.2f}")


if __name__ == "__main__":
    main()
