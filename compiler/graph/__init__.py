"""The graph of a block, how it is built, and the passes over it."""
