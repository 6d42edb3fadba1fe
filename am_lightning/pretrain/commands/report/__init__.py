"""Figures and pictures of finished and running runs."""
