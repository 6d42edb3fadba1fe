"""Pretraining runs for the studies: one recipe, many optimizers, everything else equal."""
