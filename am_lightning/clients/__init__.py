"""Small registrations for training programs of others, one module for each; each needs its program installed."""
