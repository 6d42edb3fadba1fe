"""Pretrain a Llama with Lightning: python pretrain.py fit --config laptop [--KEY VALUE ...]

--config takes a recipe's name (am-lightning list) or the path of a YAML. A run writes everything below
--trainer.default_root_dir. With --ckpt_path last the same command resumes from the newest checkpoint there, or starts
from step 0 if there is none. --compare true also trains AdamW. `validate` scores a checkpoint:
python pretrain.py validate --config laptop --ckpt_path last
"""

from __future__ import annotations

from am_lightning.pretrain.runtime.main import command_line


def main(args: list[str] | None = None) -> None:
    """Run the command line `args` (default: sys.argv's)."""
    with command_line():
        from am_lightning.pretrain.runtime.cli import PretrainCLI

        PretrainCLI(args)


if __name__ == "__main__":
    main()
