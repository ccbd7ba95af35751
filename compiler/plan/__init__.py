"""What carries each fused node, and why."""
