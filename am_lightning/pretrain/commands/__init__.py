"""Subcommands of python -m am_lightning.recipes."""
