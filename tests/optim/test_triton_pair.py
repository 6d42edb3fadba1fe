"""The Triton kernels under Triton's interpreter, on CPU tensors, against the float64 oracle."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from am_lightning.optim.kernels import triton as kernels
from am_lightning.optim.kernels.inputs import GroupOptions, LocalShard
from am_lightning.optim.kernels.triton.launch import require_triton, supports
from tests.sharding.pool import Pool

pytest.importorskip("triton")

SIZES = [
    0,
    1,
    2,
    3,
    5,
    17,
    127,
    128,
    129,
    1000,
    1023,
    1024,
    1025,
    2047,
    2051,
    6999,
    7000,
    8191,
    8192,
    8193,
    16_384,
    16_999,
]
FEW = [1, 777, 8192 + 333]
F32, BF16, F16, F64 = "float32", "bfloat16", "float16", "float64"


def check(interpreter: Pool, name: str, **arguments: Any) -> Any:
    return interpreter.run(f"tests.optim.interpreted:{name}", **arguments)[0]


@pytest.mark.slow
@pytest.mark.parametrize("offset", [0, 1])
def test_sizes(interpreter: Pool, offset: int) -> None:
    """Empty, one, odd, around a block and around a chunk; also with no address at a multiple of 16."""
    check(interpreter, "both_passes", sizes=SIZES[:-6] if offset else SIZES, dtypes=[F32] * 4, offset=offset)


def test_gradients_alone_at_odd_places(interpreter: Pool) -> None:
    check(interpreter, "both_passes", sizes=FEW, dtypes=[F32] * 4, offset=1, of="g")


@pytest.mark.parametrize(
    "dtypes",
    [[BF16] * 4, [F16] * 4, [F64] * 4, [BF16, F32, F32, BF16], [F32, F32, F32, BF16], [BF16, BF16, BF16, F32]],
    ids="-".join,
)
def test_dtypes(interpreter: Pool, dtypes: list[str]) -> None:
    check(interpreter, "both_passes", sizes=FEW, dtypes=dtypes)


@pytest.mark.parametrize(
    "options",
    [{"maximize": True, "weight_decay": 0.3, "eps": 1e-2}, {"lambd": 0.0, "weight_decay": 0.0}, {"eps": 0.0}],
    ids=["maximize", "plain", "no-eps"],
)
def test_options(interpreter: Pool, options: dict[str, Any]) -> None:
    check(interpreter, "both_passes", sizes=[1, 777], dtypes=[F32] * 4, **options)


def test_kinds_side_by_side(interpreter: Pool) -> None:
    check(interpreter, "mixed_kinds")


def test_the_order_of_a_sum_is_its_own(interpreter: Pool) -> None:
    check(interpreter, "alone_or_among_many")


def test_rows_that_do_not_count_keep_every_bit(interpreter: Pool) -> None:
    check(interpreter, "uncounted_rows")


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_gradients_are_scaled_in_registers(interpreter: Pool, dtype: str) -> None:
    check(interpreter, "scaled_gradients", dtype=dtype)


@pytest.mark.slow
def test_three_launches_for_any_number_of_tensors(interpreter: Pool) -> None:
    assert check(interpreter, "launches", count=60) == ["sums_kernel", "reduce_kernel", "update_kernel"]


def test_tables_follow_addresses_and_options(interpreter: Pool) -> None:
    check(interpreter, "other_addresses")


def test_stochastic_rounding(interpreter: Pool) -> None:
    check(interpreter, "stochastic_rounding")


def piece(**changes: Any) -> LocalShard:
    tensors = {name: torch.zeros(4, 3) for name in ("x", "g", "d", "v")}
    return LocalShard(0, options=changes.pop("options", GroupOptions(0.9, 0.1, 0.0, 0.0, False)), **(tensors | changes))


def test_what_is_left_to_other_tiers() -> None:
    assert supports(piece())
    assert supports(piece(g=torch.zeros(4, 3, dtype=torch.bfloat16)))
    assert not supports(piece(v=None))
    assert not supports(piece(options=GroupOptions(0.9, 0.1, 0.0, 0.1, False)))
    assert not supports(piece(g=torch.zeros(3, 4).t()))
    assert not supports(piece(x=torch.zeros(4, 3, dtype=torch.float64)))


def test_without_triton_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "am_lightning.optim.kernels.triton.kernels", raising=False)
    monkeypatch.delattr(kernels, "kernels", raising=False)
    with pytest.raises(RuntimeError, match=r"Triton cannot be imported .* pip install 'am-lightning\[triton\]'"):
        require_triton()
