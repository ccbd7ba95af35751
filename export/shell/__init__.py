"""What stands around an exported model in Transformers: copied into a folder, and renamed there.

`architecture.py` stands where the emitted text will be.
"""
