"""Print the table of checkpoints in docs/tested.md: ``python -m tests.deepspeed.table``."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.deepspeed.test_checkpoints import RESUME, SAVE, START_UP, to_universal
from tests.sharding.pool import Pool


def main() -> None:
    pools = {world: Pool(world) for world in (1, 2, 4)}
    print("| stage | scope | saved at, loaded at | beta_t | weights | same bits on all ranks |")
    print("|---|---|---|---|---|---|")
    try:
        for stage in (0, 1, 2, 3):
            for scope in ("tensor", "group", "global"):
                with tempfile.TemporaryDirectory() as folder:
                    job = {"folder": folder, "stage": stage, "scope": scope, "timeout": START_UP}
                    pools[2].run(SAVE, **job)
                    _row(stage, scope, "2, 2", pools[2].run(RESUME, **job))
                    if stage:
                        to_universal(Path(folder))
                    for world in (1, 2, 4) if stage else ():
                        ranks = pools[world].run(RESUME, universal=True, **job)
                        _row(stage, scope, f"2, {world} (universal)", ranks)
    finally:
        for pool in pools.values():
            pool.stop()


def _row(stage: int, scope: str, worlds: str, ranks: list[dict]) -> None:
    equal = all(rank["bits"] == ranks[0]["bits"] for rank in ranks)
    errors = f"{max(r['beta'] for r in ranks):.0e} | {max(r['weights'] for r in ranks):.0e}"
    print(f"| {stage} | {scope} | {worlds} | {errors} | {'yes' if equal else 'NO'} |", flush=True)


if __name__ == "__main__":
    main()
