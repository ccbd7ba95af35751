"""What follows from a checked architecture alone: what is kept, whether it decodes, its cost."""
