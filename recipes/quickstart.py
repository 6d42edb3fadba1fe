"""The program of quickstart.sh: pretrain.py's `fit`, then `sample`, which prints text that the trained model writes."""

from __future__ import annotations

from am_lightning.pretrain.runtime.main import command_line

PROMPT = "def "


def main(args: list[str] | None = None) -> None:
    """Run the command line `args` of pretrain.py (default: sys.argv's)."""
    with command_line():
        from am_lightning.pretrain.runtime.cli import PretrainCLI

        trained = PretrainCLI(args)
    if trained.result is not None and trained.trainer.is_global_zero:
        from am_lightning.recipes.__main__ import main as command

        print(f"  The model's text after {PROMPT!r}:\n", flush=True)
        command(["sample", str(trained.result.root), "--prompt", PROMPT])


if __name__ == "__main__":
    main()
