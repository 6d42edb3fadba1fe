"""Save at one world size and load at another, by every path: the next steps are those of an unbroken run."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.sharding.checkpoint_paths import PAIRS, PATHS
from tests.sharding.pool import Pool

CASES = [(path, kind, scope) for path, one in PATHS.items() for kind, scope in one.cases]
STEPS = "tests.sharding.checkpoint_steps:"
ADAMW = "tests.sharding.checkpoint_adamw:"
REFUSALS = "tests.sharding.checkpoint_refusals:"
PHANTOM = "tests.sharding.checkpoint_phantom:"


@pytest.fixture(scope="module")
def saved(
    pool: Callable[[int], Pool], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str, str, int], Path]:
    """Return ``saved(path, kind, scope, world)``: the path of a checkpoint, which is written once."""
    done: dict[tuple[str, str, str, int], Path] = {}

    def save(path: str, kind: str, scope: str, world: int) -> Path:
        key = (path, kind, scope, world)
        if key not in done:
            where = tmp_path_factory.mktemp("checkpoint") / "saved"
            pool(world).run(f"{STEPS}train_and_save", path=path, kind=kind, scope=scope, where=str(where))
            done[key] = where
        return done[key]

    return save


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0]}to{pair[1]}")
@pytest.mark.parametrize(("path", "kind", "scope"), CASES, ids=["-".join(case).replace(" ", "_") for case in CASES])
def test_the_next_steps_are_those_of_an_unbroken_run(
    pool: Callable[[int], Pool], saved: Any, path: str, kind: str, scope: str, pair: tuple[int, int]
) -> None:
    where = saved(path, kind, scope, pair[0])
    ranks = pool(pair[1]).run(f"{STEPS}load_and_train", path=path, kind=kind, scope=scope, where=str(where))
    for rank in ranks:
        assert rank["raw"] <= 1e-12 and rank["weights"] <= 1e-12
        assert rank["bits"] == ranks[0]["bits"] and rank["names"]
        assert rank["share"] > 0.2


@pytest.mark.parametrize("pair", [(2, 1), (2, 4), (4, 2)], ids=lambda pair: f"{pair[0]}to{pair[1]}")
@pytest.mark.parametrize("path", ["fsdp2 full", "fsdp2 full from rank 0", "fsdp2 sharded", "fsdp1 full"])
def test_a_run_of_adamw_resumes_as_amadamw(
    pool: Callable[[int], Pool], tmp_path: Path, path: str, pair: tuple[int, int]
) -> None:
    """AdamW's momentum is assumed to have decayed by betas[0] at each step, with the group's lr and beta at the cap."""
    pool(pair[0]).run(f"{ADAMW}train_adamw_and_save", path=path, where=str(tmp_path / "saved"))
    ranks = pool(pair[1]).run(f"{ADAMW}switch", path=path, where=str(tmp_path / "saved"))
    for rank in ranks:
        assert rank["raw"] <= 1e-12 and rank["weights"] <= 1e-12
        assert rank["bits"] == ranks[0]["bits"] and rank["share"] > 0.2


@pytest.mark.parametrize("kind", ["torch", "adamw"])
def test_what_torch_does_not_load_under_fsdp1(pool: Callable[[int], Pool], tmp_path: Path, kind: str) -> None:
    """If torch.optim.AdamW passes here one day, the path can be supported."""
    answers = pool(2).run(f"{ADAMW}fsdp1_into_a_template", kind=kind, where=str(tmp_path / "saved"))
    assert all("Missing key in checkpoint state_dict: optim.param_groups" in answer for answer in answers)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("whole", "'weight' as a plain tensor.*full_state_dict=True"),
        ("whole by id", "'weight' as a plain tensor.*full_state_dict=True"),
        ("dimension", r"'weight' as a DTensor placed \(S\(1\)\).*dcp.load"),
        ("mesh", r"ranks 1, 0, but the parameter is a DTensor placed \(S\(0\)\) on the mesh of ranks 0, 1"),
        ("model", r"shape \(8, 5\) for parameter 'weight', which has shape \(4, 6\): it is a checkpoint of another"),
        ("model by dcp", r"shape \(8, 5\) for parameter 'weight'"),
    ],
)
def test_a_state_of_another_placement_or_model_is_refused(pool: Callable[[int], Pool], case: str, words: str) -> None:
    """Every rank refuses the state before anything moves."""
    answers = pool(2).run(f"{REFUSALS}refused", case=case)
    assert all(re.search(words, answer["text"]) and answer == answers[0] for answer in answers)
    assert answers[0]["untouched"]


def test_shards_are_not_loaded_into_whole_parameters(pool: Callable[[int], Pool]) -> None:
    for answer in pool(2).run(f"{REFUSALS}shards_into_whole"):
        assert "as a DTensor" in answer["text"] and "the parameter is a plain tensor" in answer["text"]
        assert "full_state_dict=True" in answer["text"] and answer["untouched"]


@pytest.mark.parametrize("missing", [["beta"], ["beta_prod"], ["beta_prod", "beta"]], ids="+".join)
def test_scalars_that_are_missing_in_a_full_checkpoint(pool: Callable[[int], Pool], missing: list[str]) -> None:
    for answer in pool(2).run(f"{REFUSALS}partly_by_dcp", missing=missing):
        assert f"lacks {' and '.join(map(repr, missing))} for parameter 'weight'" in answer["text"]
        assert answer["untouched"]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [("exp_avg", float("nan"), "nan or inf"), ("exp_avg_sq", float("inf"), "nan or inf"), ("exp_avg_sq", -1.0, "-1")],
)
def test_a_piece_that_one_rank_alone_refuses(pool: Callable[[int], Pool], key: str, value: float, words: str) -> None:
    """A load is no collective: the error names the rank and says what the other ranks do."""
    good, bad = pool(2).run(f"{REFUSALS}spoiled_on_one_rank", key=key, value=value)
    assert good["text"] == "loaded"
    assert f"has {words} in '{key}' for parameter 'weight'" in bad["text"] and bad["untouched"]
    assert "This is what rank 1 holds: ranks that find nothing wait" in bad["text"]


def test_each_rank_may_save_its_own_shards(pool: Callable[[int], Pool]) -> None:
    assert all(pool(2).run(f"{REFUSALS}own_shards_through_a_file"))


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(
    ("layout", "kind", "scope"),
    [
        ("fsdp2", "adamw", "tensor"),
        ("fsdp2", "sgd", "global"),
        ("fsdp1_full", "adamw", "tensor"),
        ("fsdp1_full", "sgd", "global"),
        ("fsdp1_flat", "adamw", "global"),
    ],
)
def test_asking_for_a_state_that_is_not_there_yet_leaves_no_trace(
    pool: Callable[[int], Pool], layout: str, kind: str, scope: str, world: int
) -> None:
    arguments = {"layout": layout, "kind": kind, "scope": scope}
    looked = pool(world).run(f"{PHANTOM}train_after_looking", **arguments, look=True)
    straight = pool(world).run(f"{PHANTOM}train_after_looking", **arguments, look=False)
    for one, other in zip(looked, straight, strict=True):
        created = one["created"]
        assert created["step"] == [0.0] and created["beta_prod"] == [1.0]
        assert all(math.isnan(beta) for beta in created["momentum"])
        assert one["bits"] == other["bits"] and one["weights"] == other["weights"]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("layout", ["fsdp2", "fsdp1_full"])
def test_a_first_step_at_lr_zero_counts(pool: Callable[[int], Pool], layout: str, world: int) -> None:
    """A warmup that begins at 0 moves nothing, but makes a step, as with AdamW."""
    for rank in pool(world).run(f"{PHANTOM}first_step_at_lr_zero", layout=layout):
        assert not rank["moved"] and rank["steps"] == [5.0]
        assert rank["off"] <= 1e-12 and rank["share"] > 0.1


@pytest.mark.parametrize("full", [False, True])
def test_saving_where_a_rank_holds_no_element(pool: Callable[[int], Pool], full: bool) -> None:
    """A rank without elements has no state, so torch.distributed.checkpoint steps there alone. It must not hang."""
    ranks = pool(4).run(f"{PHANTOM}save_where_a_rank_holds_nothing", full=full)
    assert [rank["holds"] for rank in ranks] == [1, 1, 1, 0] and ranks[3]["empty"]
    assert all(rank["off"] <= 1e-12 and rank["bits"] == ranks[0]["bits"] for rank in ranks)
    assert ranks[0]["share"] > 0.2
