"""Write shards in a process that can be killed: python -m tests.recipes.writer SOURCE FOLDER WORKERS [CALL PART]

CALL is one of the functions of `os` that end a file's writing (fsync, replace). The process that is about to call it
for a file whose path contains PART is killed by SIGKILL: this one, or one of its workers.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

from am_lightning.pretrain.data import prepare
from am_lightning.pretrain.data.prepare import Job, write_shards
from am_lightning.pretrain.data.sources import find_source
from am_lightning.pretrain.data.tokenizer import ByteTokenizer
from am_lightning.pretrain.runtime.errors import RecipeError

PARTS = 5  # work units of make_source with shard_mb 1


def make_source(path: Path) -> Path:
    """Write JSON lines of 4.2 MB, the same ones every time."""
    rng = random.Random(0)
    words = ["memory", "momentum", "step", "żółć", "日本", "\n"]
    size = 0
    with open(path, "w", encoding="utf-8") as file:
        while size < 4_200_000:
            text = " ".join(rng.choices(words, k=rng.randrange(300)))
            size += file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return path


def sleep(number: int) -> None:
    """Sleep until this process is ended, and leave its id in a file."""
    Path(os.environ["SLEEPERS"], str(os.getpid())).touch()
    time.sleep(600)


def die_before(call: str, part: str) -> None:
    real = getattr(os, call)

    def dies(target: Any, *args: Any) -> Any:
        path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else str(target)
        if part in path:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(target, *args)

    setattr(os, call, dies)


def main() -> None:
    source, folder, workers = sys.argv[1:4]
    try:
        write_shards(Job(Path(folder), find_source(source), ByteTokenizer(), 5.0, 1 << 20), int(workers))
    except RecipeError as error:
        sys.exit(str(error))


# A worker imports this module again with another name.
if len(sys.argv) == 6 and sys.argv[0].endswith("writer.py"):
    die_before(*sys.argv[4:])

if __name__ == "__main__":
    assert prepare.MEGABYTE == 1 << 20
    main()
