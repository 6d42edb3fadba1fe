"""What quickstart.sh runs: pretrain.py's fit, and then `sample`, which shows text that the trained model writes."""

from __future__ import annotations

from am_lightning.pretrain.runtime.main import command_line

PROMPT = "def "


def main(args: list[str] | None = None) -> None:
    """Run the command line `args` of pretrain.py (sys.argv's where None)."""
    with command_line():
        from am_lightning.pretrain.runtime.cli import PretrainCLI

        trained = PretrainCLI(args)
    if trained.result is not None and trained.trainer.is_global_zero:
        from am_lightning.recipes.__main__ import main as command

        print(f"  What the model writes behind {PROMPT!r}:\n", flush=True)
        command(["sample", str(trained.result.root), "--prompt", PROMPT])


if __name__ == "__main__":
    main()
