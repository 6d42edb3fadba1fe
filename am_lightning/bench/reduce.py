"""Cost of the reduction of a step: measured under torchrun, and predicted for larger clusters.

``torchrun --nproc-per-node 4 -m am_lightning.bench --reduce`` prints both, and without torchrun the prediction.
"""

from __future__ import annotations

import math
import os
import statistics
import time

import torch
import torch.distributed as dist

from am_lightning.distributed.layout import BYTES, message_bytes

# Tensors of Llama-style models: 9 a layer, embedding, head and last norm.
MODELS = {"60M": 8, "1B": 16, "8B": 32, "70B": 80, "405B": 126}

# NCCL's own model of its Tree algorithm with the LL protocol, which it uses for messages of this size
# (NVIDIA/nccl, src/graph/tuning.cc: baseLat, hwLat, treeCorrectionFactor, ncclTopoTuneModel); microseconds.
BASE_LATENCY = 4.4
NVLINK_LATENCY = 0.52
NETWORK_LATENCY = 5.0
NVLINK_LATENCY_AMONG_NODES = 1.8  # NVLINK_LATENCY grows by this factor
BUS_BANDWIDTH = 80.0  # GB/s, the cap for trees over more than two nodes
LL_SHARE, ALGORITHM_SHARE, CORRECTION = 1 / 3.8, 0.5, 0.7  # factors of BUS_BANDWIDTH; the last for 16 to 64 KiB
GPUS_PER_NODE = 8


def tensors_of(layers: int) -> int:
    """Return the number of parameter tensors of a Llama."""
    return 9 * layers + 3


def predicted_microseconds(ranks: int, size: int) -> float:
    """Return the time of one all-reduce of ``size`` bytes by a latency-bandwidth model: a tree over nodes of 8 GPUs.

    t = base + 2 ((g - 1) a_nvlink + log2(nodes) a_network) + size / bandwidth, where g is the GPUs of a node.
    """
    inside = min(ranks, GPUS_PER_NODE)
    nodes = max(1, ranks // GPUS_PER_NODE)
    nvlink = NVLINK_LATENCY * (NVLINK_LATENCY_AMONG_NODES if nodes > 1 else 1.0)
    latency = BASE_LATENCY + 2 * ((inside - 1) * nvlink + math.log2(nodes) * NETWORK_LATENCY)
    bandwidth = BUS_BANDWIDTH * LL_SHARE * ALGORITHM_SHARE * CORRECTION  # GB/s
    return latency + size / (1e3 * bandwidth)


def measured_microseconds(size: int, repeats: int, device: torch.device) -> tuple[float, float]:
    """Return median and 90th percentile of the slowest rank's time for one all-reduce of ``size`` bytes."""
    vector = torch.zeros(size // BYTES, dtype=torch.float64, device=device)
    times = torch.empty(repeats + 3, device="cpu")
    for repeat in range(repeats + 3):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(vector)
        if device.type != "cpu":
            torch.accelerator.synchronize()
        times[repeat] = (time.perf_counter() - start) * 1e6
    slowest = times.to(device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    kept = sorted(slowest[3:].tolist())
    return statistics.median(kept), kept[int(0.9 * (len(kept) - 1))]


def run(device: torch.device, repeats: int) -> None:
    """Print bytes and latency of a step for each model, measured (under torchrun) and predicted."""
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if launched:
        if device.type != "cpu":
            device = torch.device(device.type, int(os.environ.get("LOCAL_RANK", "0")))
            torch.accelerator.set_device_index(device.index)
        dist.init_process_group("gloo" if device.type == "cpu" else None)
    try:
        if launched:
            _print_measured(repeats, device)
        if not launched or dist.get_rank() == 0:
            _print_predicted()
    finally:
        if launched:
            dist.barrier()
            dist.destroy_process_group()


def _print_measured(repeats: int, device: torch.device) -> None:
    rows = []
    for name, layers in MODELS.items():
        size = message_bytes(tensors_of(layers))
        rows.append((name, layers, size, *measured_microseconds(size, repeats, device)))
    if dist.get_rank() != 0:
        return
    print(f"measured: {dist.get_world_size()} ranks, {dist.get_backend()}, {device.type}, {repeats} all-reduces each")
    print(f"{'Llama':>8}{'tensors':>9}{'bytes a step':>14}{'median us':>12}{'p90 us':>10}")
    for name, layers, size, median, ninety in rows:
        print(f"{name:>8}{tensors_of(layers):9}{size:14,}{median:12.0f}{ninety:10.0f}")
    print()


def _print_predicted() -> None:
    print("predicted, microseconds a step: NCCL tree, LL protocol, nodes of 8 GPUs with NVLink, InfiniBand between")
    print(f"{'ranks':>8}" + "".join(f"{name:>9}" for name in MODELS))
    for ranks in (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096):
        times = (predicted_microseconds(ranks, message_bytes(tensors_of(layers))) for layers in MODELS.values())
        print(f"{ranks:8}" + "".join(f"{value:9.0f}" for value in times))
