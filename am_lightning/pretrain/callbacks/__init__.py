"""Callbacks of a pretraining run."""
