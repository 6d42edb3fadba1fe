"""``python -m am_lightning.recipes``, the command line; ``am_lightning.pretrain`` has what the recipes are made of."""
