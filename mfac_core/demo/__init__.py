"""What the demos of all frameworks share."""
