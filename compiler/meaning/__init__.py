"""The specification, run as it is written, in any dtype. `reference.py` is the door."""
