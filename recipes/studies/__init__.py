"""Shared parts of the studies in recipes/studies: a ledger of finished runs, intervals, tables and figures."""
