"""What the studies in recipes/studies share: a ledger of finished runs, intervals, tables and figures."""
