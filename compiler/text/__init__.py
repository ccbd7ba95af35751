"""PyTorch text for expressions, names and lines: what lowerings and emission write with."""
