"""The Llama model, its LightningModule, its schedule and its parallel form."""
