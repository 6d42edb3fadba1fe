"""Print the table of checkpoints in docs/tested.md: ``python -m tests.lightning.table``."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.lightning.test_checkpoints import HERE, PATHS
from tests.sharding.pool import Pool

PAIRS = ((2, 1), (2, 2), (2, 4), (4, 2))


def main() -> None:
    pools = {world: Pool(world) for world in (1, 2, 4)}
    print("| checkpoint of | written by |", " | ".join(f"{a} to {b}" for a, b in PAIRS), "|")
    print("|---|---|" + "---|" * len(PAIRS))
    try:
        for placed in PATHS:
            for adaptive in (True, False):
                with tempfile.TemporaryDirectory() as folder:
                    cells = [row(pools, placed, pair, adaptive, Path(folder)) for pair in PAIRS]
                print(f"| {placed} | {'AM-AdamW' if adaptive else 'AdamW'} |", " | ".join(cells), "|", flush=True)
    finally:
        for pool in pools.values():
            pool.stop()


def row(pools: dict[int, Pool], placed: str, pair: tuple[int, int], adaptive: bool, folder: Path) -> str:
    """Return the largest relative error of raw beta_t over the four steps after the resume."""
    where = folder / f"{pair[0]}.ckpt"
    if not where.exists():
        pools[pair[0]].run(f"{HERE}fit_and_save", placed=placed, where=str(where), adaptive=adaptive)
    ranks = pools[pair[1]].run(f"{HERE}resume", placed=placed, where=str(where), switched=not adaptive)
    return f"{max(rank['raw'] for rank in ranks):.0e}"


if __name__ == "__main__":
    main()
