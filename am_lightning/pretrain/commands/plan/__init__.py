"""What a run takes, computed before anyone pays for a node: memory, traffic, time and disk of a configuration."""
