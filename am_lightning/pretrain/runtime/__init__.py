"""Shared parts of the recipes' programs: command line, run configuration, signals, errors."""
