"""Pretraining: the data, model, checkpoints and commands of the programs in recipes/."""
