"""What can carry an attention or a recurrence: one module each, and the choice among them."""
