"""Syntax → architecture: every name resolved, every error found. `check.py` is the door."""
