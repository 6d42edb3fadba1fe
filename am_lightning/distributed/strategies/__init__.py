"""One module for each way to shard parameters."""
