"""``python -m am_lightning.bench``: what a step costs beside AdamW's, and what its reduction costs."""
