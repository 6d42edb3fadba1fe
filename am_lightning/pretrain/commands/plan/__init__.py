"""Memory, traffic, time and disk of a configuration, computed before anyone pays for GPUs."""
