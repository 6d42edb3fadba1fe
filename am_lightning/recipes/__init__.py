"""Pretraining recipes: data, model, checkpoints and reports, which the programs in recipes/ are put together from."""
