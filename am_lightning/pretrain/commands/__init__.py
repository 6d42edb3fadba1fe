"""Subcommands of am-lightning."""
