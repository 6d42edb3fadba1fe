"""Pretraining: data, model, checkpoints and commands, which the programs in recipes/ are put together from."""
