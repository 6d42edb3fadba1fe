"""The documentation: its site is complete, and its code runs."""
