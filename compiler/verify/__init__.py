"""Checks of a compiled module against its meaning. `verify.py` is the list of them."""
