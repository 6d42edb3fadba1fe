"""The documentation: its site is whole, and what it shows runs."""
