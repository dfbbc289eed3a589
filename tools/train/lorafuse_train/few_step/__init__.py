"""What keeps the few-step ability of a fused base."""
