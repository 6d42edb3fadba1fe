"""Setups that cannot be summed or saved are refused on every rank before a weight moves; a naive sum is detected."""

from __future__ import annotations

import re

import pytest

pytestmark = pytest.mark.slow

START_UP = 300
TEXTS = {
    "elastic": r"elastic_checkpoint: true of DeepSpeed .*'0\.weight'.*universal checkpoints",
    "zenflow": r"ZenFlow of DeepSpeed .*'0\.weight'.*remove zenflow",
    "nvme": r"NVMe offload .*'0\.weight'.*offload_optimizer\.device: cpu",
    "autocast": r"torch_autocast in float16 .*'0\.weight'.*bf16",
    "tensor_parallel": r"tensor parallelism .*'0\.weight'.*ZeRO alone",
    "experts": r"mixture-of-experts layers .*'0\.weight'.*DTensors",
    "unknown_stage_1": r"'0\.weight' \(DeepSpeed .*cannot be mapped",
    "unknown_stage_2": r"'0\.weight' \(DeepSpeed .*cannot be mapped",
    "unknown_stage_3": r"'0\.weight' \(DeepSpeed .*cannot be mapped",
    "group_without_attach": r"scope='group' needs .*attach\(engine\)",
    "global_without_attach": r"scope='global' needs .*attach\(engine\)",
    "clipping": r"clip_grad_norm_ cannot clip under DeepSpeed.*gradient_clipping",
    "named_in_config": r"TypeError: .*remove 'optimizer' from the DeepSpeed configuration",
}


@pytest.mark.parametrize("case", TEXTS)
def test_refused_on_every_rank_before_anything_moves(pool, case: str) -> None:
    ranks = pool(2).run("tests.deepspeed.refusals:refuse", timeout=START_UP, case=case)
    for rank in ranks:
        assert re.search(TEXTS[case], rank["text"]), rank["text"]
        assert not rank["moved"]


@pytest.mark.parametrize("stage", [1, 3])
def test_canary_private_attributes_are_where_they_were(pool, stage: int) -> None:
    """If DeepSpeed moves an attribute, this test names it before a wrong beta appears elsewhere."""
    for lost in pool(2).run("tests.deepspeed.refusals:missing", timeout=START_UP, stage=stage):
        assert lost == []


@pytest.mark.parametrize("stage", [2, 3])
def test_a_local_beta_would_be_seen(pool, stage: int) -> None:
    """Without the reduction the betas are wrong by far more than the other tests allow."""
    ranks = pool(2).run("tests.deepspeed.runs:compare", timeout=START_UP, stage=stage, naive=True)
    assert max(rank["beta"] for rank in ranks) > 1e-2
    assert ranks[0]["bits"] != ranks[1]["bits"]
