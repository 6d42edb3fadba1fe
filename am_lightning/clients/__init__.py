"""Registrations for other training programs, one module for each, which needs the program installed."""
